"""What peft-ia3 offers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from peft_core.plugins import Capability, TunerSpec, hookimpl

from .defaults import DEFAULTS


@hookimpl
def peft_tuners() -> Iterable[TunerSpec]:
    """Offer (IA)³."""
    yield TunerSpec(
        peft_type="IA3",
        config="peft_ia3.config:IA3Config",
        tuner="peft_ia3.tuner:IA3Tuner",
        parameter_prefix="ia3_",
        capabilities=Capability.MERGE | Capability.PER_SAMPLE,
        examples={
            "outputs": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
            "feedforward": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
            "defaults": {},
            "transposed": {"base": "gpt2"},
        },
    )


@hookimpl(trylast=True)  # a user's own plugin is asked before
def peft_default_targets(peft_type: str, model_type: str) -> list[str] | None:
    """Say what (IA)³ scales by default, which is not what other methods adapt."""
    row = DEFAULTS.get(model_type) if peft_type == "IA3" else None
    return list(row[0]) if row is not None else None
