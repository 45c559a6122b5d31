"""Context managers for LoRA's layers: another scale, another dtype of inputs, norms of DoRA computed each time."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator
from contextvars import ContextVar, Token
from typing import Any

from torch import Tensor, nn

from peft_core import AdapterNotFoundError, ConfigError, disable_input_dtype_casting

from .layers.common import LoraLayer

__all__ = ["DoraCaching", "disable_input_dtype_casting", "rescale_adapter_scale"]

#: whether DoRA's f = m / ‖W + s·B·A‖ is computed once in a cache scope
_CACHING: ContextVar[bool] = ContextVar("dora_caching", default=True)


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside the block, all LoRA adapters act with `multiplier` times their scaling.

    Args:
        model: a model with LoRA adapters, or a part of one; compiled models follow if their scalings are tensors
            (`prepare_model_for_compiled_hotswap`).
        multiplier: 0: as without adapters.

    Raises:
        TypeError: `multiplier` is no number.
        AdapterNotFoundError: there is no LoRA layer.
        ConfigError: an adapter is merged: its scale is in the base weight.

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


class DoraCaching:
    """Inside the block, an open cache scope (`peft_core.cached`, `generate`) holds DoRA's factors, or, with ``enabled=False``, does not.

    It does anyway; outside of a scope they are computed in each call. Holds for the current thread.

    Args:
        enabled: keep them.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = bool(enabled)
        self._tokens: list[Token[bool]] = []

    def __enter__(self) -> DoraCaching:
        self._tokens.append(_CACHING.set(self.enabled))
        return self

    def __exit__(self, *error: object) -> None:
        _CACHING.reset(self._tokens.pop())


def caches_dora() -> bool:
    """Return whether a cache scope may hold DoRA's factors."""
    return _CACHING.get()
