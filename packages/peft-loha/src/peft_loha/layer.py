"""The adapter layers of LoHa."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import AdapterLayer

from . import formulas


@dataclass(frozen=True)
class LoHaSettings:
    """What a layer is told: rank and alpha of this module, and what holds for all."""

    r: int
    alpha: float
    rank_dropout: float
    module_dropout: float
    init: bool


class LoHaLayer(AdapterLayer):
    """What all LoHa layers share.

    Attributes:
        r, alpha, rank_dropout, module_dropout, scaling: by adapter.
    """

    containers = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    per_adapter: ClassVar[tuple[str, ...]] = ("scaling", "r", "alpha", "rank_dropout", "module_dropout", "_ones")
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def __init__(self, base_layer: nn.Module, activation: Any) -> None:
        super().__init__(base_layer, activation)
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.rank_dropout: dict[str, float] = {}
        self.module_dropout: dict[str, float] = {}
        self._ones: dict[str, Tensor] = {}

    def note(self, adapter: str, settings: LoHaSettings) -> None:
        """Write down what holds for a new adapter."""
        self.r[adapter] = settings.r
        self.alpha[adapter] = settings.alpha
        self.rank_dropout[adapter] = settings.rank_dropout
        self.module_dropout[adapter] = settings.module_dropout
        self.scaling[adapter] = settings.alpha / settings.r


class Linear(LoHaLayer):
    """LoHa around `nn.Linear`.

    Shapes, with the base weight (out, in): `hada_w1_a`, `hada_w2_a` (out, r); `hada_w1_b`, `hada_w2_b` (r, in).
    """

    def add(self, adapter: str, config: LoHaSettings) -> None:
        """Create the four factors."""
        self.note(adapter, config)
        out, inp = self.matrix_shape
        r = config.r
        self.new("hada_w1_a", adapter, (out, r), bound=1 / math.sqrt(r))
        self.new("hada_w1_b", adapter, (r, inp), bound=1 / math.sqrt(inp))
        self.new("hada_w2_a", adapter, (out, r), bound=1 / math.sqrt(r))
        if config.init:
            self.new("hada_w2_b", adapter, (r, inp))  # zero: a new adapter changes nothing
        else:
            self.new("hada_w2_b", adapter, (r, inp), bound=1 / math.sqrt(inp))

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return B₁ (out, r), A₁ (r, in), B₂ (out, r), A₂ (r, in)."""
        b1, a1, b2, a2 = (getattr(self, name)[adapter] for name in self.containers)
        return b1, a1, b2, a2

    def delta_weight(self, adapter: str) -> Tensor:
        """Return s·(B₁A₁) ⊙ (B₂A₂), (out, in)."""
        return self.scaling[adapter] * formulas.hadamard(*self.factors(adapter))

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·xΔWᵀ; in training with module and row dropout."""
        # straight to the dicts, and the cheapest questions first: in decoding, asking costs as much as computing
        held = self._modules
        b1: Any = held["hada_w1_a"]._parameters[adapter]  # type: ignore[union-attr]
        a1: Any = held["hada_w1_b"]._parameters[adapter]  # type: ignore[union-attr]
        b2: Any = held["hada_w2_a"]._parameters[adapter]  # type: ignore[union-attr]
        a2: Any = held["hada_w2_b"]._parameters[adapter]  # type: ignore[union-attr]
        dtype = x.dtype
        if not self.training and x.numel() == self.matrix_shape[1] and dtype is y.dtype and dtype is b1.dtype and y.is_contiguous():
            ones = self._ones.get(adapter)
            if ones is None or ones.dtype is not dtype or ones.device != y.device:
                with torch.inference_mode(False):
                    ones = self._ones[adapter] = b1.new_ones(self.r[adapter])
            return formulas.add_applied_to_one(y, self.scaling[adapter], x, b1, a1, b2, a2, ones)
        if dtype is not b1.dtype:
            x = self.cast_input(x, b1.dtype)
        factors = (b1, a1, b2, a2)
        if not self.training:
            return formulas.add_applied(y, self.scaling[adapter], x, *factors)
        draw = torch.rand(1)  # always, and before the rows: a seed gives the same run whichever dropout is on
        skip, p = self.module_dropout[adapter], self.rank_dropout[adapter]
        if not skip and not p:
            return formulas.add_applied(y, self.scaling[adapter], x, *factors)
        if skip and not torch.compiler.is_compiling() and draw <= skip:
            return y  # no gradient at all, so that optimisers leave the adapter alone
        change = formulas.add_applied(torch.zeros_like(y, dtype=factors[0].dtype), 1.0, x, *factors)
        if p:
            change = change * self._row_mask(change, p)
        if skip and torch.compiler.is_compiling():  # a branch on a random number would break the graph
            change = torch.where(draw.to(change.device) > skip, change, 0)
        return y.add_(change, alpha=self.scaling[adapter])

    @staticmethod
    def _row_mask(change: Tensor, p: float) -> Tensor:
        """Return which output rows stay (out,), divided by the share that does; all zero if none does."""
        mask = (torch.rand(change.shape[-1], device=change.device) > p).to(change.dtype)
        return mask / mask.mean().clamp(min=1 / mask.numel())
