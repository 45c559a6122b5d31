"""peft-lora passes the conformance suite on every kind of layer that it wraps."""

from __future__ import annotations

import torch
from torch import Tensor

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


class TestTied(TunerSuite):
    """An embedding and its output layer with one A and one B."""

    peft_type = "LORA"
    configs = {"tied": {"r": 4, "target_modules": ["wte"], "base": "gpt2", "ensure_weight_tying": True}}
    expected_failures = {"test_hotswap": "one of the layers has no weights of its own to swap"}


class TestVariants(TunerSuite):
    """Variants whose effect is a product B·A of what is stored."""

    peft_type = "LORA"
    configs = {
        "bdlora": {
            "r": 4,
            "target_modules": ["q_proj", "down_proj"],
            "use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["down_proj"], "nblocks": 2, "match_strict": False},
        },
        "velora": {"r": 4, "target_modules": ["q_proj", "down_proj"], "velora_config": {"num_groups": 4}},
    }


class TestQaLora(TunerSuite):
    peft_type = "LORA"
    configs = {
        "transposed": {"r": 4, "target_modules": ["c_attn"], "base": "gpt2", "fan_in_fan_out": True, "use_qalora": True, "qalora_group_size": 8},
    }
    expected_failures = {"test_shapes": "inputs that are no multiple of the group size are refused"}


class TestKasa(TunerSuite):
    peft_type = "LORA"
    configs = {"linear": {"r": 4, "target_modules": ["q_proj", "down_proj"], "kasa_config": {}}}
    neutral_start = False
    expected_failures = {
        "test_disable": "the smallest components are out of the base for as long as the adapter exists, in use or not",
        "test_shapes": "layers with fewer singular components than r are refused",
    }


class TestMonteclora(TunerSuite):
    peft_type = "LORA"
    configs = {"linear": {"r": 4, "target_modules": ["q_proj", "down_proj"], "monteclora_config": {"num_samples": 3}}}
    expected_failures = dict.fromkeys(
        ("test_has_an_effect", "test_gradients", "test_safe_merge_refuses_nan", "test_shapes"),
        "the parameters of the distribution act in training only",
    )


class TestAlora(TunerSuite):
    peft_type = "LORA"
    configs = {"linear": {"r": 4, "target_modules": ["q_proj", "down_proj"], "alora_invocation_tokens": [63, 62]}}
    expected_failures = {
        "test_merge": "no change of the base weight acts on some tokens only",
        "test_unmerge_is_exact": "as above",
        "test_merging_in_a_cache_scope": "as above",
        "test_shapes": "a layer by itself has no tokens in which an invocation could stand",
        "test_two_at_once": "it asks layers by themselves; see test_two_in_use_act_each_from_its_own_invocation_on",
    }

    def inputs(self, name: str, rows: int = 3) -> dict[str, Tensor]:
        """Return inputs with an invocation in each row."""
        found = super().inputs(name, rows)
        found["input_ids"][:, 2:4] = torch.tensor([63, 62])
        return found
