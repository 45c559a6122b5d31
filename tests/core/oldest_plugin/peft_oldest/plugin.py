"""The tuners, by name: importing this module loads no torch."""

from __future__ import annotations

from collections.abc import Iterable

from peft_core.plugins import Capability, TunerSpec, hookimpl


@hookimpl
def peft_tuners() -> Iterable[TunerSpec]:
    yield TunerSpec(
        peft_type="OLDEST",
        config="peft_oldest.config:OldestConfig",
        tuner="peft_oldest.tuner:OldestTuner",
        parameter_prefix="oldest_",
        base_prefix="base_model.model.",
        call_arguments=(),
        tags=("oldest",),
        capabilities=Capability.MERGE | Capability.PER_SAMPLE | Capability.EMBEDDING,
    )
    yield TunerSpec(
        "OLDEST_GAIN", "peft_oldest.config:GainConfig", "peft_oldest.tuner:GainTuner", "gain_", capabilities=Capability.MERGE | Capability.PER_SAMPLE
    )
    yield TunerSpec(
        "OLDEST_CUE",
        "peft_oldest.config:CueConfig",
        "peft_oldest.prompt:CueTuner",
        "cue_",
        base_prefix="base_model.",
        call_arguments=("cue_volume",),
        capabilities=Capability.PER_SAMPLE,
    )
