"""What peft-prompt offers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from peft_core.plugins import Capability, TunerSpec, hookimpl


@hookimpl
def peft_tuners() -> Iterable[TunerSpec]:
    """Offer prompt tuning and prefix tuning."""
    yield TunerSpec(
        peft_type="PROMPT_TUNING",
        config="peft_prompt.config:PromptTuningConfig",
        tuner="peft_prompt.prompt_tuning:PromptTuner",
        parameter_prefix="prompt_tuning_",
        base_prefix="base_model.",
        capabilities=Capability.PER_SAMPLE,
    )
    yield TunerSpec(
        peft_type="PREFIX_TUNING",
        config="peft_prompt.config:PrefixTuningConfig",
        tuner="peft_prompt.prefix_tuning:PrefixTuner",
        parameter_prefix="prefix_tuning_",
        base_prefix="base_model.",
        capabilities=Capability.PER_SAMPLE,
    )
