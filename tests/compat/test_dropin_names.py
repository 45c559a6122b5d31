"""Names, attributes and ways to call that code written for the peer uses. Figures are those of peft 0.21.2."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peft
from compat.tiny import IDS, llama, mixtral, net, outputs, randomise, rows, worst

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})


# ---- optimisers --------------------------------------------------------------------------------------------------------


def losses(make: Any, count: int = 4) -> tuple[list[float], set[str]]:
    """Return the losses of some steps, and which of A and B changed."""
    model = randomise(peft.get_peft_model(llama(), lora()), scale=0.1)
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    optimizer = make(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    model.train()
    found = []
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    after = dict(model.named_parameters())
    return found, {name.split(".")[-3] for name in before if not torch.equal(before[name], after[name])}


def test_lora_fa_trains_b_alone() -> None:
    from peft.optimizers import create_lorafa_optimizer

    found, changed = losses(lambda model: create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.1))
    assert found == pytest.approx([4.191316, 4.087281, 4.028344, 3.984124], abs=1e-4)
    assert changed == {"lora_B"}


def test_the_riemannian_optimizer() -> None:
    from peft.optimizers import create_riemannian_optimizer

    found, changed = losses(lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.05))
    assert found == pytest.approx([4.191316, 4.117974, 4.056203, 4.016688], abs=1e-4)
    assert changed == {"lora_A", "lora_B"}
    found, _ = losses(lambda model: create_riemannian_optimizer(model, torch.optim.SGD, lr=0.05, reg=0.1))
    assert found == pytest.approx([4.191316, 4.167209, 4.144533, 4.128066], abs=1e-4)


def test_lora_plus() -> None:
    from peft.optimizers import create_loraplus_optimizer

    found, _ = losses(lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.05, loraplus_lr_ratio=4))
    assert found == pytest.approx([4.191316, 4.152945, 4.087179, 4.008439], abs=1e-4)


# ---- functions ---------------------------------------------------------------------------------------------------------


def test_intruder_dimensions_are_reduced_into_a_new_adapter() -> None:
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    model, said = randomise(peft.get_peft_model(llama(), lora()), scale=1.0), []
    reduce_intruder_dimension(model, top_k=5, threshold_epsilon=0.9, logging_sink=said.append)
    assert list(model.peft_config) == ["default", "intruder_reduced"]
    assert model.active_adapters == ["intruder_reduced"]
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert float(layer.get_delta_weight("default").norm()) == pytest.approx(113.38033, abs=1e-2)
    assert float(layer.get_delta_weight("intruder_reduced").norm()) == pytest.approx(85.04288, abs=1e-2)
    assert said[0] == "base_model.model.model.layers.0.self_attn.q_proj: Intruders: 5"


def test_kappa_tune_selector() -> None:
    from peft.helpers import KappaTuneSelector

    selector = KappaTuneSelector(llama(), show_progress=False)
    found = peft.find_kappa_target_modules(llama(), show_progress=False)["target_modules"]
    assert selector.get_best_targets(top_p=0.2) == found
    assert found == ["model.layers.1.self_attn.v_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"]
    assert selector.get_best_targets(num_modules=2) == found[:2]
    assert selector.get_best_target_parameters(num_modules=2) == []


def test_kappa_of_a_mixture_of_experts() -> None:
    found = peft.find_kappa_target_modules(mixtral(), show_progress=False, moe_param_suffixes=("gate_up_proj", "down_proj"))
    assert found == {"target_modules": ["model.layers.1.self_attn.k_proj"], "target_parameters": ["model.layers.0.mlp.experts.gate_up_proj"]}


def test_matched_modules_are_inspected() -> None:
    from peft.tuners.tuners_utils import inspect_matched_modules

    model = peft.get_peft_model(llama(num_hidden_layers=1), lora())
    found = inspect_matched_modules(model.base_model)
    assert found["matched"] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert "model.layers.0.self_attn.k_proj" in found["unmatched"]


def test_the_mixin_for_trainers_of_monteclora() -> None:
    from peft.helpers import MontecloraTrainerMixin

    class Plain:
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            found = model(**inputs)
            return (found.loss, found) if return_outputs else found.loss

    class Mine(MontecloraTrainerMixin, Plain):  # type: ignore[misc]
        pass

    model = peft.get_peft_model(llama(), lora(monteclora_config=peft.MontecloraConfig(num_samples=2, kl_loss_weight=0.5)))
    model.train()
    inputs = {"input_ids": IDS, "labels": IDS}
    torch.manual_seed(5)
    plain = Plain().compute_loss(model, inputs)
    torch.manual_seed(5)
    loss = Mine().compute_loss(model, inputs)
    assert torch.isfinite(loss)
    assert float(loss.detach()) != float(plain.detach())
    torch.manual_seed(5)
    assert isinstance(Mine().compute_loss(model, inputs, return_outputs=True), tuple)
    assert torch.equal(Mine().compute_loss(peft.get_peft_model(llama(), lora()), inputs).detach(), llama()(**inputs).loss.detach())


# ---- attributes of layers ----------------------------------------------------------------------------------------------


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3), nn.Conv3d(4, 6, 3)
        self.e, self.a, self.l = nn.Embedding(9, 5), nn.MultiheadAttention(8, 2), nn.Linear(3, 7)


SHAPES = {"c1": (4, 6), "c2": (4, 6), "c3": (4, 6), "e": (9, 5), "a": (8, 24), "l": (3, 7)}


@pytest.mark.parametrize("name", SHAPES)
def test_in_and_out_features_of_a_layer(name: str) -> None:
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=list(SHAPES)), Kinds())
    layer = getattr(model, name)
    assert (layer.in_features, layer.out_features) == SHAPES[name]


@pytest.mark.parametrize("name", ["c1", "c2", "l"])
def test_layers_of_loha_have_all_containers(name: str) -> None:
    model = peft.inject_adapter_in_model(peft.LoHaConfig(r=2, target_modules=["c1", "c2", "l"], use_effective_conv2d=True), Kinds())
    layer = getattr(model, name)
    effective = ["default"] if name != "l" else []
    for container in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"):
        assert list(getattr(layer, container)) == (effective if "_t" in container else ["default"]), container
    assert set(layer.adapter_layer_names) == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}


def test_in_and_out_features_of_a_layer_of_loha() -> None:
    model = peft.inject_adapter_in_model(peft.LoHaConfig(r=2, target_modules=["c2", "l"]), Kinds())
    assert (model.l.base_layer.in_features, model.l.base_layer.out_features) == (3, 7)


def test_token_indices_of_a_layer_of_trained_rows() -> None:
    model = peft.get_peft_model(llama(), lora(trainable_token_indices=[3, 4]))
    assert model.get_base_model().model.embed_tokens.token_adapter.token_indices == {"default": [3, 4]}
    model = peft.get_peft_model(llama(), peft.TrainableTokensConfig(token_indices=[3, 4], target_modules=["embed_tokens"]))
    assert model.get_base_model().model.embed_tokens.token_indices == {"default": [3, 4]}


def test_the_projection_of_cpt() -> None:
    config = peft.CPTConfig(cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3], task_type="CAUSAL_LM")
    encoder = peft.get_peft_model(llama(), config).prompt_encoder["default"]
    with torch.no_grad():
        for p in encoder.parameters():
            if p.requires_grad:
                p.copy_(torch.arange(p.numel()).reshape(p.shape) / 10)
    found = encoder.get_projection()
    assert found.shape == (3, 32)
    assert found.norm(dim=1).tolist() == pytest.approx([0.0125] * 3, abs=1e-6)


def test_dora_caching_is_switched_by_a_call() -> None:
    from peft.helpers import DoraCaching

    caching = DoraCaching()
    caching(enabled=True)
    caching(enabled=False)
    with DoraCaching():
        pass


def test_a_layers_adapter_in_use_is_a_list_after_injection() -> None:
    """diffusers reads `layer.active_adapter` and takes it for a list."""
    model = peft.inject_adapter_in_model(lora(), llama(), "x")
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.active_adapter == ["x"]
    assert layer.active_adapters == ["x"]
    wrapped = peft.get_peft_model(llama(), lora(), "x")
    wrapped.set_adapter("x")
    assert wrapped.get_base_model().model.layers[0].self_attn.q_proj.active_adapter == ["x"]
    assert wrapped.active_adapter == "x"


def test_adapters_in_use_are_in_the_order_given() -> None:
    model = peft.get_peft_model(llama(), lora(), "x")
    model.add_adapter("y", lora())
    model.base_model.set_adapter(["y", "x"])
    assert model.active_adapters == ["y", "x"]
    assert model.get_base_model().model.layers[0].self_attn.q_proj.active_adapters == ["y", "x"]


def test_adapters_in_use_of_a_mixed_model_are_in_the_order_given() -> None:
    model = peft.get_peft_model(llama(), lora(task_type=None), "x", mixed=True)
    model.add_adapter("y", peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter(["y", "x"])
    assert model.active_adapters == ["y", "x"]


@pytest.mark.parametrize("compiled", [False, True])
def test_effects_that_do_not_commute_act_in_the_order_given(compiled: bool, tmp_path: Path) -> None:
    """Two DoRAs on one layer: the second multiplies the first. A saved stack keeps the order."""
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(net(), config, "x")
    model.add_adapter("y", peft.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    generator = torch.Generator().manual_seed(1)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name in ("x", "y"):
            layer.lora_B[name].weight.copy_(torch.randn(16, 2, generator=generator))
            layer.lora_magnitude_vector[name].weight.copy_(torch.rand(16, generator=generator) + 0.5)

    def change(name: str, y: torch.Tensor) -> torch.Tensor:
        delta = layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight
        factor = layer.lora_magnitude_vector[name].weight / (layer.weight + delta).norm(dim=1)
        return factor * (y + rows() @ delta.T)

    with torch.no_grad():
        plain = rows() @ layer.weight.T
        forwards, backwards = change("y", change("x", plain)) + layer.bias, change("x", change("y", plain)) + layer.bias
        assert worst(forwards, backwards) > 1e-2
        called = torch.compile(layer, backend="eager") if compiled else layer
        model.eval()
        for names, expected in ((["x", "y"], forwards), (["y", "x"], backwards)):
            model.base_model.set_adapter(names, inference_mode=True)
            assert worst(called(rows()), expected) < 1e-5
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_stack(net(), tmp_path)
    assert (list(again.peft_config), again.active_adapters) == (["x", "y"], ["y", "x"])
    assert worst(again(rows()), model(rows())) < 1e-6


def test_layers_in_a_status_are_in_the_order_of_modules() -> None:
    model = peft.get_peft_model(llama(), lora(target_modules=["v_proj", "down_proj"]))
    model.add_adapter("other", lora(target_modules=["q_proj", "v_proj", "up_proj"]))
    names = [layer.name for layer in peft.get_layer_status(model)]
    first = [f"model.model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")]
    assert names == [*first, *(name.replace("layers.0", "layers.1") for name in first)]


# ---- configs and models ------------------------------------------------------------------------------------------------


def test_the_type_of_a_config_in_a_string() -> None:
    assert f"{lora().peft_type}" == "PeftType.LORA"
    assert lora().peft_type == "LORA"
    assert repr(peft.PeftType.LORA) == "<PeftType.LORA: 'LORA'>"
    assert f"{lora().task_type}" == "CAUSAL_LM"
    assert json.loads(json.dumps(lora().peft_type)) == "LORA"


def test_a_wrapped_base_has_the_configs() -> None:
    base = llama()
    model = peft.get_peft_model(base, lora())
    assert base.peft_config is model.peft_config or base.peft_config == model.peft_config
    assert not hasattr(model.unload(), "peft_config")


def test_a_task_class_can_be_named_without_a_config() -> None:
    assert inspect.signature(peft.PeftModelForTokenClassification).parameters["peft_config"].default is None


def test_task_classes_descend_from_the_class_of_this_module() -> None:
    for name in ("CausalLM", "Seq2SeqLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "FeatureExtraction"):
        assert peft.PeftModel in getattr(peft, f"PeftModelFor{name}").__mro__


@pytest.mark.parametrize("method", ["save_pretrained", "set_adapter", "load_adapter", "forward"])
def test_a_method_that_is_patched_on_the_model_class_is_called(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Clients patch `peft.PeftModel` and train a `PeftModelForCausalLM` (which has a `forward` of its own)."""
    called, before = [], getattr(peft.PeftModel, method)

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(method)
        return before(self, *args, **kwargs)

    monkeypatch.setattr(peft.PeftModel, method, patched)
    model = peft.get_peft_model(llama(), lora(task_type=None if method == "forward" else "CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "default")
    model.set_adapter("default")
    model(input_ids=IDS)
    assert called


def test_a_method_that_is_patched_on_the_tuner_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called, before = [], peft.LoraModel.merge_and_unload

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return before(self, *args, **kwargs)

    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", patched)
    model = peft.get_peft_model(llama(), lora())
    model.merge_and_unload()
    assert called


def test_the_class_of_the_tuner_has_its_name() -> None:
    assert type(peft.get_peft_model(llama(), lora()).base_model) is peft.LoraModel
    assert type(peft.get_peft_model(llama(), peft.LoHaConfig(target_modules=["q_proj"])).base_model) is peft.LoHaModel
    assert type(peft.LoraModel(llama(), lora(), "default")).__name__ == "LoraModel"
    assert peft.get_model_status(peft.get_peft_model(llama(), lora())).adapter_model_type == "LoraModel"


@pytest.mark.parametrize("method", ["_create_and_replace", "_cast_adapter_dtype", "add_weighted_adapter", "delete_adapter", "_replace_module"])
def test_methods_of_the_tuner_class_that_suites_patch(method: str) -> None:
    """ms-swift replaces some of them when it is imported."""
    assert callable(getattr(peft.LoraModel, method))


@pytest.mark.parametrize("kind", ["AdaLoraModel", "OFTModel", "IA3Model", "VeraModel", "BOFTModel", "FourierFTModel"])
def test_stand_ins_of_absent_models_have_the_members_that_suites_patch(kind: str) -> None:
    for member in ("_create_and_replace", "inject_adapter", "forward", "merge_and_unload", "prefix"):
        assert hasattr(getattr(peft, kind), member), member


@pytest.mark.parametrize("kind", ["AdaLoraConfig", "OFTConfig", "IA3Config"])
def test_stand_ins_of_absent_configs_show_their_fields(kind: str) -> None:
    assert "target_modules" in getattr(peft, kind).__dataclass_fields__ or hasattr(getattr(peft, kind), "target_modules")


def test_an_arrow_model_takes_a_dtype(tmp_path: Path) -> None:
    for name in ("one", "two"):
        randomise(peft.get_peft_model(llama(), lora()), seed=len(name)).save_pretrained(tmp_path / name)
    model = peft.create_arrow_model(
        base_model=llama(),
        task_specific_adapter_paths=[str(tmp_path / "one"), str(tmp_path / "two")],
        arrow_config=peft.ArrowConfig(top_k=1),
        dtype=torch.float32,
    )
    assert torch.isfinite(outputs(model)).all()


# ---- names that are imported -------------------------------------------------------------------------------------------

IMPORTED = {
    "transformers 5.6–5.17": ["peft.utils.save_and_load:_maybe_shard_state_dict_for_tp"],
    "what suites import": [
        "peft.tuners.lycoris_utils:LycorisLayer",
        "peft.tuners.lycoris_utils:LycorisTuner",
        "peft.tuners.lycoris_utils:LycorisConfig",
        "peft.tuners.tuners_utils:UPCAST_DTYPES",
        "peft.utils.constants:UPCAST_DTYPES",
        "peft.import_utils:is_torchao_available",
        "peft.import_utils:is_gptqmodel_available",
        "peft.import_utils:is_eetq_available",
        "peft.import_utils:is_hqq_available",
        "peft.tuners.tuners_utils:check_adapters_to_merge",
        "peft.tuners.tuners_utils:_get_submodules",
        "peft.tuners.tuners_utils:cast_adapter_dtype",
        "peft.tuners.tuners_utils:inspect_matched_modules",
        "peft.tuners.lora.bnb:dispatch_bnb_4bit",
        "peft.tuners.lora.bnb:dispatch_bnb_8bit",
        "peft.tuners.lora.layer:dispatch_default",
        "peft.tuners.lora.gptq:GPTQLoraLinear",
        "peft.tuners.lora.dora:DoraLinearLayer",
        "peft.tuners.lora.variants:DoraLinearVariant",
        "peft.tuners.mixed:COMPATIBLE_TUNER_TYPES",
        "peft.tuners.oft:OFTLayer",
        "peft.tuners.ia3:IA3Layer",
        "peft.tuners.adalora.model:AdaLoraModel",
        "peft.utils.merge_utils:ties",
        "peft.utils.integrations:dequantize_bnb_weight",
        "peft.utils.other:set_additional_trainable_modules",
        "peft.utils.save_and_load:get_embedding_layer_name",
        "peft.utils:TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING",
    ],
}


@pytest.mark.parametrize("name", [name for names in IMPORTED.values() for name in names])
def test_a_name_that_clients_import(name: str) -> None:
    module, _, attribute = name.partition(":")
    assert getattr(importlib.import_module(module), attribute) is not None


def test_tensors_of_a_model_that_is_not_parallel_pass_as_they_are() -> None:
    """transformers 5.6–5.17 call it on whatever they load."""
    from peft.utils.save_and_load import _maybe_shard_state_dict_for_tp

    model = peft.get_peft_model(llama(), lora())
    tensors = dict(peft.get_peft_model_state_dict(model))
    found = _maybe_shard_state_dict_for_tp(model, tensors, "default")
    found = tensors if found is None else found
    assert all(torch.equal(found[name], value) for name, value in peft.get_peft_model_state_dict(model).items())


@pytest.mark.parametrize("bits", [4, 8])
def test_kappa_of_a_quantised_base_looks_at_weights(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)

    def body(spread: int, seed: int) -> torch.Tensor:
        """Return a weight whose rows, each a singular vector, span `spread / 10` powers of ten: int8 without its scales has none of that."""
        generator = torch.Generator().manual_seed(seed)
        return torch.diag(torch.logspace(0, -spread / 10, 64)) @ torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]

    model = nn.Module()
    model.layers = nn.ModuleList()
    for place, spread in enumerate((20, 1, 15, 3, 8)):
        weight = body(spread, place)
        if bits == 4:
            layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        model.layers.append(layer.to("cpu"))
    found = peft.find_kappa_target_modules(model, top_p=0.4, show_progress=False)["target_modules"]
    assert found == ["layers.1", "layers.3"]
