"""`init_lora_weights="orthogonal"`: A and B start with random non-zero values such that B·A = 0."""

from __future__ import annotations

import torch

from peft_core import ConfigError

from ..contracts import FactorLayer, InitialFactors, Initializer, LoraSettings


class Orthogonal(Initializer):
    """A = (X·Q_even)ᵀ/10 and B = Yᵀ·Q_odd/10, with the even and the odd rows of a random orthogonal matrix Q (r, r): so B·A = 0.

    X (in, r/2) and Y (r/2, out) are drawn from a standard normal distribution. Both A and B get a gradient from the first step on.
    """

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return random A and B with B·A = 0; the random numbers are drawn in the same order as in the reference implementation.

        Raises:
            ConfigError: r is odd.
        """
        r = settings.r
        if r % 2:
            raise ConfigError(
                f"init_lora_weights='orthogonal' needs an even r, not r={r} on {settings.path!r}",
                hint=f"r={r + 1}, for this module with rank_pattern",
            )
        out, inp = layer.matrix_shape
        q = torch.linalg.qr(torch.randn(r, r)).Q
        a = (torch.randn(inp, r // 2) @ q[0::2]).T / 10
        b = torch.randn(r // 2, out).T @ q[1::2] / 10
        return InitialFactors(a, b)
