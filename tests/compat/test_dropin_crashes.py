"""Code written for the peer that crashed here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

import peft
from compat.tiny import IDS, SIZES, llama, net, outputs, randomise, rows, step, worst

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})


# ---- FSDP1 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> Any:
    """Return the model in FSDP1, each layer a unit, as accelerate makes it."""
    import functools

    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def test_the_state_dict_of_a_model_in_fsdp1(one_process: None) -> None:
    expected = peft.get_peft_model_state_dict(randomise(peft.get_peft_model(llama(), lora())))
    model = sharded(randomise(peft.get_peft_model(llama(), lora())))
    found = peft.get_peft_model_state_dict(model, state_dict=full(model), adapter_name="default")
    assert {name: tuple(value.shape) for name, value in found.items()} == {name: tuple(value.shape) for name, value in expected.items()}
    assert all(worst(found[name], expected[name]) == 0 for name in expected)


def full(model: Any) -> Any:
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(offload_to_cpu=True)):
        return model.state_dict()


def test_the_state_dict_of_a_model_in_fsdp1_without_tensors_given(one_process: None) -> None:
    """accelerate's `save_fsdp_model(…, adapter_only=True)`: inside the context that decides the kind of state dict."""
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

    expected = peft.get_peft_model_state_dict(randomise(peft.get_peft_model(llama(), lora())))
    model = sharded(randomise(peft.get_peft_model(llama(), lora())))
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(offload_to_cpu=True)):
        found = peft.get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    assert {name: tuple(value.shape) for name, value in found.items()} == {name: tuple(value.shape) for name, value in expected.items()}
    assert all(worst(found[name], expected[name]) == 0 for name in expected)


def test_a_state_dict_is_put_into_a_model_in_fsdp1(one_process: None) -> None:
    """accelerate's `load_fsdp_model(…, adapter_only=True)`."""
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

    source = randomise(peft.get_peft_model(llama(), lora()))
    tensors, expected = peft.get_peft_model_state_dict(source), outputs(source)
    model = sharded(peft.get_peft_model(llama(), lora()))
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(offload_to_cpu=True)):
        peft.set_peft_model_state_dict(model, tensors, adapter_name="default")
    assert worst(outputs(model), expected) < 1e-5


def test_the_status_of_a_model_in_fsdp1(one_process: None) -> None:
    expected = peft.get_model_status(peft.get_peft_model(llama(), lora()))
    model = sharded(peft.get_peft_model(llama(), lora()))
    status = peft.get_model_status(model)
    assert status.available_adapters == expected.available_adapters == ["default"]
    assert status.num_adapter_layers == expected.num_adapter_layers == 4
    assert [layer.module_type for layer in peft.get_layer_status(model)] == ["lora.Linear"] * 4


@pytest.mark.parametrize("units", ["blocks", "what trains"])
@pytest.mark.parametrize("original", [True, False], ids=["original parameters", "flat parameters"])
def test_tensors_go_in_and_out_of_fsdp1_of_every_kind(one_process: None, units: str, original: bool, tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    from peft.utils.hotswap import hotswap_adapter
    from peft.utils.other import fsdp_auto_wrap_policy

    def shard(model: Any) -> Any:
        if units == "blocks" and original:
            return sharded(model)
        if units == "blocks":
            model.requires_grad_(True)  # flat parameters train as a whole
        policy = fsdp_auto_wrap_policy(model)
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu"))

    def fields() -> Any:
        return lora(target_modules=["q_proj", "lm_head"], modules_to_save=["norm"])

    source = randomise(peft.get_peft_model(llama(), fields()))
    source.save_pretrained(tmp_path)
    adapter, base, expected = peft.get_peft_model_state_dict(source), peft.get_base_model_state_dict(source), outputs(source)
    model = shard(peft.get_peft_model(llama(), fields()))
    peft.set_peft_model_state_dict(model, adapter)
    assert worst(outputs(model), expected) < 1e-5
    for found, wanted in ((peft.get_peft_model_state_dict(model), adapter), (peft.get_base_model_state_dict(model), base)):
        assert set(found) == set(wanted)
        assert all(found[name].shape == wanted[name].shape and worst(found[name], wanted[name]) == 0 for name in wanted)
    peft.set_base_model_state_dict(model, {name: value * 2 for name, value in base.items()})
    assert all(worst(value, base[name] * 2) == 0 for name, value in peft.get_base_model_state_dict(model).items())
    other = shard(peft.get_peft_model(llama(), lora(target_modules=["q_proj"])))
    peft.get_peft_model(llama(), lora(target_modules=["q_proj"])).save_pretrained(tmp_path / "plain")
    hotswap_adapter(other, str(tmp_path / "plain"), "default")
    assert worst(outputs(other), outputs(llama())) < 1e-5


def test_a_model_in_fsdp1_saves_whole_tensors(one_process: None, tmp_path: Path) -> None:
    import safetensors.torch

    model = randomise(peft.get_peft_model(llama(), lora()))
    expected = {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}
    wrapped = sharded(model)
    wrapped.module.save_pretrained(tmp_path / "out", state_dict=full(wrapped))
    found = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(found) == set(expected)
    assert all(found[name].shape == expected[name].shape and worst(found[name], expected[name]) == 0 for name in expected)


# ---- prefixes where layers differ --------------------------------------------------------------------------------------


def gemma4() -> Any:
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")}
    config = transformers.Gemma4TextConfig(
        **sizes,
        num_hidden_layers=2,
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        sliding_window=32,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.Gemma4ForCausalLM(config).eval()


@pytest.mark.skipif(not hasattr(transformers, "Gemma4ForCausalLM"), reason="this transformers has no Gemma 4")
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_where_layers_differ_in_head_size(method: str, tmp_path: Path) -> None:
    kind = peft.PrefixTuningConfig if method == "prefix" else peft.PromptTuningConfig
    model = peft.get_peft_model(gemma4(), kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    step(model)
    expected = outputs(model)
    assert worst(expected[:, -IDS.shape[1] :], outputs(gemma4())) > 1e-4
    model.save_pretrained(tmp_path)
    assert worst(outputs(peft.PeftModel.from_pretrained(gemma4(), tmp_path)), expected) < 1e-5
    found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    longer = IDS
    for _ in range(3):
        longer = torch.cat([longer, outputs(model, longer, attention_mask=torch.ones_like(longer))[:, -1:].argmax(-1)], 1)
    assert found.tolist() == longer.tolist()


# ---- saved modules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", [None, "disabled"])
def test_a_saved_module_that_is_called_with_keywords_alone(switch: str | None) -> None:
    """The attention of Llama is called with keywords and returns a tuple."""
    model = peft.get_peft_model(llama(), lora(target_modules=["gate_proj"], modules_to_save=["self_attn"]))
    with model.disable_adapter() if switch else contextlib.nullcontext():
        assert worst(outputs(model), outputs(llama())) < 1e-6
    step(model)
    assert worst(outputs(model), outputs(llama())) > 1e-4


def test_rows_under_different_adapters_with_a_saved_module_that_is_called_with_keywords() -> None:
    """The peer splits linear layers, embeddings and convolutions alone; others raise a bare `TypeError` there."""
    fields = {"target_modules": ["gate_proj"], "modules_to_save": ["self_attn"], "task_type": "CAUSAL_LM"}
    model = randomise(peft.get_peft_model(llama(), peft.LoraConfig(**fields)))
    model.add_adapter("other", peft.LoraConfig(**fields))
    randomise(model, "other", seed=9)
    found = outputs(model, adapter_names=["default", "other"], use_cache=False)
    assert worst(found[:1], outputs(model, IDS[:1])) < 1e-5
    model.set_adapter("other")
    assert worst(found[1:], outputs(model, IDS[1:])) < 1e-5


def test_a_saved_embedding_that_is_called_with_a_keyword() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(input=self.words(input=ids))

    base = Reader().eval()
    expected = base(torch.tensor([[1, 2]]))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["head"], modules_to_save=["words"])).eval()
    assert worst(model(torch.tensor([[1, 2]])), expected) < 1e-6


# ---- tied targets ------------------------------------------------------------------------------------------------------


def test_both_tied_layers_show_their_own_factors() -> None:
    """`ensure_weight_tying`: the output layer has A and B of its own name, which are those of the embedding."""
    model = peft.get_peft_model(llama(tie_word_embeddings=True), lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True))
    head, words = model.get_base_model().lm_head, model.get_base_model().model.embed_tokens
    assert head.lora_A["default"].weight.shape == (4, 32)
    assert head.lora_B["default"].weight.shape == (64, 4)
    assert torch.equal(head.lora_A["default"].weight, words.lora_embedding_B["default"].T)
    assert torch.equal(head.lora_B["default"].weight, words.lora_embedding_A["default"].T)


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens", "lm_head"]])
def test_a_tied_output_layer_that_is_targeted_shows_its_factors(targets: list[str]) -> None:
    model = peft.get_peft_model(llama(tie_word_embeddings=True), lora(target_modules=targets))
    assert model.get_base_model().lm_head.lora_A["default"].weight.shape == (4, 32)


# ---- wrappers that others took off -------------------------------------------------------------------------------------


def strip(model: nn.Module) -> None:
    """Take adapter layers off as diffusers' `recurse_remove_peft_layers` does: replace what has a `base_layer`, and forget `peft_config`."""
    for path, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and "lora" not in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


@pytest.mark.parametrize("name", ["default", "default_0"])
def test_an_adapter_is_injected_again_after_others_took_its_layers_off(name: str) -> None:
    model, config = net(), peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    plain = model(rows())
    for _ in range(2):
        peft.inject_adapter_in_model(config, model, adapter_name=name)
        tensors = {key: torch.full_like(value, 0.1) for key, value in peft.get_peft_model_state_dict(model, adapter_name=name).items()}
        peft.set_peft_model_state_dict(model, tensors, adapter_name=name)
        assert worst(model(rows()), plain) > 1e-2
        strip(model)
        assert worst(model(rows()), plain) == 0


def test_another_adapter_is_injected_after_others_took_the_layers_off() -> None:
    model = net()
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["0", "2"]), model, adapter_name="first")
    strip(model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["2"]), model, adapter_name="second")
    assert list(model.peft_config) == ["second"]
    assert sorted(key for key in dict(model.named_parameters()) if "lora" in key) == ["2.lora_A.second.weight", "2.lora_B.second.weight"]


# ---- quantised bases under autocast ------------------------------------------------------------------------------------


def quantised(bits: int) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    for place in (0, 2):
        old = model[place]
        if bits == 4:
            new = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.bfloat16)
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = nn.Parameter(old.bias.data, requires_grad=False)
        model[place] = new.to("cpu")
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_dropout": 1e-6}], ids=["plain", "dora", "dropout"])
def test_a_quantised_base_under_autocast(fields: dict[str, Any], bits: int, training: bool, hidden: torch.dtype) -> None:
    """The plainest run of QLoRA: `bf16=True` without `prepare_model_for_kbit_training`."""
    model = peft.get_peft_model(quantised(bits), peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False, **fields))
    model.train(training)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(hidden)
    expected = model(x.float()).float()
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        found = model(x)
    assert worst(found, expected) < 0.15
    if training:
        found.float().sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_a_quantised_base_under_autocast(bits: int) -> None:
    model = peft.get_peft_model(quantised(bits), peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)).eval()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected, found = model(x), model(x, adapter_names=["default"] * 3)
    assert worst(found, expected) < 0.05
