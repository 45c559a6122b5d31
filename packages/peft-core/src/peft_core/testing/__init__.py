"""What a tuner must pass: a conformance suite that an author subclasses in five lines, and tiny models to try things on.

Example:
    >>> class TestLoHa(TunerSuite):
    ...     peft_type = "LOHA"
    ...     configs = {"linear": {"r": 4, "target_modules": ["q_proj"]}}
"""

from __future__ import annotations

from .models import BASES, tiny
from .runner import Result, run_suite
from .suite import TunerSuite

__all__ = ["BASES", "Result", "TunerSuite", "run_suite", "tiny"]
