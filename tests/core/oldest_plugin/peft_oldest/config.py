"""The configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft_core.config import LayerConfig, PromptLearningConfig, require_number


@dataclass
class OldestConfig(LayerConfig):
    """An outer product per layer.

    Args:
        alpha: factor of the effect.
    """

    alpha: float = 1.0

    default_peft_type: ClassVar[str | None] = "OLDEST"

    def check(self) -> None:
        super().check()
        require_number("alpha", self.alpha)


@dataclass
class GainConfig(LayerConfig):
    """A factor on the output of each layer."""

    default_peft_type: ClassVar[str | None] = "OLDEST_GAIN"


@dataclass
class CueConfig(PromptLearningConfig):
    """One learned vector, repeated."""

    default_peft_type: ClassVar[str | None] = "OLDEST_CUE"
