"""peft-ia3 passes the conformance suite of peft-core."""

from __future__ import annotations

from peft_core.testing import TunerSuite


class TestIA3(TunerSuite):
    peft_type = "IA3"
    configs = {
        "outputs": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
        "feedforward": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "defaults": {},
        "conv1d": {"base": "gpt2"},
        "expression": {"target_modules": r".*\.(v_proj|up_proj)", "feedforward_modules": r".*\.up_proj"},
        "saved-head": {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"], "base": "bert-seq-cls"},
    }
