"""LoRA-GA (arXiv 2407.05000): A and B start as singular vectors of the loss's gradient; s·B·A leaves the base."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from peft_core import ConfigError, PeftWarning

from ...contracts import FactorLayer, InitialFactors, Initializer, LoraSettings
from ...subconfigs import LoraGAConfig
from ..matrices import float_matrix, svd, wide
from ..plain import uniform

if TYPE_CHECKING:
    from ...config import LoraConfig

#: attributes of a base layer under which `preprocess_loraga` leaves the mean gradient (None: none arrived) and whose scaling to follow
GRADIENT, LIKE = "_peft_loraga_grad", "_peft_loraga_like"
ITERATIONS = 4


class LoraGA(Initializer):
    """A and B take singular vectors of the gradient G = U S Vᵀ (out, in), so that the first step of both is one of full fine-tuning.

    `direction` chooses among the first 2r: A takes rows of Vᵀ, B columns of U. `scale` multiplies: ``"stable"`` both by out^¼/√γ,
    ``"weight_svd"`` both by the mean of √(σᵢ(W)/s) over i ≤ r, ``"gd_scale"`` both by 1/s, ``"unit"`` none. The base becomes W − s·B·A.

    With `like="peft"` in `preprocess_loraga` as the peer does it: B's columns are multiplied by their singular values of G and A is left
    alone; ``"stable"`` multiplies B by n^¼/√γ, n being the first dimension of the stored weight (a Conv1D's inputs), and ``"weight_svd"``
    by σ₁(W) over B's first singular value; ``"random"`` gives A and B the same indices instead of disjoint ones.
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
        """Take away what `preprocess_loraga` left."""
        for module in base.modules():
            for name in (GRADIENT, LIKE):
                module.__dict__.pop(name, None)

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return singular vectors of the gradient; without a gradient what init_lora_weights=True gives, with a warning.

        Raises:
            ConfigError: 2r is more than there are singular vectors; or a file supplies A and B, and the gradient that says what was taken
                out of the base is not there.
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
        """Return which of the first 2r singular vectors A and B take."""
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
        if not layer.init_options.initialise:
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
