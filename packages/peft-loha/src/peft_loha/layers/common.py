"""What all layers of LoHa share: the four factors, the scale, dropout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import AdapterLayer

from .. import formulas
from ..formulas import Factors


@dataclass(frozen=True)
class LoHaSettings:
    """The settings of an adapter for one layer: the rank and alpha of this module, and the settings that are the same for all modules."""

    r: int
    alpha: float
    rank_dropout: float
    module_dropout: float
    init: bool
    drop_components: bool = False
    effective: bool = False


class LoHaLayer(AdapterLayer):
    """Base class of all LoHa layers: ΔW = s·(B₁A₁) ⊙ (B₂A₂), with the base weight viewed as a matrix (out, in).

    In all methods, `config` or `settings` is the `LoHaSettings` of the adapter for this layer, `factors` are the four matrices B₁, A₁, B₂, A₂, and
    `p` is a dropout probability.

    Shapes: `hada_w1_a`, `hada_w2_a` (out, r) are B₁, B₂; `hada_w1_b`, `hada_w2_b` (r, in) are A₁, A₂.

    Attributes:
        r, alpha, rank_dropout, drop_components, module_dropout, scaling: adapter name → the adapter's value.
    """

    containers: ClassVar[tuple[str, ...]] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    other_param_names: ClassVar[tuple[str, ...]] = ("r", "alpha", "scaling", "rank_dropout", "module_dropout")
    per_adapter: ClassVar[tuple[str, ...]] = ("scaling", "r", "alpha", "rank_dropout", "drop_components", "module_dropout")
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def __init__(self, base_layer: nn.Module, selection: Any) -> None:
        super().__init__(base_layer, selection)
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.rank_dropout: dict[str, float] = {}
        self.drop_components: dict[str, bool] = {}
        self.module_dropout: dict[str, float] = {}

    # ---- creating --------------------------------------------------------------------------------------------------
    def add(self, adapter: str, config: LoHaSettings) -> None:
        """Create the four factors; with `init`, A₂ is zero, so that a new adapter changes nothing."""
        self.record_settings(adapter, config)
        out, inp = self.matrix_shape
        r, bound = config.r, self.bound_of_a
        self.new("hada_w1_a", adapter, (out, r), bound=1 / math.sqrt(r))
        self.new("hada_w1_b", adapter, (r, inp), bound=bound)
        self.new("hada_w2_a", adapter, (out, r), bound=1 / math.sqrt(r))
        self.new("hada_w2_b", adapter, (r, inp), bound=None if config.init else bound)

    @property
    def bound_of_a(self) -> float:
        """The bound of the uniform distribution from which A₁ is initialised: 1/√in."""
        return 1 / math.sqrt(self.matrix_shape[1])

    def record_settings(self, adapter: str, settings: LoHaSettings) -> None:
        """Store the settings of a new adapter in this layer."""
        self.r[adapter] = settings.r
        self.alpha[adapter] = settings.alpha
        self.rank_dropout[adapter] = settings.rank_dropout
        self.drop_components[adapter] = settings.drop_components
        self.module_dropout[adapter] = settings.module_dropout
        self.scaling[adapter] = settings.alpha / settings.r

    # ---- asking -----------------------------------------------------------------------------------------------------
    def factors(self, adapter: str) -> Factors:
        """Return B₁ (out, r), A₁ (r, in), B₂ (out, r), A₂ (r, in)."""
        # reads the dicts directly: in decoding, attribute access through nn.Module costs as much as the computation
        held = self._modules
        b1: Any = held["hada_w1_a"]._parameters[adapter]  # type: ignore[union-attr]
        a1: Any = held["hada_w1_b"]._parameters[adapter]  # type: ignore[union-attr]
        b2: Any = held["hada_w2_a"]._parameters[adapter]  # type: ignore[union-attr]
        a2: Any = held["hada_w2_b"]._parameters[adapter]  # type: ignore[union-attr]
        return b1, a1, b2, a2

    def delta_weight(self, adapter: str) -> Tensor:
        """Return s·ΔW (out, in)."""
        return self.scaling[adapter] * self.change_of_weight(adapter)

    def change_of_weight(self, adapter: str, factors: Factors | None = None) -> Tensor:
        """Return ΔW (out, in), without s; computed from `factors` instead of the adapter's own if they are given."""
        return formulas.hadamard(*(self.factors(adapter) if factors is None else factors))

    def low_rank_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """Return (out, r²) and (r², in) whose product is s·ΔW: the Khatri–Rao factors."""
        kb, ka = formulas.khatri_rao(*self.factors(adapter))
        return kb * self.scaling[adapter], ka

    # ---- dropout ----------------------------------------------------------------------------------------------------
    def dropped(self, adapter: str, device: torch.device) -> tuple[Factors, Tensor | None] | None:
        """Return (factors, multiplier) for one call in training, with dropout applied; None: skip the adapter in this call.

        The multiplier is 0 or 1, on `device`, and ΔW must be multiplied by it; it is None except under `torch.compile` with module dropout.
        To drop rows of ΔW, rows of B₁ are dropped, and to drop components, columns of B₁ and B₂ are dropped, so no tensor of the output's
        size is masked.
        """
        factors = self.factors(adapter)
        draw = torch.rand(1)  # drawn always, and before the rows, so that a seed gives the same run whichever dropout is on
        skip, p = self.module_dropout[adapter], self.rank_dropout[adapter]
        stays: Tensor | None = None
        if skip:
            if torch.compiler.is_compiling():  # a branch on a random number would break the graph
                stays = (draw > skip).to(device)
            elif draw <= skip:
                return None  # no gradient at all, so that optimisers leave the adapter alone
        if p:
            factors = self.masked(adapter, factors, p)
        return factors, stays

    def masked(self, adapter: str, factors: Factors, p: float) -> Factors:
        """Return the factors with rank dropout applied with probability `p`."""
        b1, a1, b2, a2 = factors
        if self.drop_components[adapter]:
            r = self.r[adapter]
            first, second = (torch.rand(2, r, device=b1.device) > p).to(b1.dtype) / (1 - p)
            return b1 * first, a1, b2 * second, a2
        return b1 * row_mask(b1, self.matrix_shape[0], p).unsqueeze(1), a1, b2, a2

    # ---- the scale --------------------------------------------------------------------------------------------------
    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's scaling to `scale` times alpha/r; an adapter that has no weights in this layer is ignored."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.alpha[adapter] / self.r[adapter]
            self.selection.drop_cached()

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the adapters in use by `scale`."""
        if scale == 1:
            return
        for adapter in self.selection.names:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the adapters in use by `scale`; None: reset the scaling to alpha/r."""
        for adapter in self.selection.names:
            if adapter in self.scaling:
                self.scaling[adapter] = self.alpha[adapter] / self.r[adapter] if scale is None else self.scaling[adapter] / scale


def row_mask(like: Tensor, out: int, p: float) -> Tensor:
    """Return a random mask (out,): 0 for dropped rows, 1 / (share of remaining rows) for the others; all 0 if all rows are dropped (not 0/0)."""
    mask = (torch.rand(out, device=like.device) > p).to(like.dtype)
    return mask / mask.mean().clamp(min=1 / out)
