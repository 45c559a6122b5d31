"""What peft-lora offers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from peft_core.plugins import Capability, TunerSpec, hookimpl


@hookimpl
def peft_tuners() -> Iterable[TunerSpec]:
    """Offer LoRA."""
    yield TunerSpec(
        peft_type="LORA",
        config="peft_lora.config:LoraConfig",
        tuner="peft_lora.tuner:LoraTuner",
        parameter_prefix="lora_",
        tags=("lora",),
        capabilities=Capability.MERGE | Capability.PER_SAMPLE | Capability.EMBEDDING,
    )
