"""peft-lora passes the conformance suite on every kind of layer that it wraps."""

from __future__ import annotations

from peft_core.testing import TunerSuite


class TestLora(TunerSuite):
    peft_type = "LORA"
    configs = {
        "linear": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
        "embedding": {"r": 4, "target_modules": ["embed_tokens"]},
        "conv1d": {"r": 4, "target_modules": ["c_attn", "c_proj"], "base": "gpt2", "fan_in_fan_out": True},
        "rslora-patterns": {
            "r": 4,
            "use_rslora": True,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.0.*": 16},
        },
        "saved-head": {"r": 4, "target_modules": ["query", "value"], "base": "bert-seq-cls"},
    }
