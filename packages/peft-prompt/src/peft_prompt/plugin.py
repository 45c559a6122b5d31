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
        examples={
            "decoder": {"num_virtual_tokens": 4},
            "gpt2": {"num_virtual_tokens": 4, "base": "gpt2"},
            "vocabulary": {"num_virtual_tokens": 4, "prompt_tuning_init": "SAMPLE_VOCAB"},
            "encoder": {"num_virtual_tokens": 4, "base": "bert-seq-cls"},
        },
    )
    yield TunerSpec(
        peft_type="PREFIX_TUNING",
        config="peft_prompt.config:PrefixTuningConfig",
        tuner="peft_prompt.prefix_tuning:PrefixTuner",
        parameter_prefix="prefix_tuning_",
        base_prefix="base_model.",
        capabilities=Capability.PER_SAMPLE,
        examples={
            "decoder": {"num_virtual_tokens": 4},
            "gpt2": {"num_virtual_tokens": 4, "base": "gpt2"},
            "projection": {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 12},
            "zero": {"num_virtual_tokens": 4, "init_weights": "zero"},
            "encoder": {"num_virtual_tokens": 4, "base": "bert-seq-cls"},
        },
    )
