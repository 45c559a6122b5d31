"""peft-tokens passes the conformance suite."""

from __future__ import annotations

from peft_core.testing import TunerSuite


class TestTrainableTokens(TunerSuite):
    """On the examples of its spec."""

    peft_type = "TRAINABLE_TOKENS"
