"""§6.1, §6.2, §6.4, §6.5: making adapted models, and preparing a base."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from page.making import (
    IDS,
    LAYERS,
    PROMPTS,
    SORTS,
    TASKS,
    PeftModel,
    config,
    fresh,
    get_peft_config,
    get_peft_model,
    inject_adapter_in_model,
    inputs,
    made,
    over,
    parameters_of,
    refused,
    run,
    same,
    tiny,
    trains,
    warned,
)
from peft_core import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftMixedModel,
    cast_mixed_precision_params,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
)


# ---- 6.1 get_peft_model ----------------------------------------------------------------------------------------------
def _named(name: str) -> Any:
    base = tiny()
    base.name_or_path = base.config._name_or_path = name
    return base


@over(*SORTS)
def name_of_the_base_is_stored(kind: str) -> None:
    own = config(kind)
    with warned(times=0):
        get_peft_model(_named("somebody/base"), own)
    assert own.base_model_name_or_path == "somebody/base"
    with warned("somebody/base.*other/base"):
        get_peft_model(_named("other/base"), own)
    assert own.base_model_name_or_path == "other/base"


def revision_is_stored() -> None:
    own = config("lora")
    get_peft_model(tiny(), own, revision="v1")
    assert own.revision == "v1"
    with warned("v1.*v2"):
        get_peft_model(tiny(), own, revision="v2")
    assert own.revision == "v2"
    assert fresh("lora").peft_config["default"].revision is None


def class_is_chosen_by_the_task() -> None:
    for base, task in TASKS.items():
        assert type(fresh("lora", base)) is MODEL_TYPE_TO_PEFT_MODEL_MAPPING[str(task)]
    assert type(fresh("lora", task_type=None)) is PeftModel
    assert type(get_peft_model(tiny(), config("lora"), mixed=True)) is PeftMixedModel


def prompts_get_their_dimensions() -> None:
    own = config("prefix")
    get_peft_model(tiny(), own)
    assert (own.num_layers, own.token_dim, own.num_attention_heads) == (2, 16, 2)


def a_second_call_is_warned_of() -> None:
    base = tiny()
    get_peft_model(base, config("lora"), "a")
    with warned("already has adapters"):
        model = get_peft_model(base, config("lora"), "b")
    assert list(model.peft_config) == ["a", "b"]


def eva_without_low_memory_is_warned_of() -> None:
    from peft_lora import EvaConfig

    own: dict[str, Any] = {"init_lora_weights": "eva", "eva_config": EvaConfig()}
    with warned("low_cpu_mem_usage"):
        get_peft_model(tiny(), config("lora", **own))
    with warned(times=0):
        get_peft_model(tiny(), config("lora", **own), low_cpu_mem_usage=True)


def it_is_modified_in_place() -> None:
    base = tiny()
    model = get_peft_model(base, config("lora"), "mine", autocast_adapter_dtype=False)
    assert model.get_base_model() is base
    assert list(model.peft_config) == ["mine"]


# ---- 6.2 inject_adapter_in_model -------------------------------------------------------------------------------------
@over(*LAYERS)
def the_same_model_is_returned(kind: str) -> None:
    base = tiny()
    own = config(kind, init_weights=False) if kind == "loha" else config(kind, init_lora_weights=False)
    assert inject_adapter_in_model(own, base) is base
    assert base.peft_config == {"default": own}
    assert not same(run(base), run(tiny()))
    assert _trains_plainly(base)


def _trains_plainly(base: nn.Module) -> bool:
    """Return whether exactly the injected weights train."""
    return all(parameter.requires_grad is ("default" in name.split(".")) for name, parameter in base.named_parameters())


@over(*PROMPTS)
def prompts_can_not_be_injected(kind: str) -> None:
    base = tiny()
    with refused(ValueError, "inject"):
        inject_adapter_in_model(config(kind), base)
    assert not hasattr(base, "peft_config")


@over(*LAYERS)
def keys_of_a_state_dict_choose_modules(kind: str) -> None:
    model = made(kind, target_modules=["q_proj", "gate_proj"])
    tensors = get_peft_model_state_dict(model)
    some = {key.removeprefix("base_model.model."): torch.zeros(0) for key in tensors if "layers.0" in key}
    base = tiny()
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        inject_adapter_in_model(config(kind, target_modules=["q_proj"]), base, state_dict=some)
    chosen = {name.rpartition(".")[0] for name, module in base.named_modules() if name.endswith("base_layer")}
    assert chosen == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"}


def agreeing_state_dicts_do_not_warn() -> None:
    tensors = get_peft_model_state_dict(made("lora"))
    with warned(times=0):
        inject_adapter_in_model(config("lora"), tiny(), state_dict=tensors)


def target_parameters_exclude_a_state_dict() -> None:
    own = config("lora", target_modules=[], target_parameters=["q_proj.weight"])
    with refused(ValueError, "target_parameters"):
        inject_adapter_in_model(own, tiny(), state_dict=get_peft_model_state_dict(made("lora")))


def it_can_be_called_again() -> None:
    base = tiny()
    for name in ("a", "b"):
        inject_adapter_in_model(config("lora"), base, name)
    assert list(base.peft_config) == ["a", "b"]
    assert {p.device.type for n, p in _injected(low_cpu_mem_usage=True).named_parameters() if "lora_" in n} == {"meta"}


def _injected(**options: Any) -> Any:
    return inject_adapter_in_model(config("lora"), tiny(), **options)


# ---- 6.4 prepare_model_for_kbit_training -----------------------------------------------------------------------------
def everything_is_frozen_and_cast() -> None:
    base: Any = tiny().to(torch.float16)
    returned = prepare_model_for_kbit_training(base)
    assert id(returned) == id(base)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    assert not base.get_input_embeddings()(IDS).requires_grad


def some_methods_of_quantising_are_not_cast() -> None:
    for method in ("gptq", "aqlm", "eetq", "hqq", "torchao"):
        base = tiny().bfloat16()
        base.quantization_method = method
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        assert {parameter.dtype for parameter in base.parameters()} == {torch.bfloat16}


def four_bit_weights_are_not_cast() -> None:
    class Params4bit(nn.Parameter):
        """What bitsandbytes calls its packed weights."""

    base = tiny().bfloat16()
    base.lm_head.weight = Params4bit(base.lm_head.weight.data)
    prepare_model_for_kbit_training(base)
    assert base.lm_head.weight.dtype == torch.bfloat16
    assert base.model.norm.weight.dtype == torch.float32


def _quantised(**how: Any) -> tuple[Any, list[Any]]:
    base: Any = tiny()
    calls: list[Any] = []
    base.is_loaded_in_4bit = True

    def enable(self: Any, gradient_checkpointing_kwargs: Any = None) -> None:
        calls.append(gradient_checkpointing_kwargs)

    base.gradient_checkpointing_enable = MethodType(enable, base)
    prepare_model_for_kbit_training(base, **how)
    return base, calls


def quantised_bases_are_checkpointed() -> None:
    base, calls = _quantised()
    assert calls == [None]
    assert base.get_input_embeddings()(IDS).requires_grad
    base, calls = _quantised(use_gradient_checkpointing=False)
    assert calls == []
    assert not base.get_input_embeddings()(IDS).requires_grad


def without_reentrance_inputs_need_no_gradients() -> None:
    base, calls = _quantised(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert calls == [{"use_reentrant": False}]
    assert not base.get_input_embeddings()(IDS).requires_grad


def methods_that_take_no_options_are_warned_of() -> None:
    base = tiny()
    base.is_loaded_in_8bit = True
    base.gradient_checkpointing_enable = MethodType(lambda self: None, base)
    with warned("gradient_checkpointing_kwargs"):
        prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": True})
    with warned(times=0):
        prepare_model_for_kbit_training(base)


def it_trains_afterwards() -> None:
    base: Any = prepare_model_for_kbit_training(tiny().bfloat16())
    model = get_peft_model(base, config("lora"))
    model(**inputs(), labels=IDS).loss.backward()
    assert trains(model, "default")
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters_of(model, "default").values())


# ---- 6.5 cast_mixed_precision_params ---------------------------------------------------------------------------------
@over(*SORTS)
def what_trains_is_float32_and_the_rest_is_not(kind: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = fresh(kind)
        cast_mixed_precision_params(model, dtype)
        assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
        assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {dtype}


# ---- get_peft_config -------------------------------------------------------------------------------------------------
@over(*LAYERS, *PROMPTS)
def class_is_picked_by_the_type(kind: str) -> None:
    own = config(kind)
    again = get_peft_config(own.to_dict())
    assert type(again) is type(own)
    assert again.to_dict() == own.to_dict()
