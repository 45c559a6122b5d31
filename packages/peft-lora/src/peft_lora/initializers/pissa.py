"""PiSSA (arXiv 2404.02948): A and B start as the principal part of W, which leaves the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from peft_core import ConfigError

from .base import Initializer, Start

if TYPE_CHECKING:
    from ..config import LoraConfig
    from ..layers.common import LoraLayer, LoraSettings


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

    def start(self, layer: LoraLayer, settings: LoraSettings) -> Start:
        """Return the principal part of W."""
        weight = layer.ops.matrix(layer.base_weight()).detach()
        weight = require_float(weight, settings.path).float()
        r = min(settings.r, *weight.shape)
        if self.iterations is None:
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[weight.device] if weight.device.type == "cuda" else []):
                torch.manual_seed(0)
                u, s, v = torch.svd_lowrank(weight, q=min(r + 10, *weight.shape), niter=self.iterations)
                vt = v.T
        root = (s[:r] / layer.scaling_of(settings)).sqrt()
        return Start(root[:, None] * vt[:r], u[:, :r] * root, shift=True)


def require_float(weight: torch.Tensor, path: str) -> torch.Tensor:
    """Return `weight` if it is of a floating-point dtype.

    Raises:
        ConfigError: it is not (a quantised base).
    """
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ConfigError(
            f"the initialisation decomposes the weight of {path!r}, which is of the dtype {weight.dtype}",
            hint="load the base in float32, float16 or bfloat16",
        )
    return weight
