"""The merged weight of a small layer, kept in evaluation: beside it, the adapter's few small kernels would cost more than the layer itself."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MergeError
from .folded import home_of

if TYPE_CHECKING:
    from .adapter_layer import AdapterLayer


class KeptWeight:
    """W' of one adapter and the bias with it, and whether everything behind them is still the same (`Watch` says what is looked at).

    All tensors are asked in one go: a decode step visits each layer with cold caches, and every object on the way costs.

    Args:
        layer: a layer with a plain Linear as its base.
        adapter: the only one that acts.
    """

    __slots__ = ("adapter", "bias", "homes", "places", "scaling", "versions", "was", "weight", "words")

    def __init__(self, layer: AdapterLayer, adapter: str) -> None:
        base: Any = layer.get_base_layer()
        self.adapter, self.scaling = adapter, float(layer.scaling[adapter])  # a number: hot-swapping fills a tensor in place
        self.homes = [(home_of(module, name), name) for _, module, name in layer.holders(adapter)]
        self.homes += [(base._parameters, name) for name in ("weight", "bias") if base._parameters[name] is not None]
        tensors = [home[name] for home, name in self.homes]
        # of tensors made in inference mode nothing can be known
        self.versions = -1 if any(t.is_inference() for t in tensors) else sum(t._version for t in tensors)
        self.places = sum(t.data_ptr() for t in tensors)
        self.words = [ctypes.c_uint32.from_address(t.data_ptr()) for t in tensors if t.device.type == "cpu" and t.nbytes >= 4]
        self.was = sum(word.value for word in self.words)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        with torch.inference_mode(False), torch.no_grad():
            try:
                change, bias = layer.change_of((adapter,)), layer.merged_bias(adapter, base._parameters["bias"])
                weight = change.apply(base.weight.detach())
            except MergeError:  # an effect that is no change of the weight: the layer goes its usual way
                return
            self.weight, self.bias = weight.to(base.weight.dtype), None if bias is None else bias.detach()

    def __reduce__(self) -> Any:
        return type(None), ()  # copies of a layer form their own

    def holds(self) -> bool:
        """Return whether it is still W'."""
        versions = places = total = 0
        for home, name in self.homes:
            tensor = home[name]
            places += tensor.data_ptr()
            versions += tensor._version
        if places != self.places or versions != self.versions:
            return False
        for word in self.words:
            total += word.value
        return total == self.was


def kept_weight(layer: AdapterLayer, x: Tensor) -> KeptWeight | None:
    """Return the kept weight with which the layer computes its output for `x`; None: it goes its usual way.

    It is formed at the first call, so that equal calls give equal bits.
    """
    route = getattr(layer.activation.local, "route", None)
    if route is None:
        route = layer.activation.default
    if layer.merges or route.per_row is not None or x.dtype is not torch.float32 or torch.is_autocast_enabled(x.device.type):
        return None
    kept: KeptWeight | None = layer.kept_now
    names = route.names
    if kept is None or len(names) != 1 or kept.adapter != names[0]:
        here = [name for name in names if name in layer.scaling]
        if len(here) != 1 or any(parameter.dtype is not torch.float32 for parameter in layer.parameters_of(here[0]).values()):
            return None
        if kept is None or kept.adapter != here[0]:
            kept = layer.kept_now = KeptWeight(layer, here[0])
    if layer.scaling[kept.adapter] != kept.scaling or not kept.holds():
        kept = layer.kept_now = KeptWeight(layer, kept.adapter)
    return None if kept.weight is None else kept
