"""LoRA-GA (arXiv 2407.05000): A and B start as singular vectors of the weight gradient; s·B·A is subtracted from the base weight."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from peft_core import ConfigError, PeftWarning

from ...contracts import FactorLayer, InitialFactors, Initializer, LoraSettings
from ...subconfigs import LoraGAConfig
from ..continuing import continues
from ..matrices import float_matrix, svd, wide
from ..plain import uniform

if TYPE_CHECKING:
    from ...config import LoraConfig

#: attributes that `preprocess_loraga` sets on a base layer: the mean gradient (None: it received none), and "paper" or "peft" scaling
GRADIENT, LIKE = "_peft_loraga_grad", "_peft_loraga_like"
ITERATIONS = 4


class LoraGA(Initializer):
    """Initialise A and B with singular vectors of the gradient G = U S Vᵀ (out, in); the first update then approximates full fine-tuning.

    `direction` selects which of the first 2r singular vectors are used: rows of Vᵀ for A, columns of U for B. `scale` multiplies both A and B:
    ``"stable"`` by out^¼/√γ, ``"weight_svd"`` by the mean of √(σᵢ(W)/s) over i ≤ r, ``"gd_scale"`` by 1/s, ``"unit"`` by 1. The base weight
    becomes W − s·B·A.

    `preprocess_loraga(..., like="peft")` reproduces the reference implementation: each column of B is also multiplied by its singular value of G.
    ``"stable"`` and ``"weight_svd"`` then scale only B: by n^¼/√γ, where n is the first dimension of the stored weight (in_features of a Conv1D),
    and by σ₁(W) divided by the singular value of B's first column. ``"random"`` gives A and B the same indices instead of disjoint ones.
    """

    needs_base: ClassVar[bool] = True

    def __init__(self, config: LoraConfig) -> None:
        super().__init__(config)
        settings = config.lora_ga_config
        self.settings = LoraGAConfig(**settings) if isinstance(settings, dict) else settings or LoraGAConfig()
        self._warned = False

    def subtracts_start(self) -> bool:
        """Return True."""
        return True

    @classmethod
    def adapter_added(cls, base: nn.Module, config: LoraConfig) -> None:
        """Delete the attributes that `preprocess_loraga` set on the modules of the base."""
        for module in base.modules():
            for name in (GRADIENT, LIKE):
                module.__dict__.pop(name, None)

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return scaled singular vectors of the gradient, or the init_lora_weights=True start if the layer has no gradient.

        Warns if `preprocess_loraga` did not run on the layer.

        Raises:
            ConfigError: 2r exceeds min(out, in); the gradient and the weight have different shapes; or A and B come from a file and the gradient
                needed to recompute the subtracted s·B·A is missing.
        """
        base = layer.get_base_layer()
        gradient = getattr(base, GRADIENT, None)
        if gradient is None:
            if GRADIENT not in base.__dict__:
                self._complain(layer, settings)
            return InitialFactors(uniform(1 / math.sqrt(layer.matrix_shape[1])), torch.Tensor.zero_)
        weight = float_matrix(layer, settings)
        g = wide(layer.ops.matrix(gradient.detach())).to(device=weight.device, dtype=weight.dtype)
        if g.shape != weight.shape:
            raise ConfigError(
                f"the gradient of {settings.path!r} is {tuple(g.shape)}, its weight {tuple(weight.shape)}", hint="is the cache_file of another model?"
            )
        r = settings.r
        if 2 * r > min(g.shape):
            raise ConfigError(
                f"init_lora_weights='lora_ga' needs 2r ≤ {min(g.shape)} on {settings.path!r}, which is {tuple(g.shape)}, not r={r}",
                hint="choose a smaller r, for this module alone with rank_pattern",
            )
        as_peer = getattr(base, LIKE, "paper") == "peft"
        u, s, vt = svd(g, 2 * r, ITERATIONS)
        for_a, for_b = self._indices(r, as_peer)
        a, b = vt[for_a], u[:, for_b]
        if as_peer:
            return InitialFactors(*self._scaled_as_peer(a, b * s[for_b], s[for_b], layer, settings, weight), base_offset=True)
        factor = self._factor(layer, settings, weight)
        return InitialFactors(a * factor, b * factor, base_offset=True)

    def _indices(self, r: int, as_peer: bool) -> tuple[Tensor, Tensor]:
        """Return the indices (r,) of the singular vectors for A and for B, among the first 2r."""
        first, second = torch.arange(r), torch.arange(r, 2 * r)
        if self.settings.direction == "ArB2r":
            return first, second
        if self.settings.direction == "A2rBr":
            return second, first
        if self.settings.direction == "ArBr":
            return 2 * first + 1, 2 * first
        order = torch.randperm(2 * r, generator=torch.Generator().manual_seed(0))
        return order[:r], order[:r] if as_peer else order[r:]

    def _factor(self, layer: FactorLayer, settings: LoraSettings, weight: Tensor) -> float:
        s, scale = layer.scaling_of(settings), self.settings.scale
        if scale == "stable":
            return float(weight.shape[0] ** 0.25 / self.settings.stable_gamma**0.5)
        if scale == "weight_svd":
            return float((svd(weight, settings.r, ITERATIONS)[1] / s).sqrt().mean())
        return 1 / s if scale == "gd_scale" else 1.0

    def _scaled_as_peer(
        self, a: Tensor, b: Tensor, kept: Tensor, layer: FactorLayer, settings: LoraSettings, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        s, scale = layer.scaling_of(settings), self.settings.scale
        if scale == "stable":
            return a, b * (layer.base_weight().shape[0] ** 0.25 / self.settings.stable_gamma**0.5)
        if scale == "weight_svd":
            return a, b * (svd(weight, 1, ITERATIONS)[1][0] / kept[0]) if kept[0] > 0 else b
        return (a / s, b / s) if scale == "gd_scale" else (a, b)

    def _complain(self, layer: FactorLayer, settings: LoraSettings) -> None:
        if continues(layer, settings):
            raise ConfigError(
                f"init_lora_weights='lora_ga': a file does not hold what the adapter took out of {settings.path!r} when it was created",
                hint="call preprocess_loraga(model, config, None, cache_file) with the gradients of then before loading; if the base is the changed "
                "one already, load with a config whose init_lora_weights is True; "
                "an adapter saved with path_initial_model_for_weight_conversion needs neither",
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"init_lora_weights='lora_ga', but {settings.path!r} has no gradient from preprocess_loraga: it starts as with True, as do others "
                "without one",
                PeftWarning,
                stacklevel=2,
            )
