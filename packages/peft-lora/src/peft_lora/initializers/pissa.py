"""PiSSA (arXiv 2404.02948): A and B start with the principal components of W, which are subtracted from the base weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..contracts import FactorLayer, InitialFactors, Initializer, LoraSettings
from .matrices import float_matrix, split, svd

if TYPE_CHECKING:
    from ..config import LoraConfig


class Pissa(Initializer):
    """A = diag(√(S_r/s))·V_rᵀ and B = U_r·diag(√(S_r/s)) with W = U S Vᵀ; the base weight becomes W − s·B·A.

    ``"pissa"`` computes an exact SVD; ``"pissa_niter_k"`` a randomised SVD with k subspace iterations, oversampling and a fixed seed, so that
    loading an adapter subtracts the same s·B·A from the base weight as its creation did.
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
        """Return A and B with the r principal components of W."""
        found = svd(float_matrix(layer, settings), settings.r, self.iterations)
        return InitialFactors(*split(*found, layer.scaling_of(settings), settings.path), base_offset=True)
