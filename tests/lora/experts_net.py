"""A small mixture of experts whose weights are parameters that it uses in its own way, with and without adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lora.making import shake
from peft_core import PeftModel, get_peft_model
from peft_lora import LoraConfig

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
needs_fused_experts = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="experts are modules of their own before transformers 5"
)


def mixtral() -> Any:
    """Three experts of width 24 in each of two layers."""
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3)).eval()


def qwen() -> Any:
    """Three experts of width 12 and a shared one of width 8 in each of two layers."""
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 8, "num_experts": 3, "num_experts_per_tok": 2}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SIZES, **sizes)).eval()


#: how wide one expert is
WIDTHS = {"mixtral": 24, "qwen": 12}
#: base → how to make it, the block's name in old files, old names of the pair and of what comes after it
BASES: dict[str, tuple[Callable[[], Any], str, tuple[str, str, str]]] = {
    "mixtral": (mixtral, "block_sparse_moe", ("w1", "w3", "w2")),
    "qwen": (qwen, "mlp", ("gate_proj", "up_proj", "down_proj")),
}


def config_for(name: str, **fields: Any) -> LoraConfig:
    """As it was written when each expert was a module."""
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", *BASES[name][2]], **fields})


def assert_rewritten(name: str, config: LoraConfig) -> None:
    """The names leave target_modules, the joint ones enter target_parameters; two side by side have rank 2r and the same scale."""
    # Qwen's shared expert is made of modules with these names
    left = {"q_proj", "gate_proj", "up_proj", "down_proj"} if name == "qwen" else {"q_proj"}
    assert config.target_modules == left
    assert config.target_parameters == ["down_proj", "gate_up_proj"]
    assert config.rank_pattern == {r".*\.gate_up_proj": 4}
    assert config.alpha_pattern == {r".*\.gate_up_proj": 6}


class Experts(nn.Module):
    """Two parameters for all experts, used by look-up, and a bare matrix."""

    def __init__(self, experts: int = 3, *, transposed: bool = False, width: int = 8, hidden: int = 6) -> None:
        super().__init__()
        flip = (lambda t: t.transpose(1, 2).contiguous()) if transposed else (lambda t: t)
        self.up = nn.Parameter(flip(torch.randn(experts, hidden, width)))
        self.down = nn.Parameter(flip(torch.randn(experts, width, hidden)))
        self.mix = nn.Parameter(torch.randn(experts, width))
        if transposed:
            self.is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w.transpose(1, 2) if getattr(self, "is_transposed", False) else w for w in (self.up, self.down))
        shares = (x @ self.mix.T).softmax(-1)
        return sum(shares[:, e, None] * (torch.tanh(x @ up[e].T) @ down[e].T) for e in range(up.shape[0]))


class Net(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.experts = Experts(**kwargs)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(x))


ALL = ["experts.up", "down", "mix"]


def net(**kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kwargs)


def adapted(base: nn.Module | None = None, *names: str, **options: Any) -> PeftModel:
    config = {"r": 2, "lora_alpha": 3, "target_parameters": ALL, **options}
    first, *others = names or ("default",)
    model = get_peft_model(base if base is not None else net(), LoraConfig(**config), first)
    for name in others:
        model.add_adapter(name, LoraConfig(**config))
    shake(model)
    return model.eval()
