"""peft-loha passes the conformance suite."""

from __future__ import annotations

from peft_core.testing import TunerSuite


class TestLoHa(TunerSuite):
    """On the examples of its spec."""

    peft_type = "LOHA"
