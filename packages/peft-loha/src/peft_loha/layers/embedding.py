"""LoHa around `nn.Embedding`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_core import UnsupportedModuleError

from .common import LoHaLayer


class Embedding(LoHaLayer):
    """LoHa around `nn.Embedding`, whose weight is viewed as a matrix (dim, vocabulary): `hada_w*_a` is (dim, r), `hada_w*_b` is (r, vocabulary).

    Raises:
        UnsupportedModuleError: the base renormalises its rows in place (`max_norm`), so there is no fixed weight to which ΔW could be added.
    """

    base_types = (nn.Embedding,)

    def __init__(self, base_layer: nn.Module, selection: Any) -> None:
        super().__init__(base_layer, selection)
        if getattr(self.get_base_layer(), "max_norm", None) is not None:
            raise UnsupportedModuleError(
                "an Embedding with max_norm changes its rows at each look-up: an adapter beside it would be neither normalised nor mergeable",
                hint="set max_norm=None on the base after training it, or leave it out with exclude_modules",
            )

    @property
    def bound_of_a(self) -> float:
        """The bound is 1, independent of the vocabulary size: a look-up selects one row and does not sum over the vocabulary."""
        return 1.0

    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·(A₁ᵀ[ids] B₁ᵀ) ⊙ (A₂ᵀ[ids] B₂ᵀ), times the base's `embed_scale` if it has one; ΔW is computed for `ids` only."""
        factors, stays = self.factors(adapter), None
        if self.training:
            kept = self.dropped(adapter, x.device)
            if kept is None:
                return y
            factors, stays = kept
        base: Any = self.get_base_layer()
        b1, a1, b2, a2 = factors
        if stays is not None:
            b1 = b1 * stays
        found = self._rows(base, x, a1, b1) * self._rows(base, x, a2, b2)
        scale = getattr(base, "embed_scale", None)
        if scale is not None:
            found = found * torch.as_tensor(scale, dtype=found.dtype, device=found.device)
        return (y + found * self.scaling[adapter]).to(y.dtype)

    @staticmethod
    def _rows(base: Any, ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return Aᵀ[ids] Bᵀ (…, dim)."""
        hidden = F.embedding(ids, a.t(), padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        return F.linear(hidden, b)
