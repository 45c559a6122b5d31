"""peft-vera passes the conformance suite of peft-core."""

from __future__ import annotations

from peft_core.testing import TunerSuite


class TestVera(TunerSuite):
    peft_type = "VERA"
    configs = {
        "linear": {"r": 8, "target_modules": ["q_proj", "down_proj"]},
        "drawn-again": {"r": 8, "target_modules": ["v_proj", "up_proj"], "save_projection": False, "projection_prng_key": 7},
        "conv1d": {"r": 4, "target_modules": ["c_attn", "c_fc"], "base": "gpt2"},
        "saved-head": {"r": 4, "target_modules": ["query", "value"], "base": "bert-seq-cls"},
    }
