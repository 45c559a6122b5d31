"""Functions that find the variants whose auxiliary losses are summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import nn

from peft_core import AdapterNotFoundError

from ..contracts import Variant
from ..layers.common import LoraLayer

V = TypeVar("V", bound=Variant)


def names_of(model: nn.Module, adapter_names: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return `adapter_names` as a tuple; None, which means the active adapters, stays None.

    Raises:
        AdapterNotFoundError: no LoRA layer of the model has an adapter of this name.
    """
    if adapter_names is None:
        return None
    names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
    known = dict.fromkeys(name for module in model.modules() if isinstance(module, LoraLayer) for name in module.adapters())
    for name in names:
        if name not in known:
            raise AdapterNotFoundError(f"Adapter {name!r} not found among the LoRA adapters {list(known)}", hint="adapter_names=None: those in use")
    return names


def layers_with(model: nn.Module, kind: type[V], names: tuple[str, ...] | None) -> Iterator[V]:
    """Yield the variants of type `kind` in all LoRA layers of a model, of the adapters `names`; None: of the active adapters."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.selection.current().used if names is None else names:
                variant = module.variants.get(name)
                if isinstance(variant, kind):
                    yield variant
