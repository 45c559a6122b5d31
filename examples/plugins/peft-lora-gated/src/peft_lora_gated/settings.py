"""The settings of the variant. Imports no torch: configs are made without it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GateSettings:
    """Settings of gated LoRA.

    Args:
        start: what the gate g is at first, at least 0.
        penalty: weight of g² in `gate_penalty`.

    Raises:
        ValueError: `start` is negative.
    """

    start: float = 1.0
    penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ValueError(f"start={self.start} is negative")
