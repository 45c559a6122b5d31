"""OLoRA (arXiv 2406.01775): A and B start as a part of the QR decomposition of W, which leaves the base."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..contracts import FactorLayer, InitialFactors, Initializer, LoraSettings
from .matrices import float_matrix


class Olora(Initializer):
    """B = Q[:, :r] and A = R[:r] of W = QR, with the signs that LAPACK gives; the base becomes W − s·B·A.

    W is the matrix (out, in) whatever the layout in which it is stored; the reference implementation decomposes a Conv1D's transpose.
    """

    needs_base: ClassVar[bool] = True

    def subtracts_start(self) -> bool:
        """Return True."""
        return True

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return the first columns of Q and rows of R."""
        q, r = torch.linalg.qr(float_matrix(layer, settings))
        rank = min(settings.r, q.shape[1])
        return InitialFactors(r[:rank], q[:, :rank], base_offset=True)
