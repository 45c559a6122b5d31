"""What the variants share whose effect is s·B'·A'·x for some B' and A' that follow from what is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_core import ConfigError, fingerprint

from .. import formulas, kernels
from .base import Variant

if TYPE_CHECKING:
    from ..config import LoraConfig


def add_product(y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: float | Tensor, p: float = 0.0) -> Tensor:
    """Return y + s·drop(x)AᵀBᵀ with gradients to all of them; `y` may be overwritten.

    Args:
        y: (…, out).
        x: (…, in).
        a: A (r, in).
        b: B (out, r).
        s: scaling.
        p: dropout probability, 0 outside of training.
    """
    if isinstance(s, Tensor):  # of a compiled model whose adapters are swapped
        s, b = 1.0, b * s
    if torch.is_grad_enabled() and kernels.can_record() and not torch.is_autocast_enabled(x.device.type):
        return kernels.record_low_rank(y, x, a, b, s, p)
    return kernels.add_low_rank(y, F.dropout(x, p) if p else x, a, b, s)


def refuse_computed_starts(config: LoraConfig, name: str, why: str) -> None:
    """Check that A and B start with random values or zeros, which fit any shape.

    Raises:
        ConfigError: an initialiser computes them from something.
    """
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} does not work with {name}: {why}", hint="use True, False or 'gaussian', or plain LoRA"
        )


class LowRank(Variant):
    """ΔW = B'·A'. A subclass says `pair`, and `behind` if what follows from the stored tensors is worth keeping."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A' (r, in) and B' (out, r), with gradients to what is stored."""
        found: tuple[Tensor, Tensor] = self.layer.factors(self.adapter)
        return found

    def behind(self) -> tuple[Tensor, ...]:
        """Return the tensors from which `pair` is computed; empty: it is not worth keeping."""
        return ()

    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·B'A'·drop(x), and s·β where `lora_bias` gave B a bias."""
        layer: Any = self.layer
        a, b = self.pair_now()
        y = add_product(y, x, a, b, layer.scaling[self.adapter], self.dropout())
        found: Tensor = layer.with_beta(self.adapter, y)
        return found

    def delta(self) -> Tensor:
        """Return s·B'A' (out, in)."""
        a, b = self.pair()
        return formulas.delta(a, b, self.layer.scaling[self.adapter])

    def low_rank_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return s·B' (out, r) and A' (r, in)."""
        a, b = self.pair()
        return b * self.layer.scaling[self.adapter], a

    def dropout(self) -> float:
        """Return the probability with which inputs are dropped in this call."""
        return self.layer.drop_rate(self.adapter) if self.layer.training else 0.0

    def pair_now(self) -> tuple[Tensor, Tensor]:
        """Return `pair`; without gradients the one that is kept, while the tensors behind it are the same."""
        tensors = self.behind()
        if not tensors or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.pair()
        key = tuple(map(fingerprint, tensors))
        kept = self.layer.kept.get(self.adapter)
        if kept is None or kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                kept = self.layer.kept[self.adapter] = (key, self.pair())
        pair: tuple[Tensor, Tensor] = kept[1]
        return pair
