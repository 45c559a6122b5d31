"""peft-prompt passes the conformance suite with each of its methods, on decoders, on encoders with heads, and on encoder-decoder models."""

from __future__ import annotations

from peft_core.testing import TunerSuite


class TestPromptTuning(TunerSuite):
    """On the examples of its spec."""

    peft_type = "PROMPT_TUNING"


class TestPrefixTuning(TunerSuite):
    """On the examples of its spec."""

    peft_type = "PREFIX_TUNING"


class TestPTuning(TunerSuite):
    """On the examples of its spec."""

    peft_type = "P_TUNING"


class TestMultitask(TunerSuite):
    """On the examples of its spec."""

    peft_type = "MULTITASK_PROMPT_TUNING"


class TestCPT(TunerSuite):
    """On the examples of its spec."""

    peft_type = "CPT"


class TestPromptTuningOfEncoders(TunerSuite):
    peft_type = "PROMPT_TUNING"
    configs = {
        "tokens": {"num_virtual_tokens": 3, "base": "bert-token-cls"},
        "answers": {"num_virtual_tokens": 3, "base": "bert-qa"},
    }
