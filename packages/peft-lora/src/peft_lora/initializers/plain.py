"""The initialisers for `init_lora_weights` True, False and "gaussian"."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..contracts import FactorLayer, InitialFactors, Initializer, LoraSettings


class Plain(Initializer):
    """With True, A is uniform on ±1/√in and B is zero, so that a new adapter does not change the output; with False, B is uniform on ±1/√r.

    For embeddings, A is zero and B normal with True; both are normal with False.
    """

    kinds: ClassVar[frozenset[str] | None] = None

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return the functions that initialise A and B."""
        zero_b = self.config.init_lora_weights is not False
        if layer.ops.kind == "embedding":
            return InitialFactors(torch.Tensor.zero_ if zero_b else torch.Tensor.normal_, torch.Tensor.normal_)
        inp = layer.matrix_shape[1]
        columns = layer.factor_shapes(settings.r)[1][1]  # r for most layers, r / groups with groups, r · experts for experts
        return InitialFactors(uniform(1 / math.sqrt(inp)), torch.Tensor.zero_ if zero_b else uniform(1 / math.sqrt(columns)))


class Gaussian(Plain):
    """A is normal with standard deviation 1/r, and B is zero. Embeddings are initialised as with True."""

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return the functions that initialise A and B."""
        if layer.ops.kind == "embedding":
            return super().start(layer, settings)
        return InitialFactors(lambda tensor: tensor.normal_(std=1 / settings.r), torch.Tensor.zero_)


def uniform(bound: float) -> Callable[[Tensor], Any]:
    """Return a function that fills a tensor in place with uniform random numbers between −bound and bound."""
    return lambda tensor: tensor.uniform_(-bound, bound)
