"""LoHa around `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` and their subclasses."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import formulas
from ..formulas import Factors
from .common import LoHaLayer, LoHaSettings, row_mask


class Convolution(LoHaLayer):
    """LoHa around a convolution. ΔW has the shape of the base's weight, and uses the base's stride, padding, dilation, groups and padding mode.

    Flat form: the weight is viewed as a matrix (out, in / groups · ∏ kernel). Effective (Tucker) form, with `use_effective_conv2d` and a kernel
    larger than 1: W_i[o, c, κ] = Σ_ab t_i[a, b, κ]·A_i[b, c]·B_i[a, o] and ΔW = s·W₁ ⊙ W₂. Shapes in this form: `hada_t1`, `hada_t2` are
    (r, r, *kernel), for Conv1d (r, r, k, 1); `hada_w*_a` (r, out) are B₁, B₂; `hada_w*_b` (r, in / groups) are A₁, A₂.

    Attributes:
        effective: adapter name → whether the adapter has the effective form.
    """

    containers = (*LoHaLayer.containers, "hada_t1", "hada_t2")
    base_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    per_adapter: ClassVar[tuple[str, ...]] = (*LoHaLayer.per_adapter, "effective")

    def __init__(self, base_layer: nn.Module, selection: Any) -> None:
        super().__init__(base_layer, selection)
        self.effective: dict[str, bool] = {}
        self.weight_shape: tuple[int, ...] = tuple(self.weight.shape)

    def add(self, adapter: str, config: LoHaSettings) -> None:
        """Create the four factors and, in the effective form, the two core tensors."""
        out, inp, *kernel = self.weight_shape
        self.effective[adapter] = config.effective and any(size != 1 for size in kernel)
        if not self.effective[adapter]:
            super().add(adapter, config)
            return
        self.record_settings(adapter, config)
        r = config.r
        core = (r, r, *kernel) if len(kernel) > 1 else (r, r, kernel[0], 1)
        for number in ("1", "2"):
            zero = number == "2" and config.init
            self.new(f"hada_w{number}_a", adapter, (r, out), bound=1 / math.sqrt(out))
            self.new(f"hada_w{number}_b", adapter, (r, inp), bound=None if zero else 1 / math.sqrt(inp))
        for number in ("1", "2"):  # created last, so that a seed gives the same values as in the reference implementation
            self.new(f"hada_t{number}", adapter, core, bound=1 / math.sqrt(r * math.prod(kernel)))

    def change_of_weight(self, adapter: str, factors: Factors | None = None) -> Tensor:
        """Return ΔW (out, in / groups · ∏ kernel), without s."""
        if not self.effective[adapter]:
            return super().change_of_weight(adapter, factors)
        b1, a1, b2, a2 = self.factors(adapter) if factors is None else factors
        t1, t2 = self.hada_t1[adapter], self.hada_t2[adapter]
        change: Tensor = formulas.tucker(t1, a1, b1) * formulas.tucker(t2, a2, b2)
        return change.flatten(1)

    def low_rank_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """Return (out, r²) and (r², in / groups · ∏ kernel) whose product is s·ΔW; None for the effective form."""
        return None if self.effective[adapter] else super().low_rank_factors(adapter)

    def masked(self, adapter: str, factors: Factors, p: float) -> Factors:
        """Return the factors with rank dropout; in the effective form, the components are the rows of B₁ and B₂, not the columns."""
        if not self.effective[adapter]:
            return super().masked(adapter, factors, p)
        b1, a1, b2, a2 = factors
        if self.drop_components[adapter]:
            first, second = (torch.rand(2, b1.shape[0], 1, device=b1.device) > p).to(b1.dtype) / (1 - p)
            return b1 * first, a1, b2 * second, a2
        return b1 * row_mask(b1, self.matrix_shape[0], p), a1, b2, a2

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·conv(x, ΔW), summed in the dtype of the factors and rounded once to that of `y`."""
        factors, stays = None, None
        if self.training:
            kept = self.dropped(adapter, x.device)
            if kept is None:
                return y
            factors, stays = kept
        change = self.change_of_weight(adapter, factors)
        if stays is not None:
            change = change * stays
        change = self.ops.apply(self.get_base_layer(), self.cast_input(x, change.dtype), change)
        return (y + change * self.scaling[adapter]).to(y.dtype)
