"""peft-loha passes the conformance suite."""

from __future__ import annotations

from peft_core.testing import TunerSuite


class TestLoHa(TunerSuite):
    peft_type = "LOHA"
    configs = {
        "linear": {"r": 3, "target_modules": ["q_proj", "down_proj"]},
        "patterns": {"r": 2, "alpha": 4, "target_modules": "all-linear", "rank_pattern": {"up_proj": 3}},
        "saved-head": {"r": 2, "target_modules": ["query", "value"], "base": "bert-seq-cls"},
    }
