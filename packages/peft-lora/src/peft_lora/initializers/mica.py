"""MiCA (arXiv 2604.01694): B is frozen and contains the minor left singular vectors of W; A starts at zero and is trained."""

from __future__ import annotations

from typing import ClassVar

import torch

from peft_core import ConfigError

from ..contracts import FactorLayer, InitialFactors, Initializer, LoraSettings
from .matrices import float_matrix


class Mica(Initializer):
    """B = the r left singular vectors of W with the smallest singular values, frozen; A = 0, trained. The base weight is unchanged.

    For an embedding, W is the matrix (dim, vocabulary).
    """

    kinds: ClassVar[frozenset[str] | None] = frozenset({"linear", "conv1d", "embedding"})
    frozen: ClassVar[frozenset[str]] = frozenset({"B"})

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return a function that sets A to zero, and the last r left singular vectors of W as B.

        Raises:
            ConfigError: r is larger than the number of singular vectors, min(out, in).
        """
        if settings.r > min(layer.matrix_shape):
            raise ConfigError(
                f"init_lora_weights='mica' needs r ≤ {min(layer.matrix_shape)} on {settings.path!r}, which is {layer.matrix_shape}, not {settings.r}",
                hint="choose a smaller r, for this module alone with rank_pattern",
            )
        u = torch.linalg.svd(float_matrix(layer, settings), full_matrices=False).U
        return InitialFactors(torch.Tensor.zero_, u[:, -settings.r :])
