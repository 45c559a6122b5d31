"""The conformance suite on attentions and on parameters of experts, where bases of their own are needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_core.testing import TunerSuite


class AttentionNet(nn.Module):
    """Ids in, scores of 8 classes for each token out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.mha = nn.MultiheadAttention(16, 4, batch_first=True)
        self.out = nn.Linear(16, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        padding = None if attention_mask is None else attention_mask == 0
        return self.out(x + self.mha(x, x, x, key_padding_mask=padding, need_weights=False)[0])


class TestAttention(TunerSuite):
    peft_type = "LORA"
    configs = {"attention": {"r": 4, "target_modules": ["mha"], "base": "bert"}}
    expected_failures = {
        "test_two_at_once": "the suite calls a base layer with one tensor; test_attention.py adds adapters up",
        "test_hotswap": "refused: an attention's adapter has two A and two B",
    }

    def base(self, name: str) -> nn.Module:
        torch.manual_seed(0)
        return AttentionNet().eval()


class TestParameters(TunerSuite):
    peft_type = "LORA"
    configs = {"experts": {"r": 4, "target_parameters": ["gate_up_proj", "down_proj"]}}
    expected_failures = {
        "test_per_sample": "refused: a module alone knows what becomes of its rows",
        "test_two_at_once": "the suite calls a base layer with one tensor; test_parameters.py adds adapters up",
        "test_hotswap": "refused: experts have an A and a B each",
        "test_compile": "asks for rows under different adapters, too; test_parameters.py compiles without",
        "test_gradients": "the choice of experts has steps, and is computed in float32; test_parameters.py checks gradients in float64",
    }

    def base(self, name: str) -> nn.Module:
        from transformers import MixtralConfig, MixtralForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "num_local_experts": 3}
        model = MixtralForCausalLM(MixtralConfig(**sizes, initializer_range=0.15, pad_token_id=0, bos_token_id=None, eos_token_id=None)).eval()
        model.set_experts_implementation("eager")
        return model
