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
        examples={
            "linear": {"r": 8, "target_modules": ["q_proj", "down_proj"]},
            "drawn-again": {"r": 8, "target_modules": ["v_proj", "up_proj"], "save_projection": False, "projection_prng_key": 7},
            "transposed": {"r": 4, "target_modules": ["c_attn", "c_fc"], "base": "gpt2"},
        },
    )
