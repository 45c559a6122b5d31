"""What peft-tokens offers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from peft_core.plugins import Capability, TunerSpec, hookimpl

#: some of the token ids in the inputs of the conformance suite
ROWS, OTHERS = [52, 35, 11, 13, 4], [45, 54, 16, 38, 6]


@hookimpl
def peft_tuners() -> Iterable[TunerSpec]:
    """Offer trainable tokens."""
    yield TunerSpec(
        peft_type="TRAINABLE_TOKENS",
        config="peft_tokens.config:TrainableTokensConfig",
        tuner="peft_tokens.tuner:TrainableTokensTuner",
        parameter_prefix="trainable_tokens_",
        capabilities=Capability.MERGE | Capability.PER_SAMPLE | Capability.EMBEDDING,
        examples={
            "default": {"token_indices": ROWS, "second": {"token_indices": OTHERS}},
            "named": {"token_indices": [-1, *ROWS], "target_modules": ["embed_tokens"], "second": {"token_indices": OTHERS}},
            "gpt2": {"token_indices": ROWS, "base": "gpt2", "second": {"token_indices": OTHERS}},
            "output": {"token_indices": ROWS, "target_modules": "lm_head", "second": {"token_indices": OTHERS}},
        },
    )
