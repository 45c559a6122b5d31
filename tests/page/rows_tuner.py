"""§7.1, §7.3: the tuner object, and rows of a batch under different adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from page.making import (
    IDS,
    LAYERS,
    SORTS,
    config,
    fresh,
    get_peft_config,
    get_peft_model,
    made,
    over,
    pair,
    parameters_of,
    refused,
    run,
    same,
    tiny,
    trains,
    warned,
)

Q = "model.layers.0.self_attn.q_proj"


def _weight(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.get_base_model().get_submodule(Q).get_base_layer().weight
    return found


# ---- 7.1 merging -----------------------------------------------------------------------------------------------------
@over(*LAYERS)
def merging_adds_the_deltas(kind: str) -> None:
    model = pair(kind)
    before, weight = run(model), _weight(model).clone()
    delta = model.get_base_model().get_submodule(Q).get_delta_weight("a")
    model.base_model.merge_adapter()
    assert same(_weight(model), weight + delta)
    assert same(run(model), before, atol=1e-4)
    assert model.get_model_status().merged_adapters == ["a"]
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["b"], safe_merge=True)
    assert model.get_model_status().merged_adapters == ["b"]


@over(*LAYERS)
def merging_twice_is_warned_of_once(kind: str) -> None:
    model = made(kind)
    model.merge_adapter()
    weight = _weight(model).clone()
    with warned("merged"):
        model.merge_adapter()
    assert torch.equal(_weight(model), weight)


@over(*LAYERS)
def unmerging_takes_all_out(kind: str) -> None:
    model = pair(kind)
    weight, before = _weight(model).clone(), run(model)
    model.merge_adapter(["a"])
    model.merge_adapter(["b"])
    model.base_model.unmerge_adapter()
    assert torch.equal(_weight(model), weight)
    assert torch.equal(run(model), before)
    with warned("(?i)already unmerged"):
        model.unmerge_adapter()


@over(*LAYERS)
def several_merged_are_the_sum(kind: str) -> None:
    model = pair(kind)
    model.base_model.set_adapter(["a", "b"])
    before = run(model)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["a", "b"]
    assert same(run(model), before, atol=1e-4)


@over(*LAYERS)
def broken_adapters_are_refused(kind: str) -> None:
    for broken in (float("nan"), float("inf")):
        model = made(kind)
        list(parameters_of(model, "default").values())[-1].data.fill_(broken)  # what was merged before it is taken out again
        weight = _weight(model).clone()
        for operation in (model.merge_adapter, model.merge_and_unload):
            with refused(ValueError, "NaNs detected in the merged weights. The adapter.*default.*seems to be broken"):
                operation(safe_merge=True)
        assert torch.equal(_weight(model), weight)
        assert model.get_model_status().merged_adapters == []


@over(*LAYERS)
def merged_and_unloaded_it_is_the_base(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = made(kind, modules_to_save=["lm_head"])
    base, before = model.get_base_model(), run(model)
    copy_of_head = base.lm_head.modules_to_save["default"]
    found = model.merge_and_unload(progressbar=True, safe_merge=True)
    assert "it/s" in capsys.readouterr().err
    assert found is base
    assert not hasattr(base, "peft_config")
    assert type(base.get_submodule(Q)) is nn.Linear
    assert base.lm_head is copy_of_head
    assert same(run(base), before, atol=1e-4)


def injected_models_lose_their_configs() -> None:
    from peft_lora import LoraModel

    base = tiny()
    make: Any = LoraModel  # a type checker sees the constructor of a module
    tuner = make(base, config("lora"))
    assert list(base.peft_config) == ["default"]
    assert tuner.merge_and_unload() is base
    assert not hasattr(base, "peft_config")


def token_rows_become_the_models() -> None:
    model = made("lora", trainable_token_indices=[3])
    before, row = run(model), next(p for n, p in parameters_of(model, "default").items() if "token" in n).detach().clone()
    base = model.merge_and_unload()
    assert torch.equal(base.get_input_embeddings().weight[3], row.flatten())
    assert same(run(base), before, atol=1e-4)


@over(*LAYERS)
def named_ones_are_merged(kind: str) -> None:
    model = pair(kind)
    model.set_adapter("b")
    expected = run(model)
    model.set_adapter("a")
    assert same(run(model.merge_and_unload(adapter_names=["b"])), expected, atol=1e-4)


@over(*SORTS)
def unloaded_it_is_the_base(kind: str) -> None:
    model = made(kind)
    assert torch.equal(run(model.unload()), run(tiny()))


@over("lora", "loha", "prompt")
def head_in_use_stays(kind: str) -> None:
    model = made(kind, "bert-seq-cls")
    head = model.get_base_model().classifier.modules_to_save["default"]
    assert model.unload().classifier is head


def tied_embeddings_are_warned_of() -> None:
    base = tiny("gpt2")
    with warned("tie_word_embeddings"):
        model = get_peft_model(base, config("lora", "gpt2", target_modules=["wte"], fan_in_fan_out=False, init_lora_weights=False)).eval()
    before = run(model)
    with pytest.warns(UserWarning, match="tie"):
        found = model.merge_and_unload()
    assert same(run(found), before, atol=1e-4)
    assert found.config.tie_word_embeddings is (found.lm_head.weight is found.transformer.wte.weight)


def layers_of_unknown_libraries_are_refused() -> None:
    class QuantLinear(nn.Module):
        """What a library for GPTQ puts in the place of a Linear."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 8
            self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))

    base = nn.Sequential(QuantLinear())
    for kind in LAYERS:
        with refused(ValueError, "QuantLinear"):
            get_peft_model(base, config(kind, task_type=None, target_modules=["0"]))


# ---- 7.1 the rest ----------------------------------------------------------------------------------------------------
@over(*LAYERS)
def outputs_of_active_ones_add(kind: str) -> None:
    model = pair(kind)
    layer, x = model.get_base_model().get_submodule(Q), torch.randn(3, 32)
    parts = {}
    for names in ("a", "b", ["a", "b"]):
        model.base_model.set_adapter(names)
        parts[str(names)] = layer(x)
    plain = layer.get_base_layer()(x)
    assert same(parts["['a', 'b']"] - plain, parts["a"] - plain + parts["b"] - plain)
    assert trains(model, "a")
    model.base_model.set_adapter("b", inference_mode=True)
    assert not trains(model, "b")


@over(*LAYERS)
def tuner_deletes_and_switches(kind: str) -> None:
    model = pair(kind)
    tuner: Any = model.base_model
    before = run(model)
    tuner.disable_adapter_layers()
    assert torch.equal(run(model), run(tiny()))
    assert not model.has_active_enabled_adapter
    tuner.enable_adapter_layers()
    assert torch.equal(run(model), before)
    tuner.delete_adapter("b")
    assert list(model.peft_config) == ["a"]


@over(*LAYERS)
def tuner_injects(kind: str) -> None:
    model = made(kind, name="a")
    tuner: Any = model.base_model
    tuner.peft_config["b"] = config(kind)
    tuner.inject_adapter(tuner.model, "b", autocast_adapter_dtype=True, low_cpu_mem_usage=True)
    assert set(model.get_base_model().get_submodule(Q).adapters()) == {"a", "b"}
    assert {p.device.type for p in parameters_of(model, "b").values()} == {"meta"}


def targets_are_listed() -> None:
    assert fresh("lora", target_modules=["q_proj"]).base_model.targeted_module_names == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    model = fresh("lora", target_modules=[], target_parameters=["q_proj.weight"])
    assert model.base_model.targeted_parameter_names == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]


def tuner_has_the_attributes_of_the_page() -> None:
    for kind, prefix in (("lora", "lora_"), ("loha", "hada_")):
        model = pair(kind)
        tuner: Any = model.base_model
        assert tuner.prefix == prefix
        assert tuner.peft_config is model.peft_config
        assert tuner.model is model.get_base_model()
        assert tuner.active_adapters == ["a"]
        assert tuner.active_adapter in ("a", ["a"])


def configs_of_models_are_dicts() -> None:
    tuner: Any = fresh("lora").base_model
    assert tuner.get_model_config(tiny())["model_type"] == "llama"
    assert tuner.get_model_config(nn.Linear(2, 2)) == {"model_type": "custom"}


# ---- 7.3 rows --------------------------------------------------------------------------------------------------------
@over(*SORTS)
def each_row_has_its_adapter(kind: str) -> None:
    model = pair(kind)
    found = run(model, adapter_names=["b", "__base__"])
    model.set_adapter("b")
    assert same(found[0], run(model)[0])
    assert same(found[1][-6:], run(tiny())[1])


def rows_train_as_well() -> None:
    model = pair("lora").train()
    model.set_requires_grad(["a", "b"])
    model(input_ids=IDS, labels=IDS, adapter_names=["a", "b"]).loss.backward()
    for name in "ab":
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters_of(model, name).values())


@over(*SORTS)
def as_many_names_as_rows(kind: str) -> None:
    with refused(ValueError, "adapter_names"):
        run(pair(kind), adapter_names=["a"])


@over(*SORTS)
def unknown_names_of_rows(kind: str) -> None:
    with refused(ValueError, "Trying to infer with non-existing adapter.*: c"):
        run(pair(kind), adapter_names=["a", "c"])


@over(*LAYERS)
def merged_models_have_no_rows(kind: str) -> None:
    model = pair(kind)
    model.merge_adapter()
    with refused(ValueError, "merged"):
        run(model, adapter_names=["a", "b"])


def rows_of_dora_are_right() -> None:
    model = pair("lora", use_dora=True)
    found = run(model, adapter_names=["a", "b"])
    assert same(found[0], run(model)[0])
    model.set_adapter("b")
    assert same(found[1], run(model)[1])


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.mha(x, x, x)[0]
        return found


def some_layers_have_no_rows() -> None:
    """What can't have rows of its own is refused; what is not refused must be right."""
    cases: list[tuple[nn.Module, dict[str, Any], torch.Tensor]] = [
        (_Attention(), {"target_modules": ["mha"]}, torch.randn(2, 3, 8)),
        (nn.Sequential(nn.Linear(8, 8)), {"target_modules": [], "target_parameters": ["0.weight"]}, torch.randn(2, 8)),
    ]
    own = {"peft_type": "LORA", "r": 2, "init_lora_weights": False}
    for base, more, x in cases:
        model = get_peft_model(base, get_peft_config({**own, **more}), "a").eval()
        model.add_adapter("b", get_peft_config({**own, **more}))
        try:
            found = model(x, adapter_names=["a", "b"])
        except (ValueError, TypeError):
            continue
        model.set_adapter("b")
        assert same(found[1], model(x)[1])


@over(*SORTS)
def disabled_all_rows_are_the_bases(kind: str) -> None:
    model = pair(kind)
    with model.disable_adapter():
        assert same(run(model, adapter_names=["a", "b"]), run(tiny()))


@over(*SORTS)
def beams_follow_their_row(kind: str) -> None:
    model = pair(kind)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 3}
    found = model.generate(input_ids=IDS, adapter_names=["a", "b"], **options)
    assert torch.equal(found[0], model.generate(input_ids=IDS, **options)[0])
    model.set_adapter("b")
    assert torch.equal(found[1], model.generate(input_ids=IDS, **options)[1])


class _Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.line = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.one, self.two, self.three = nn.Conv1d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv3d(6, 6, 1)
        self.first = nn.Linear(6, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.one(self.line(self.first(self.words(ids))).transpose(1, 2))
        found: torch.Tensor = self.three(self.two(x.unsqueeze(-1)).unsqueeze(-1)).flatten(1)
        return found


def saved_modules_have_rows() -> None:
    torch.manual_seed(0)
    base, names = _Many(), ["words", "line", "one", "two", "three"]
    own = {"peft_type": "LORA", "r": 2, "target_modules": ["first"], "modules_to_save": names}
    ids = torch.tensor([[1, 2], [1, 2], [1, 2]])
    expected = base(ids)
    model = get_peft_model(base, get_peft_config(own), "a").eval()
    model.add_adapter("b", get_peft_config(own))
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        for parameter in parameters_of(model, name).values():
            parameter.data.add_(torch.randn_like(parameter))
    found = model(ids, adapter_names=["a", "b", "__base__"])
    for row, name in enumerate("ab"):
        model.set_adapter(name)
        assert same(found[row], model(ids)[row])
    assert same(found[2], expected[2])
