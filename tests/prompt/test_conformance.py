"""peft-prompt passes the conformance suite with each of its methods, on decoders and on a sequence classifier."""

from __future__ import annotations

from peft_core.testing import TunerSuite


class TestPromptTuning(TunerSuite):
    peft_type = "PROMPT_TUNING"
    neutral_start = False
    configs = {
        "llama": {"num_virtual_tokens": 4},
        "gpt2": {"num_virtual_tokens": 4, "base": "gpt2"},
        "vocabulary": {"num_virtual_tokens": 4, "prompt_tuning_init": "SAMPLE_VOCAB"},
        "bert": {"num_virtual_tokens": 4, "base": "bert-seq-cls"},
    }


class TestPrefixTuning(TunerSuite):
    peft_type = "PREFIX_TUNING"
    neutral_start = False
    configs = {
        "llama": {"num_virtual_tokens": 4},
        "gpt2": {"num_virtual_tokens": 4, "base": "gpt2"},
        "projection": {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 12},
        "zero": {"num_virtual_tokens": 4, "init_weights": "zero"},
        "bert": {"num_virtual_tokens": 4, "base": "bert-seq-cls"},
    }
