"""Base class of the variants that add s·B'·A'·x, where B' and A' are computed from the stored tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from peft_core import ConfigError, are_plain

from .. import formulas
from ..contracts import InitialFactors, Variant
from ..kernels import add_product, add_scaled
from ..layers.modules import dtype_of

if TYPE_CHECKING:
    from ..config import LoraConfig


def refuse_computed_starts(start: InitialFactors, config: LoraConfig, name: str, why: str) -> None:
    """Check that the initialiser fills A and B with random values or zeros, which is possible for any shape.

    Raises:
        ConfigError: the initialiser computes A or B from other tensors, or changes the base weight.
    """
    if isinstance(start.a, Tensor) or isinstance(start.b, Tensor) or start.base_offset is not False:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} does not work with {name}: {why}", hint="use True, False or 'gaussian', or plain LoRA"
        )


class LowRank(Variant):
    """ΔW = s·B'·A'. If A' or B' differs from the stored A and B, a subclass overrides `pair` and `between`.

    A subclass sets `worth_caching` to True if `pair` computes more than a look-up."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    worth_caching: ClassVar[bool] = False

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A' (r, in) and B' (out, r), differentiable with respect to the stored tensors."""
        found: tuple[Tensor, Tensor] = self.layer.factors(self.adapter)
        return found

    def between(self, hidden: Tensor) -> Tensor:
        """Return the input of B (…, r), from `hidden` (…, r), the output of A; used where A and B are called as modules. Default: `hidden`."""
        return hidden

    def contribute(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s·B'A'·drop(x), plus the term of B's bias if `lora_bias` is set."""
        layer: Any = self.layer
        down, up = layer.factor_modules(self.adapter)
        s = layer.scaling[self.adapter]
        dropout = layer.dropout_of(self.adapter)
        if are_plain(down, up, *(() if dropout is None else (dropout,))):
            y = add_product(y, x, *self.cached_factors(), s, self.dropout())
            found: Tensor = layer.with_beta(self.adapter, y)
            return found
        x = layer.cast_input(x, dtype_of(down, x))
        return add_scaled(y, up(self.between(down(x if dropout is None else dropout(x)))), s)

    def delta(self) -> Tensor:
        """Return s·B'A' (out, in)."""
        a, b = self.pair()
        return formulas.delta(a, b, self.layer.scaling[self.adapter])

    def low_rank_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return s·B' (out, r) and A' (r, in)."""
        a, b = self.pair()
        return b * self.layer.scaling[self.adapter], a

    def dropout(self) -> float:
        """Return the dropout probability of the inputs in this call."""
        found: float = self.layer.drop_rate(self.adapter)
        return found

    def cached_factors(self) -> tuple[Tensor, Tensor]:
        """Return the result of `pair`; if `worth_caching`, an open cache scope computes it only once in evaluation."""
        layer: Any = self.layer
        scope = layer.selection.cache() if self.worth_caching and not layer.training else None
        return self.pair() if scope is None else scope.get(("factors", layer, self.adapter), self.pair)
