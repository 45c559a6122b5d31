"""Context managers for LoRA layers: change the scaling temporarily, or disable the cast of the inputs' dtype."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from peft_core import AdapterNotFoundError, ConfigError, disable_input_dtype_casting

from ..layers.common import LoraLayer

__all__ = ["disable_input_dtype_casting", "rescale_adapter_scale"]


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling of all LoRA adapters by `multiplier` inside the block, and restore it afterwards.

    Args:
        model: a model with LoRA adapters, or a submodule of such a model; a compiled model uses the new scalings if they are tensors
            (`prepare_model_for_compiled_hotswap`).
        multiplier: the factor; with 0 the adapters have no effect.

    Raises:
        TypeError: `multiplier` is no number.
        AdapterNotFoundError: the model has no LoRA layer.
        ConfigError: an adapter is merged, so that the merged base weight already includes its scaling.

    Example:
        >>> with rescale_adapter_scale(model, 0.5):
        ...     model(**batch)
    """
    if not isinstance(multiplier, numbers.Real) or isinstance(multiplier, bool):
        raise TypeError(f"multiplier={multiplier!r} is a {type(multiplier).__name__}; give a number")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise AdapterNotFoundError(f"{type(model).__name__} has no LoRA layers whose scale could be changed", hint="add an adapter first")
    merged = next((layer.merged_adapters for layer in layers if layer.merged), None)
    if merged:
        raise ConfigError(f"the adapters {merged} are merged: their scale is in the base weights", hint="unmerge_adapter() first")
    before: list[tuple[LoraLayer, str, Any]] = []
    try:
        for layer in layers:
            for adapter, scaling in layer.scaling.items():
                before.append((layer, adapter, scaling.clone() if isinstance(scaling, Tensor) else scaling))
                layer.set_scaling(adapter, scaling * float(multiplier))
        yield
    finally:
        for layer, adapter, scaling in before:
            if adapter in layer.scaling:
                layer.set_scaling(adapter, scaling)
