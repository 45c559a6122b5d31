"""`init_lora_weights="orthogonal"`: A and B random and not zero, with B·A = 0."""

from __future__ import annotations

import torch

from peft_core import ConfigError

from ..contracts import FactorLayer, InitialFactors, Initializer, LoraSettings


class Orthogonal(Initializer):
    """A = (X·Q_even)ᵀ/10 and B = Yᵀ·Q_odd/10, where the rows of an orthogonal (r, r) matrix Q are shared out: so B·A = 0.

    X (in, r/2) and Y (r/2, out) are normal. Both factors get a gradient from the first step on.
    """

    def start(self, layer: FactorLayer, settings: LoraSettings) -> InitialFactors:
        """Return two random factors with orthogonal rows and columns, in the order of draws of the reference implementation.

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
