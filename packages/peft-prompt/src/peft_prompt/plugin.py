"""The plugin that registers the prompt methods with peft-core. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from peft_core.plugins import Capability, TunerSpec, hookimpl


@hookimpl
def peft_tuners() -> Iterable[TunerSpec]:
    """Yield the `TunerSpec` of each prompt method."""
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
            "words": {"num_virtual_tokens": 4, "random_scale": "words"},
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
    yield TunerSpec(
        peft_type="P_TUNING",
        config="peft_prompt.config:PromptEncoderConfig",
        tuner="peft_prompt.p_tuning:PromptEncoderTuner",
        parameter_prefix="p_tuning_",
        base_prefix="base_model.",
        capabilities=Capability.PER_SAMPLE,
        examples={
            "mlp": {"num_virtual_tokens": 4, "encoder_hidden_size": 12},
            "lstm": {"num_virtual_tokens": 4, "encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"},
            "encoder": {"num_virtual_tokens": 4, "encoder_hidden_size": 12, "base": "bert-seq-cls"},
        },
    )
    yield TunerSpec(
        peft_type="MULTITASK_PROMPT_TUNING",
        config="peft_prompt.config:MultitaskPromptTuningConfig",
        tuner="peft_prompt.multitask:MultitaskPromptTuner",
        parameter_prefix="multitask_prompt_tuning_",
        base_prefix="base_model.",
        call_arguments=("task_ids",),
        capabilities=Capability.PER_SAMPLE,
        examples={
            "decoder": {"num_virtual_tokens": 4, "num_ranks": 2, "arguments": {"task_ids": [0]}},
            "scale": {"num_virtual_tokens": 4, "num_ranks": 2, "preserve_scale": True, "arguments": {"task_ids": [0]}},
            "encoder": {"num_virtual_tokens": 4, "num_ranks": 2, "base": "bert-seq-cls", "arguments": {"task_ids": [0]}},
        },
    )
    # large balls: tests compare gradients with finite differences, which a projection onto small balls would distort
    wide = {"opt_projection_epsilon": 100.0, "opt_projection_format_epsilon": 100.0}
    yield TunerSpec(
        peft_type="CPT",
        config="peft_prompt.config:CPTConfig",
        tuner="peft_prompt.cpt:CPTTuner",
        parameter_prefix="cpt_",
        base_prefix="base_model.",
        call_arguments=("input_type_mask",),
        capabilities=Capability.PER_SAMPLE,
        examples={
            "decoder": {"cpt_token_ids": [5, 6, 7, 8], "cpt_tokens_type_mask": [1, 2, 3, 2], **wide},
            "gpt2": {"cpt_token_ids": [5, 6, 7, 8], "cpt_tokens_type_mask": [1, 2, 3, 2], "base": "gpt2", **wide},
        },
    )
