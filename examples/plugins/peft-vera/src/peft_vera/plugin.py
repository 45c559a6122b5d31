"""What peft-vera offers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from peft_core.plugins import Capability, TunerSpec, hookimpl


@hookimpl
def peft_tuners() -> Iterable[TunerSpec]:
    """Offer VeRA."""
    yield TunerSpec(
        peft_type="VERA",
        config="peft_vera.config:VeraConfig",
        tuner="peft_vera.tuner:VeraTuner",
        parameter_prefix="vera_",
        capabilities=Capability.MERGE | Capability.PER_SAMPLE,
    )
