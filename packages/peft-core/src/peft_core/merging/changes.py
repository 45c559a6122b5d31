"""What a merge does to a weight, as objects and not closures, so that a merged model can be copied and pickled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.ops import BaseOps


class ChangedLayer(Protocol):
    """What changes of a weight ask of the layer whose adapters they fold in; see `AdapterLayer`."""

    scaling: dict[str, float]
    ops: BaseOps

    @property
    def weight(self) -> Tensor:
        """The base weight, in its own layout."""
        ...

    def holders(self, adapter: str) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the file key, module, attribute) for each tensor of an adapter."""
        ...

    def delta_weight(self, adapter: str) -> Tensor:
        """Return scaling · ΔW (out, in)."""
        ...

    def weight_factor(self, adapter: str) -> Tensor | None:
        """Return what W + ΔW is multiplied by; None for a sum."""
        ...

    def merged_weight(self, adapter: str, weight: Tensor) -> Tensor:
        """Return the weight with the adapter folded in."""
        ...

    def merged_bias(self, adapter: str, bias: Tensor | None) -> Tensor | None:
        """Return the bias with the adapter folded in."""
        ...


class WeightChange:
    """W → W' of effects that say it as a whole (`merged_weight`) and have no way back but a copy."""

    additive = False
    invertible = False

    def __init__(self, layer: ChangedLayer, adapters: Sequence[str]) -> None:
        self.layer, self.adapters = layer, tuple(adapters)

    def apply(self, weight: Tensor) -> Tensor:
        """Return the weight with all effects folded in, in the widest dtype that took part."""
        for adapter in self.adapters:
            weight = self.layer.merged_weight(adapter, weight)
        return weight

    def invert(self, weight: Tensor) -> Tensor:
        """Return `weight`: there is no way back."""
        return weight


class BiasChange:
    """b → b' as `merged_bias` says, one adapter after the other. A copy of the few numbers is the way back."""

    additive = True
    invertible = False

    def __init__(self, layer: ChangedLayer, adapters: Sequence[str]) -> None:
        self.layer, self.adapters = layer, tuple(adapters)

    def apply(self, weight: Tensor) -> Tensor:
        """Return the bias with all effects folded in."""
        for adapter in self.adapters:
            changed = self.layer.merged_bias(adapter, weight)
            assert changed is not None
            weight = changed
        return weight

    def invert(self, weight: Tensor) -> Tensor:
        """Return `weight`: there is no way back."""
        return weight


class Product:
    """s·B·A, multiplied out when it is asked for: a few rows and columns instead of a second weight.

    Args:
        a: (r, in).
        b: (out, r).
        scaling: s.
    """

    def __init__(self, a: Tensor, b: Tensor, scaling: float) -> None:
        # clones are aligned as the allocator aligns, so that the same product is rounded the same way later
        self.a, self.b, self.scaling = a.detach().clone(), b.detach().clone(), scaling

    def __call__(self, device: torch.device) -> Tensor:
        """Return it (out, in)."""
        return self.b.to(device) @ self.a.to(device) * self.scaling


class Subtraction:
    """W → W − Δ with a Δ (out, in) that was computed once.

    Args:
        delta: Δ, or its factors.
        ops: lays it out as the weight is.
    """

    additive = True
    invertible = True

    def __init__(self, delta: Tensor | Product, ops: BaseOps) -> None:
        self.delta, self.ops = delta.detach() if isinstance(delta, Tensor) else delta, ops

    def matrix(self, device: torch.device) -> Tensor:
        """Return Δ (out, in) on `device`."""
        return self.delta.to(device) if isinstance(self.delta, Tensor) else self.delta(device)

    def apply(self, weight: Tensor) -> Tensor:
        """Return `weight`, in the layout of the base, − Δ."""
        return _sum(weight, -self.ops.to_weight_layout(self.matrix(weight.device)))

    def invert(self, weight: Tensor) -> Tensor:
        """Return `weight`, in the layout of the base, + Δ."""
        return _sum(weight, self.ops.to_weight_layout(self.matrix(weight.device)))


class AffineChange:
    """W → factor ⊙ (W + Δ), one adapter after the other, and back. Most effects are of this kind: for sums there is no factor.

    The few parameters of the adapters are kept as they were when merged, and Δ is multiplied out of them again when it is taken out.
    """

    invertible = True

    def __init__(self, layer: ChangedLayer, adapters: Sequence[str]) -> None:
        self.layer = layer
        # clones are aligned as the allocator aligns, so that the same product is rounded the same way later
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
        """Return the weight with all effects folded in, in the widest dtype that took part."""
        if self.additive:  # summed first: one rounding of a small number instead of one of a large number for each adapter
            return _sum(weight, self._total())
        for adapter in self.kept:
            weight = _sum(weight, self._stored(adapter))
            if adapter in self.factors:
                weight = weight * self._factor(adapter, weight)
        return weight

    def invert(self, weight: Tensor) -> Tensor:
        """Return what `apply` was given, up to rounding."""
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
        """Inside the block the adapter has the values that it had when it was merged."""
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
    """Return a scaling that stays as it is: where it is a tensor (of a compiled model), somebody may fill it with another value."""
    return scaling.clone() if isinstance(scaling, Tensor) else scaling


def home_of(module: nn.Module, name: str) -> dict[str, Any]:
    """Return the dict of a module in which a parameter or buffer is."""
    return module._parameters if name in module._parameters else module._buffers


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return weight.to(wide) + delta.to(wide)
