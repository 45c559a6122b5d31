"""peft-lora passes the conformance suite on every kind of layer that it wraps."""

from __future__ import annotations

from peft_core.testing import TunerSuite


class TestLora(TunerSuite):
    """On the examples of its spec."""

    peft_type = "LORA"


class TestDora(TunerSuite):
    peft_type = "LORA"
    configs = {
        "linear": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        "convolution": {"r": 4, "use_dora": True, "target_modules": ["stem", "body"], "base": "conv1d-net"},
    }
    expected_failures = {"test_gradients": "the norm counts as a constant in the gradient: arXiv 2402.09353, section 4.3"}


_SHIFTED = "what the adapter starts with leaves the base for as long as the adapter exists, in use or not"


class TestShiftedBases(TunerSuite):
    """Initialisations that take out of the base what A and B start with."""

    peft_type = "LORA"
    configs = {
        "pissa": {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"},
        "pissa-niter": {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa_niter_4"},
        "olora-transposed": {"r": 4, "target_modules": ["c_attn"], "init_lora_weights": "olora", "base": "gpt2", "fan_in_fan_out": True},
    }
    expected_failures = {"test_disable": _SHIFTED, "test_two_adapters": _SHIFTED, "test_delete": _SHIFTED}


class TestRoundedBase(TunerSuite):
    peft_type = "LORA"
    configs = {"loftq": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}}}
    expected_failures = {"test_identity_at_start": "the base is rounded, and corrected as far as r allows", "test_disable": _SHIFTED}


class TestStarts(TunerSuite):
    """Initialisations that leave the base as it is."""

    peft_type = "LORA"
    configs = {
        "orthogonal": {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "orthogonal"},
        "mica": {"r": 1, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "mica"},
        "mica-embedding": {"r": 1, "target_modules": ["embed_tokens"], "init_lora_weights": "mica"},
    }
