"""What peft-loha offers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from peft_core.plugins import Capability, TunerSpec, hookimpl


@hookimpl
def peft_tuners() -> Iterable[TunerSpec]:
    """Offer LoHa."""
    yield TunerSpec(
        peft_type="LOHA",
        config="peft_loha.config:LoHaConfig",
        tuner="peft_loha.tuner:LoHaTuner",
        parameter_prefix="hada_",
        capabilities=Capability.MERGE | Capability.PER_SAMPLE | Capability.EMBEDDING | Capability.CONV,
        examples={
            "linear": {"r": 3, "target_modules": ["q_proj", "down_proj"]},
            "patterns": {"r": 2, "alpha": 4, "target_modules": "all-linear", "rank_pattern": {"up_proj": 3}},
            "gpt2": {"r": 2, "target_modules": ["c_attn", "c_proj"], "base": "gpt2"},
            "embedding": {"r": 3, "target_modules": ["embed_tokens", "v_proj"]},
            "conv": {"r": 2, "alpha": 3, "target_modules": ["stem", "body"], "base": "conv2d-net"},
            "conv-effective": {"r": 2, "target_modules": ["stem", "body"], "use_effective_conv2d": True, "base": "conv2d-net"},
            "conv1d-effective": {"r": 3, "target_modules": ["stem", "body"], "use_effective_conv2d": True, "base": "conv1d-net"},
            "saved-head": {"r": 2, "target_modules": ["query", "value"], "base": "bert-seq-cls"},
        },
    )
