"""`LoHaConfig`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft_core.config import LayerConfig, require_number, require_positive_integer, require_probability
from peft_core.errors import ConfigError, did_you_mean

ROWS_OR_COMPONENTS = ("rows", "components")


@dataclass
class LoHaConfig(LayerConfig):
    """LoHa: ΔW = (alpha/r)·(w1_a w1_b) ⊙ (w2_a w2_b), of rank up to r² with 2r(out + in) parameters.

    Besides the fields of `LayerConfig`:

    Args:
        r: rank of each of the two products.
        alpha: numerator of the scaling.
        rank_dropout: in training each output row of ΔW is dropped with this probability, in [0, 1); the other rows are divided by the share
            of rows that remain.
        module_dropout: in training the adapter is skipped with this probability for a whole call, in [0, 1].
        use_effective_conv2d: use the Tucker form for convolutions with a kernel larger than 1 (Conv1d, Conv2d and Conv3d).
        init_weights: True: w2_b is zero, so that a new adapter changes nothing; False: all random.
        rank_dropout_on: ``"rows"``: `rank_dropout` as described above; ``"components"``: it drops each of the r components of both products with
            probability p and divides by 1 − p, as the name `rank_dropout` suggests. Other software that reads this file format does not know this
            field.

    Raises:
        ConfigError: a bad value.

    Source: FedPara, arXiv 2108.06098.
    """

    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    rank_dropout_on: str = "rows"

    default_peft_type: ClassVar[str | None] = "LOHA"
    additional: ClassVar[frozenset[str]] = frozenset({"rank_dropout_on"})

    def check(self) -> None:
        """Check each field separately.

        Raises:
            ConfigError: a bad value.
        """
        super().check()
        require_positive_integer("r", self.r)
        require_number("alpha", self.alpha)
        require_probability("rank_dropout", self.rank_dropout)
        require_probability("module_dropout", self.module_dropout, one=True)
        if self.rank_dropout_on not in ROWS_OR_COMPONENTS:
            hint = did_you_mean(str(self.rank_dropout_on), ROWS_OR_COMPONENTS) or f"write one of {ROWS_OR_COMPONENTS}"
            raise ConfigError(f"rank_dropout_on={self.rank_dropout_on!r} is unknown", hint=hint)
