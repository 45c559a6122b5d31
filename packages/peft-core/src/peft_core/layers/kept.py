"""The merged weight of a small layer, kept in evaluation: beside it, the adapter's few small kernels would cost more than the layer itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MergeError
from .fingerprint import Watch
from .folded import home_of

if TYPE_CHECKING:
    from .adapter_layer import AdapterLayer


class KeptWeight:
    """W' of one adapter and the bias with it, and whether everything behind them is still the same (`Watch` says what is looked at).

    Args:
        layer: a layer with a plain Linear as its base.
        adapter: the only one that acts.
    """

    __slots__ = ("adapter", "bias", "homes", "scaling", "watch", "weight")

    def __init__(self, layer: AdapterLayer, adapter: str) -> None:
        base: Any = layer.get_base_layer()
        self.adapter, self.scaling = adapter, float(layer.scaling[adapter])  # a number: hot-swapping fills a tensor in place
        self.homes = [(home_of(module, name), name) for _, module, name in layer.holders(adapter)]
        self.homes += [(base._parameters, name) for name in ("weight", "bias") if base._parameters[name] is not None]
        self.watch = Watch(*(home[name] for home, name in self.homes))
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        with torch.inference_mode(False), torch.no_grad():
            try:
                change, bias = layer.change_of((adapter,)), layer.merged_bias(adapter, base._parameters["bias"])
                weight = change.apply(base.weight.detach())
            except MergeError:  # an effect that is no change of the weight: the layer goes its usual way
                return
            self.weight, self.bias = weight.to(base.weight.dtype), None if bias is None else bias.detach()

    def __deepcopy__(self, memo: Any) -> None:
        return None  # copies of a layer form their own

    def __reduce__(self) -> Any:
        return type(None), ()

    def holds(self) -> bool:
        """Return whether it is still W'."""
        return self.watch.holds([home[name] for home, name in self.homes])


#: of so many adapters, those that were used last, a layer keeps the weight
KEEP = 4


def kept_weight(layer: AdapterLayer, x: Tensor) -> KeptWeight | None:
    """Return the kept weight with which the layer computes its output for `x`; None: it goes its usual way.

    It is formed at the first call, so that equal calls give equal bits.
    """
    route = getattr(layer.activation.local, "route", None)
    if route is None:
        route = layer.activation.default
    if route.per_row is not None or layer.merges or x.dtype is not torch.float32 or torch.is_autocast_enabled(x.device.type):
        return None
    names = route.names
    if len(names) != 1:
        names = tuple(name for name in names if name in layer.scaling)
        if len(names) != 1:
            return None
    adapter = names[0]
    kept = layer.kept_weights.get(adapter)
    if kept is None or layer.scaling[adapter] != kept.scaling or not kept.holds():
        if adapter not in layer.scaling or any(p.dtype is not torch.float32 for p in layer.parameters_of(adapter).values()):
            return None
        kept = KeptWeight(layer, adapter)
        others = [item for item in layer.kept_weights.items() if item[0] != adapter][1 - KEEP :]
        layer.kept_weights = dict([*others, (adapter, kept)])  # another thread goes on with the old ones
    return None if kept.weight is None else kept
