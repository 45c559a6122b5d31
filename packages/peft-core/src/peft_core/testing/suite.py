"""The conformance suite: each check names one behaviour that users rely on, and each capability is tested both ways."""

from __future__ import annotations

from .behaviour import BehaviourChecks
from .capabilities import CapabilityChecks
from .robustness import RobustnessChecks
from .shapes import ShapeChecks
from .soundness import SoundnessChecks


class TunerSuite(SoundnessChecks, ShapeChecks, RobustnessChecks, CapabilityChecks, BehaviourChecks):
    """Subclass it in a test file, name the tuner and a few configs; pytest collects the checks.

    Attributes and what can be overridden: see `peft_core.testing.base.SuiteBase`.

    Example:
        >>> class TestLoHa(TunerSuite):
        ...     peft_type = "LOHA"
        ...     configs = {"linear": {"r": 4, "target_modules": ["q_proj"]}}
    """
