"""A small mixture of experts whose weights are parameters that it uses in its own way, with and without adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora.making import shake
from peft_core import PeftModel, get_peft_model
from peft_lora import LoraConfig


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
