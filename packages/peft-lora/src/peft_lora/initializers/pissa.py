"""PiSSA (arXiv 2404.02948): A and B start as the principal part of W, which leaves the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..contracts import FactorLayer, InitialFactors, Initializer, LoraSettings
from .matrices import float_matrix, split, svd

if TYPE_CHECKING:
    from ..config import LoraConfig


class Pissa(Initializer):
    """A = diag(√(S_r/s))·V_rᵀ and B = U_r·diag(√(S_r/s)) of W = U S Vᵀ; the base becomes W − s·B·A.

    ``"pissa"`` decomposes exactly; ``"pissa_niter_k"`` approximately, with k power iterations, oversampled and with a fixed seed, so that an
    adapter that is loaded starts from the same base as the one that was saved.
    """

    needs_base: ClassVar[bool] = True

    def __init__(self, config: LoraConfig) -> None:
        super().__init__(config)
        word = str(config.init_lora_weights)
        self.iterations = int(word.rpartition("_")[2]) if word != "pissa" else None

    def subtracts_start(self) -> bool:
        """Return True."""
        return True

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return the principal part of W."""
        found = svd(float_matrix(layer, settings), settings.r, self.iterations)
        return InitialFactors(*split(*found, layer.scaling_of(settings), settings.path), base_offset=True)
