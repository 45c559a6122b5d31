"""Upstream's dispatch functions, which create the LoRA layer around a module, and dequantisation of packed weights."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from peft_core import AdapterSelection
from peft_core.errors import UnsupportedModuleError
from peft_lora.backends.plugin import peft_make_layer
from peft_lora.tools.kinds import dequantize_module_weight

from . import _layers


def dispatch_default(target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any) -> nn.Module | None:
    """Return a LoRA layer with one adapter that wraps a torch layer which is not quantised; None for other modules.

    Args:
        target: the module to wrap.
        adapter_name: the name of the adapter.
        config: the config of the adapter.
        parameter_name: the name of a parameter of `target` that is adapted instead of the whole module.
        **kwargs: `r` and `lora_alpha`, if they differ from those in the config.
    """
    given = {"config": config, "r": kwargs.get("r", config.r), "lora_alpha": kwargs.get("lora_alpha", config.lora_alpha)}
    if parameter_name is not None:
        made: nn.Module = _layers.ParamWrapper(target, adapter_name, parameter_name, **given)
        return made
    for kind in (_layers.Linear, _layers.Embedding, _layers.Conv2d, _layers.MultiheadAttention):
        if kind.of_ours.accepts(target) and peft_make_layer("LORA", target, AdapterSelection()) is None:
            found: nn.Module = kind(target, adapter_name, **given)
            return found
    return None


def dispatch_bnb_4bit(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """Return a LoRA layer with one adapter that wraps a 4-bit Linear of bitsandbytes; None for other modules.

    Args:
        target, adapter_name, config: the same as in `dispatch_default`.
        **kwargs: ``loaded_in_4bit=True`` (without it, the function returns None); `r` and `lora_alpha`, if they differ from those in the config.
    """
    return _of_bitsandbytes(target, adapter_name, config, "Linear4bit", kwargs) if kwargs.get("loaded_in_4bit") else None


def dispatch_bnb_8bit(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """Return a LoRA layer with one adapter that wraps an 8-bit Linear of bitsandbytes; None for other modules.

    Args:
        target, adapter_name, config: the same as in `dispatch_default`.
        **kwargs: ``loaded_in_8bit=True`` (without it, the function returns None); `r` and `lora_alpha`, if they differ from those in the config.
    """
    return _of_bitsandbytes(target, adapter_name, config, "Linear8bitLt", kwargs) if kwargs.get("loaded_in_8bit") else None


def _of_bitsandbytes(target: nn.Module, adapter_name: str, config: Any, name: str, kwargs: dict[str, Any]) -> nn.Module | None:
    if type(target).__name__ != name:
        return None
    layer: Any = peft_make_layer("LORA", target, AdapterSelection())
    if layer is None:
        return None
    _layers._Made.update_layer(layer, adapter_name, kwargs.get("r", config.r), kwargs.get("lora_alpha", config.lora_alpha), config)
    return layer  # type: ignore[no-any-return]


def dequantize_bnb_weight(weight: nn.Parameter, state: Any = None) -> Tensor:
    """Return a bitsandbytes weight dequantised, with the shape (out, in); any other weight is returned unchanged.

    Args:
        weight: a weight (out, in), or a packed 4-bit weight.
        state: for an 8-bit weight, the state of its Linear, which holds the scales (`SCB`).

    Raises:
        UnsupportedModuleError: the scales of an 8-bit weight are neither in `state` nor in the weight.
    """
    kind = type(weight).__name__
    if kind == "Params4bit":
        library: Any = importlib.import_module("bitsandbytes")
        found: Tensor = library.functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
        return found
    if kind != "Int8Params":
        return weight
    scales = next((value for value in (getattr(state, "SCB", None), getattr(weight, "SCB", None)) if value is not None), None)
    if scales is None:
        raise UnsupportedModuleError("an 8-bit weight without its scales", hint="give the state of its Linear")
    numbers: Tensor = weight.data * scales.to(weight.device).view(-1, 1) / 127
    return numbers


__all__ = ["dequantize_bnb_weight", "dequantize_module_weight", "dispatch_bnb_4bit", "dispatch_bnb_8bit", "dispatch_default"]
