"""Classes that describe how a merge changes a weight. They are objects, not closures, so that a merged model can be copied and pickled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.ops import BaseOps


class ChangedLayer(Protocol):
    """The interface that the classes of this module need of the layer whose adapters are merged; see `AdapterLayer`."""

    scaling: dict[str, float]
    ops: BaseOps

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer, in the layout in which the base layer stores it."""
        ...

    def holders(self, adapter: str) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the file key, module, attribute) for each tensor of an adapter."""
        ...

    def delta_weight(self, adapter: str) -> Tensor:
        """Return scaling · ΔW (out, in)."""
        ...

    def weight_factor(self, adapter: str) -> Tensor | None:
        """Return the factor by which W + ΔW is multiplied elementwise; None: there is no factor."""
        ...

    def merged_weight(self, adapter: str, weight: Tensor) -> Tensor:
        """Return the weight with the adapter merged."""
        ...

    def merged_bias(self, adapter: str, bias: Tensor | None) -> Tensor | None:
        """Return the bias with the adapter merged."""
        ...


class WeightChange:
    """W → W' for effects that compute the whole merged weight (`merged_weight`). It has no inverse: unmerging needs a copy of W."""

    additive = False
    invertible = False

    def __init__(self, layer: ChangedLayer, adapters: Sequence[str]) -> None:
        self.layer, self.adapters = layer, tuple(adapters)

    def apply(self, weight: Tensor) -> Tensor:
        """Return the weight with all adapters merged, in the widest of the dtypes involved."""
        for adapter in self.adapters:
            weight = self.layer.merged_weight(adapter, weight)
        return weight

    def invert(self, weight: Tensor) -> Tensor:
        """Return `weight` unchanged: this change has no inverse."""
        return weight


class BiasChange:
    """b → b', computed by `merged_bias` for one adapter after the other. Unmerging restores a copy of b, which is small."""

    additive = True
    invertible = False

    def __init__(self, layer: ChangedLayer, adapters: Sequence[str]) -> None:
        self.layer, self.adapters = layer, tuple(adapters)

    def apply(self, weight: Tensor) -> Tensor:
        """Return the bias with all adapters merged."""
        for adapter in self.adapters:
            changed = self.layer.merged_bias(adapter, weight)
            assert changed is not None
            weight = changed
        return weight

    def invert(self, weight: Tensor) -> Tensor:
        """Return `weight` unchanged: this change has no inverse."""
        return weight


class Product:
    """s·B·A, which is multiplied when it is called: the small factors are stored instead of a matrix as large as the weight.

    Args:
        a: A, (r, in).
        b: B, (out, r).
        scaling: the factor s.
    """

    def __init__(self, a: Tensor, b: Tensor, scaling: float) -> None:
        # a clone has the allocator's memory alignment, so that the same product is rounded in the same way later
        self.a, self.b, self.scaling = a.detach().clone(), b.detach().clone(), scaling

    def __call__(self, device: torch.device) -> Tensor:
        """Return s·B·A, (out, in), on `device`."""
        return self.b.to(device) @ self.a.to(device) * self.scaling


class Subtraction:
    """W → W − Δ with a fixed Δ (out, in).

    Args:
        delta: Δ, or its factors.
        ops: converts Δ to the layout of the weight.
    """

    additive = True
    invertible = True

    def __init__(self, delta: Tensor | Product, ops: BaseOps) -> None:
        self.delta, self.ops = delta.detach() if isinstance(delta, Tensor) else delta, ops

    def matrix(self, device: torch.device) -> Tensor:
        """Return Δ (out, in) on `device`."""
        return self.delta.to(device) if isinstance(self.delta, Tensor) else self.delta(device)

    def apply(self, weight: Tensor) -> Tensor:
        """Return `weight` − Δ; `weight` has the layout of the base layer."""
        return _sum(weight, -self.ops.to_weight_layout(self.matrix(weight.device)))

    def invert(self, weight: Tensor) -> Tensor:
        """Return `weight` + Δ; `weight` has the layout of the base layer."""
        return _sum(weight, self.ops.to_weight_layout(self.matrix(weight.device)))


class AffineChange:
    """W → factor ⊙ (W + Δ), for one adapter after the other, and its inverse. Most methods are of this kind; additive ones have no factor.

    Copies of the adapters' parameters at the time of the merge are stored (they are small); unmerging computes Δ from these copies again.
    """

    invertible = True

    def __init__(self, layer: ChangedLayer, adapters: Sequence[str]) -> None:
        self.layer = layer
        # a clone has the allocator's memory alignment, so that the same product is rounded in the same way later
        self.kept = {
            adapter: (
                _fixed(layer.scaling[adapter]),
                {(key, name): getattr(module, name).detach().clone() for key, module, name in layer.holders(adapter)},
            )
            for adapter in adapters
        }
        self.factors = {adapter: factor.detach() for adapter in adapters if (factor := layer.weight_factor(adapter)) is not None}
        self.additive = not self.factors

    def apply(self, weight: Tensor) -> Tensor:
        """Return the weight with all adapters merged, in the widest of the dtypes involved."""
        if self.additive:  # the deltas are summed first, so that the large weight is rounded once and not once per adapter
            return _sum(weight, self._total())
        for adapter in self.kept:
            weight = _sum(weight, self._stored(adapter))
            if adapter in self.factors:
                weight = weight * self._factor(adapter, weight)
        return weight

    def invert(self, weight: Tensor) -> Tensor:
        """Return the weight before `apply`, up to rounding."""
        if self.additive:
            return _sum(weight, -self._total())
        for adapter in reversed(self.kept):
            if adapter in self.factors:
                weight = weight / self._factor(adapter, weight)
            weight = _sum(weight, -self._stored(adapter))
        return weight

    def _factor(self, adapter: str, weight: Tensor) -> Tensor:
        return self.layer.ops.to_weight_layout(self.factors[adapter].to(weight.device))

    def _total(self) -> Tensor:
        total: Tensor | None = None
        for adapter in self.kept:
            delta = self._delta(adapter)
            total = delta if total is None else total + delta
        assert total is not None
        return self.layer.ops.to_weight_layout(total)

    def _stored(self, adapter: str) -> Tensor:
        return self.layer.ops.to_weight_layout(self._delta(adapter))

    def _delta(self, adapter: str) -> Tensor:
        with self.as_merged(adapter), torch.no_grad():
            return self.layer.delta_weight(adapter)

    @contextlib.contextmanager
    def as_merged(self, adapter: str) -> Iterator[None]:
        """Context manager: inside the block the adapter has the scaling and the parameters that it had when it was merged."""
        layer, (scaling, values) = self.layer, self.kept[adapter]
        present: list[tuple[Any, str, str]] = [
            (module._parameters if name in module._parameters else module._buffers, name, key) for key, module, name in layer.holders(adapter)
        ]
        before = [store[name] for store, name, _ in present]
        scaling_before = layer.scaling[adapter]
        try:
            layer.scaling[adapter] = scaling
            for store, name, key in present:
                store[name] = values[key, name].to(layer.weight.device)
            yield
        finally:
            layer.scaling[adapter] = scaling_before
            for (store, name, _), tensor in zip(present, before, strict=True):
                store[name] = tensor


def _fixed(scaling: float) -> float:
    """Return a copy of the scaling if it is a tensor (in a compiled model), because such a tensor may be overwritten in place later."""
    return scaling.clone() if isinstance(scaling, Tensor) else scaling


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return weight.to(wide) + delta.to(wide)
