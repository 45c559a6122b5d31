"""What a merge adds to a weight, as objects and not closures, so that a merged model can be copied and pickled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import MergeError, listed
from .merging import merges_of

if TYPE_CHECKING:
    from .adapter_layer import AdapterLayer


def refuse_wrong_order(layer: AdapterLayer, adapters: Sequence[str]) -> None:
    """Check that folding adapters into a weight gives what the layers around it compute.

    A factor acts on what is inside it. Folded in while something inside is still applied beside the weight, it misses that; and what is
    folded in under a factor that is in the weight already is not multiplied by it.

    Args:
        layer: where adapters are about to be merged.
        adapters: all that the caller merges, here and in the layers inside.

    Raises:
        MergeError: the order is wrong; nothing has changed.
    """
    from .adapter_layer import AdapterLayer

    if not any(name in layer.scaling and name not in layer.merged_adapters for name in adapters):
        return
    pending: list[str] = []
    known = set(map(id, layer.merges))
    inner = layer._modules["base_layer"]
    while isinstance(inner, AdapterLayer):
        settled = {*adapters, *inner.merged_adapters}
        pending += [name for name in inner.activation.names if name in inner.scaling and name not in settled]
        known.update(map(id, inner.merges))
        inner = inner._modules["base_layer"]
    if pending and not layer.additive:
        raise MergeError(
            f"{type(layer).__name__} multiplies what is inside it, and there {listed(dict.fromkeys(pending))} would stay unmerged",
            hint="merge them in the same call",
        )
    above = [name for merge in merges_of(layer.get_base_layer()) if id(merge) not in known and not merge.additive for name in merge.adapters]
    if above:
        raise MergeError(
            f"{listed(above)} multiply this weight and are merged already, so that {listed(adapters)} inside would not be multiplied",
            hint="unmerge first, then merge all in one call",
        )


class WeightChange:
    """W' − W of effects that are no sum."""

    def __init__(self, layer: AdapterLayer, adapters: Sequence[str]) -> None:
        self.layer, self.adapters = layer, tuple(adapters)

    def __call__(self) -> Tensor:
        weight = self.layer.weight.detach()
        after = weight
        for adapter in self.adapters:
            after = self.layer.merged_weight(adapter, after)
        return after - weight


class MergedDelta:
    """Σ Δ of adapters as they were when merged: copies of their few parameters, multiplied out again when taken out."""

    def __init__(self, layer: AdapterLayer, adapters: Sequence[str]) -> None:
        self.layer = layer
        # clones are aligned as the allocator aligns, so that the same product is rounded the same way later
        self.kept = {
            adapter: (layer.scaling[adapter], {(key, name): getattr(module, name).detach().clone() for key, module, name in layer.holders(adapter)})
            for adapter in adapters
        }

    def __call__(self) -> Tensor:
        total: Tensor | None = None
        for adapter, (scaling, values) in self.kept.items():
            delta = self._delta(adapter, scaling, values)
            total = delta if total is None else total + delta
        assert total is not None
        return self.layer.ops.stored(total)

    def _delta(self, adapter: str, scaling: float, values: dict[tuple[str, str], Tensor]) -> Tensor:
        layer = self.layer
        present = [(module._parameters if name in module._parameters else module._buffers, name, key) for key, module, name in layer.holders(adapter)]
        before = [store[name] for store, name, _ in present]
        scaling_before = layer.scaling[adapter]
        try:
            layer.scaling[adapter] = scaling
            for store, name, key in present:
                store[name] = values[key, name].to(layer.weight.device)  # type: ignore[assignment]
            with torch.no_grad():
                return layer.delta_weight(adapter)
        finally:
            layer.scaling[adapter] = scaling_before
            for (store, name, _), tensor in zip(present, before, strict=True):
                store[name] = tensor  # type: ignore[assignment]
