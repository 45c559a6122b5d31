"""What is compared: the base models, the two libraries, and the adapters that both know."""

from __future__ import annotations

import copy
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(hidden: int, layers: int, intermediate: int, heads: int) -> nn.Module:
    """Return a frozen Llama with random weights, the same ones each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=256,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


@dataclass(frozen=True)
class Size:
    """Dimensions of a base model."""

    hidden: int
    layers: int
    intermediate: int
    heads: int = 8

    def make(self) -> nn.Module:
        """Return a base of this size."""
        return make_base(self.hidden, self.layers, self.intermediate, self.heads)


SMALL, LARGE, SHALLOW = Size(256, 8, 688), Size(1024, 2, 2752), Size(256, 4, 688)

#: methods that wrap layers: name → config, made by either library. One line more is one more method.
VARIANTS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda lib: lib.LoraConfig(target_modules=TARGETS, r=8, lora_dropout=0.0, init_lora_weights=False),
    "lora+dropout": lambda lib: lib.LoraConfig(target_modules=TARGETS, r=8, lora_dropout=0.05, init_lora_weights=False),
    "dora": lambda lib: lib.LoraConfig(target_modules=TARGETS, r=8, use_dora=True, init_lora_weights=False),
    "loha": lambda lib: lib.LoHaConfig(target_modules=TARGETS, r=8, init_weights=False),
}

#: methods that put learned tokens before the text
PROMPTS: dict[str, Callable[[Any], Any]] = {
    "prompt-tuning": lambda lib: lib.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    "prefix-tuning": lambda lib: lib.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    "prefix-projected": lambda lib: lib.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=20, prefix_projection=True, encoder_hidden_size=256
    ),
    "p-tuning": lambda lib: lib.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, encoder_hidden_size=256),
    "p-tuning-lstm": lambda lib: lib.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=20, encoder_hidden_size=256, encoder_reparameterization_type="LSTM"
    ),
    "multitask": lambda lib: lib.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, num_tasks=4, num_ranks=2),
    "cpt": lambda lib: lib.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=list(range(1, 21)), cpt_mask=[1] * 20, cpt_tokens_type_mask=[1, 2, 3, 4] * 5
    ),
}


def libraries() -> tuple[Any, Any]:
    """Return ours, the public names of all four packages in one namespace, and the peer."""
    import peft
    import peft_core
    import peft_loha
    import peft_lora
    import peft_prompt

    names = {name: getattr(package, name) for package in (peft_core, peft_lora, peft_loha, peft_prompt) for name in package.__all__}
    return types.SimpleNamespace(**names), peft


@dataclass(frozen=True)
class Trio:
    """One adapter on equal bases: ours read from the file that the peer wrote, so that both compute the same."""

    ours: Any
    peer: Any
    base: Any

    @classmethod
    def of(cls, size: Size, config: Callable[[Any], Any], *, trainable: bool = False) -> Trio:
        """Build the three."""
        ours, peer = libraries()
        base = size.make()
        by_peer = peer.get_peft_model(copy.deepcopy(base), config(peer))
        with tempfile.TemporaryDirectory() as folder:
            by_peer.save_pretrained(folder)
            by_us = ours.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=trainable)
        return cls(by_us, by_peer, base)

    def train(self, mode: bool) -> None:
        """Put all three into training or evaluation mode."""
        for model in (self.ours, self.peer, self.base):
            model.train(mode)

    def calls(self, call: Callable[[Any], Any]) -> dict[str, Callable[[], Any]]:
        """Return one call for each of the three."""
        return {"ours": lambda: call(self.ours), "peer": lambda: call(self.peer), "base": lambda: call(self.base)}

    def max_diff(self, call: Callable[[Any], Any]) -> float:
        """Return the largest absolute difference of the logits of ours and the peer's."""
        return float((call(self.ours).logits - call(self.peer).logits).abs().max())
