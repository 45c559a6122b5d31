"""What peft-loha offers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from peft_core.plugins import Capability, TunerSpec, hookimpl


@hookimpl
def peft_tuners() -> Iterable[TunerSpec]:
    """Offer LoHa."""
    yield TunerSpec(
        peft_type="LOHA",
        config="peft_loha.config:LoHaConfig",
        tuner="peft_loha.tuner:LoHaTuner",
        parameter_prefix="hada_",
        capabilities=Capability.MERGE | Capability.PER_SAMPLE,
    )
