"""§6.3, §6.6, §6.7: tensors of adapters and of the base, and the status."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from page.making import (
    LAYERS,
    PROMPTS,
    SORTS,
    PeftModel,
    config,
    fresh,
    get_peft_model,
    inject_adapter_in_model,
    made,
    mixed,
    over,
    pair,
    parameters_of,
    refused,
    run,
    same,
    tiny,
    warned,
)
from peft_core import (
    TunerLayerStatus,
    TunerModelStatus,
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)


# ---- 6.3 get_peft_model_state_dict -----------------------------------------------------------------------------------
@over(*LAYERS, *PROMPTS)
def keys_are_those_of_a_file(kind: str, tmp_path: Path) -> None:
    model = pair(kind)
    tensors = get_peft_model_state_dict(model, adapter_name="b")
    model.save_pretrained(tmp_path)
    written = load_peft_weights(tmp_path / "b")
    assert tensors.keys() == written.keys()
    assert all(torch.equal(tensors[key].cpu(), written[key]) for key in tensors)
    assert not any("b" in key.split(".") for key in tensors)
    if kind in LAYERS:
        assert all(key.startswith("base_model.model.model.layers.") for key in tensors)
    else:
        assert "prompt_embeddings" in tensors


def tensors_can_be_given() -> None:
    model = fresh("lora")
    given = {key: torch.full_like(value, 3.0) for key, value in model.state_dict().items()}
    assert all((value == 3).all() for value in get_peft_model_state_dict(model, state_dict=given).values())


def compiled_models_are_unwrapped() -> None:
    model = fresh("lora")
    compiled: Any = torch.compile(model, backend="eager")
    assert get_peft_model_state_dict(compiled, unwrap_compiled=True).keys() == get_peft_model_state_dict(model).keys()


def injected_models_have_no_prefix() -> None:
    base = inject_adapter_in_model(config("lora"), tiny())
    keys = get_peft_model_state_dict(base)
    assert {f"base_model.model.{key}" for key in keys} == get_peft_model_state_dict(fresh("lora")).keys()


def unknown_adapters_are_key_errors() -> None:
    for kind in SORTS:
        with refused(KeyError, "nobody"):
            get_peft_model_state_dict(fresh(kind), adapter_name="nobody")


def _embedded(model: Any, choice: Any = "auto") -> set[str]:
    return {key for key in get_peft_model_state_dict(model, save_embedding_layers=choice) if "lora" not in key}


def targeted_embeddings_are_saved() -> None:
    for targets in (["embed_tokens", "q_proj"], r".*\.(embed_tokens|q_proj)"):
        model = fresh("lora", target_modules=targets)
        with warned("save_embedding_layers"):
            assert any(key.endswith("embed_tokens.base_layer.weight") for key in _embedded(model))
    model = fresh("lora", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1]})
    with warned(times=0):
        assert not any("base_layer" in key for key in _embedded(model))


def resized_vocabularies_are_saved(tmp_path: Path) -> None:
    for size, saved in ((64, False), (60, True)):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
        model = fresh("lora")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path)
        with warned("resized", times=int(saved)):
            found = _embedded(model)
        assert found == ({"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} if saved else set())


def embeddings_are_saved_if_asked() -> None:
    assert _embedded(fresh("lora"), True) == {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert _embedded(fresh("lora"), False) == set()
    plain = PeftModel(nn.Sequential(nn.Linear(2, 2)), config("lora", task_type=None, target_modules=["0"]))
    with warned("get_input_embeddings"):
        assert _embedded(plain, True) == set()


# ---- 6.6 status ------------------------------------------------------------------------------------------------------
def fields_of_layers_are_those_of_the_page() -> None:
    names = ["name", "module_type", "enabled", "active_adapters", "merged_adapters", "requires_grad", "available_adapters", "devices"]
    assert [field.name for field in dataclasses.fields(TunerLayerStatus)] == [*names, "quantization_backend"]
    model = pair("lora", "lora", "t5")
    first = model.get_layer_status()[0]
    assert isinstance(first, TunerLayerStatus)
    assert first.name == "model.encoder.block.0.layer.0.SelfAttention.q"
    assert dataclasses.asdict(first) == {
        "name": first.name,
        "module_type": "lora.Linear",
        "enabled": True,
        "active_adapters": ["a"],
        "merged_adapters": [],
        "requires_grad": {"a": True, "b": False},
        "available_adapters": ["a", "b"],
        "devices": {"a": ["cpu"], "b": ["cpu"]},
        "quantization_backend": None,
    }


def types_of_layers_are_named() -> None:
    assert {layer.module_type for layer in fresh("loha").get_layer_status()} == {"loha.Linear"}
    assert {layer.module_type for layer in fresh("lora", modules_to_save=["lm_head"]).get_layer_status()} == {"lora.Linear", "ModulesToSaveWrapper"}


def irregular_flags_are_told() -> None:
    model = fresh("lora")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.requires_grad = False
    own = next(status for status in model.get_layer_status() if status.name.endswith("layers.0.self_attn.q_proj"))
    assert own.requires_grad == {"default": "irregular"}
    assert model.get_model_status().requires_grad == {"default": "irregular"}


def fields_of_models_are_those_of_the_page() -> None:
    names = ["base_model_type", "adapter_model_type", "peft_types", "trainable_params", "total_params", "num_adapter_layers", "enabled"]
    names += ["active_adapters", "merged_adapters", "requires_grad", "available_adapters", "devices", "quantization_backend"]
    assert [field.name for field in dataclasses.fields(TunerModelStatus)] == names
    model = pair("lora")
    trainable, total = model.get_nb_trainable_parameters()
    assert dataclasses.asdict(model.get_model_status()) == {
        "base_model_type": "LlamaForCausalLM",
        "adapter_model_type": "LoraModel",
        "peft_types": {"a": "LORA", "b": "LORA"},
        "trainable_params": trainable,
        "total_params": total,
        "num_adapter_layers": 4,
        "enabled": True,
        "active_adapters": ["a"],
        "merged_adapters": [],
        "requires_grad": {"a": True, "b": False},
        "available_adapters": ["a", "b"],
        "devices": {"a": ["cpu"], "b": ["cpu"]},
        "quantization_backend": None,
    }
    assert fresh("loha").get_model_status().adapter_model_type == "LoHaModel"


def injected_models_have_a_status() -> None:
    base = inject_adapter_in_model(config("lora"), tiny(), "mine")
    status = get_model_status(base)
    assert (status.adapter_model_type, status.peft_types, status.base_model_type) == ("None", {}, "LlamaForCausalLM")
    assert status.available_adapters == ["mine"]
    assert get_layer_status(base)[0].name == "model.layers.0.self_attn.q_proj"


def irregular_models_are_told() -> None:
    model = pair("lora")
    layers = model.get_base_model().model.layers
    layers[0].self_attn.q_proj.enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    layers[0].self_attn.q_proj.enable_adapters(True)
    assert model.get_model_status().enabled is True
    layers[0].self_attn.q_proj.set_adapter("b")
    assert model.get_model_status().active_adapters == "irregular"
    model.set_adapter("a")
    assert model.get_model_status().active_adapters == ["a"]
    layers[0].self_attn.q_proj.merge()
    assert model.get_model_status().merged_adapters == "irregular"
    layers[0].self_attn.q_proj.unmerge()
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["a"]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


@over(*PROMPTS)
def prompts_have_a_status(kind: str) -> None:
    status = pair(kind).get_model_status()
    assert status.peft_types == dict.fromkeys("ab", status.peft_types["a"])
    assert (status.active_adapters, status.requires_grad, status.enabled) == (["a"], {"a": True, "b": False}, True)
    assert status.num_adapter_layers > 0


def mixed_models_have_a_status() -> None:
    assert mixed("lora", "prefix").get_model_status().available_adapters == ["lora", "prefix"]


def models_without_adapters_have_none() -> None:
    for status in (get_layer_status, get_model_status):
        with refused(ValueError, "No adapter layers found"):
            status(tiny())


# ---- 6.7 loading helpers ---------------------------------------------------------------------------------------------
@over(*LAYERS, *PROMPTS)
def it_is_the_inverse(kind: str) -> None:
    model, other = made(kind), fresh(kind).eval()
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert tuple(result) == ([], [])
    assert same(run(other, kind=kind), run(model, kind=kind))


def missing_and_unexpected_keys_are_returned() -> None:
    model = fresh("lora")
    tensors = get_peft_model_state_dict(model)
    key = next(iter(tensors))
    result = set_peft_model_state_dict(model, {name: value for name, value in tensors.items() if name != key} | {"surplus": torch.ones(1)})
    assert len(result.missing_keys) == 1
    assert result.unexpected_keys == ["surplus"]


def injected_models_take_keys_with_a_prefix_or_without() -> None:
    tensors = get_peft_model_state_dict(made("lora"))
    for given in (tensors, {key.removeprefix("base_model.model."): value for key, value in tensors.items()}):
        base = inject_adapter_in_model(config("lora"), tiny())
        result = set_peft_model_state_dict(base, given)
        assert result.unexpected_keys == []
        assert same(run(base), run(made("lora")))


def meta_weights_are_assigned() -> None:
    model = get_peft_model(tiny(), config("lora"), low_cpu_mem_usage=True)
    set_peft_model_state_dict(model, get_peft_model_state_dict(made("lora")), low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in parameters_of(model, "default").values()} == {"cpu"}
    assert same(run(model), run(made("lora")))


def other_shapes_are_dropped_if_asked() -> None:
    tensors = get_peft_model_state_dict(fresh("lora", r=3))
    model = made("lora")
    before = run(model)
    with refused(RuntimeError, "size mismatch"):
        set_peft_model_state_dict(model, tensors)
    with warned("shapes"):
        set_peft_model_state_dict(model, tensors, ignore_mismatched_sizes=True)
    assert torch.equal(run(model), before)


def both_kinds_of_files_are_read(tmp_path: Path) -> None:
    model = made("lora")
    tensors = get_peft_model_state_dict(model)
    for safe in (True, False):
        model.save_pretrained(tmp_path / str(safe) / "sub", safe_serialization=safe)
        found = load_peft_weights(tmp_path / str(safe), subfolder="sub")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in found)
    renamed = load_peft_weights(tmp_path / "True" / "sub", "cpu", {r"^model\.layers": "model.stack"})
    assert all(key.startswith("base_model.model.model.stack") for key in renamed)
    with refused(ValueError, "adapter_model"):
        load_peft_weights(tmp_path)


def pickles_can_not_run_code(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.write_text, (tmp_path / "ran", "x"))

    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"a": Evil()}))
    with refused(ValueError):
        load_peft_weights(tmp_path)
    assert not (tmp_path / "ran").exists()


def tensors_of_the_base_have_their_own_names() -> None:
    for kind in SORTS:
        model = made(kind, "bert-seq-cls")
        plain = tiny("bert-seq-cls").state_dict()
        found = get_base_model_state_dict(model)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[key], plain[key]) for key in plain)


def tensors_of_the_base_can_be_set() -> None:
    for kind in SORTS:
        model = made(kind)
        other = tiny(seed=1)
        assert tuple(set_base_model_state_dict(model, other.state_dict())) == ([], [])
        with model.disable_adapter():
            assert torch.equal(run(model), run(other))
        some = dict(list(other.state_dict().items())[1:])
        with refused(RuntimeError, "embed_tokens"):
            set_base_model_state_dict(model, some)
        assert len(set_base_model_state_dict(model, some, strict=False).missing_keys) == 1
