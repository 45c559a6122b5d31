"""`init_lora_weights` True, False and "gaussian"."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..contracts import FactorLayer, InitialFactors, Initializer, LoraSettings


class Plain(Initializer):
    """True: A uniform on ±1/√in and B zero, so that a new adapter changes nothing; False: B uniform on ±1/√r, too.

    For embeddings A is zero and B normal; with False both are normal.
    """

    kinds: ClassVar[frozenset[str] | None] = None

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return how A and B are filled."""
        zero_b = self.config.init_lora_weights is not False
        if layer.ops.kind == "embedding":
            return InitialFactors(torch.Tensor.zero_ if zero_b else torch.Tensor.normal_, torch.Tensor.normal_)
        inp = layer.matrix_shape[1]
        columns = layer.factor_shapes(settings.r)[1][1]  # r, in groups r / groups, for experts r · experts
        return InitialFactors(uniform(1 / math.sqrt(inp)), torch.Tensor.zero_ if zero_b else uniform(1 / math.sqrt(columns)))


class Gaussian(Plain):
    """A normal with standard deviation 1/r, B zero. Embeddings start as with True."""

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return how A and B are filled."""
        if layer.ops.kind == "embedding":
            return super().start(layer, settings)
        return InitialFactors(lambda tensor: tensor.normal_(std=1 / settings.r), torch.Tensor.zero_)


def uniform(bound: float) -> Callable[[Tensor], Any]:
    """Return what fills a tensor uniformly on ±bound."""
    return lambda tensor: tensor.uniform_(-bound, bound)
