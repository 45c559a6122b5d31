"""peft-prompt passes the conformance suite with each of its methods, on decoders and on encoders with heads."""

from __future__ import annotations

from peft_core.testing import TunerSuite


class TestPromptTuning(TunerSuite):
    """On the examples of its spec."""

    peft_type = "PROMPT_TUNING"


class TestPrefixTuning(TunerSuite):
    """On the examples of its spec."""

    peft_type = "PREFIX_TUNING"


class TestPromptTuningOfEncoders(TunerSuite):
    peft_type = "PROMPT_TUNING"
    configs = {
        "tokens": {"num_virtual_tokens": 3, "base": "bert-token-cls"},
        "answers": {"num_virtual_tokens": 3, "base": "bert-qa"},
    }
