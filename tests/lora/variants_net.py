"""A small net whose layers have an adapter of one variant of LoRA, for the tests of variants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_core import PeftModel, get_peft_model
from peft_lora import LoraConfig, LoraLayer


class Two(nn.Module):
    """Two Linears; `down` has 12 inputs and 8 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(12, 8)
        self.up = nn.Linear(8, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.up(torch.tanh(self.down(x)))
        return found


def base(dtype: torch.dtype = torch.float64) -> Two:
    torch.manual_seed(0)
    return Two().to(dtype).eval()


def made(dtype: torch.dtype = torch.float64, *, seed: int = 1, name: str = "default", **fields: Any) -> PeftModel:
    """Return a model in eval mode whose adapter has random weights and a scaling of 3/4."""
    model = base(dtype)
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 3, "target_modules": ["down", "up"], "init_lora_weights": False, **fields}
    return get_peft_model(model, LoraConfig(**settings), name).eval()


def layer_of(model: nn.Module, which: str = "down") -> LoraLayer:
    found = next(module for name, module in model.named_modules() if name.endswith(which) and isinstance(module, LoraLayer))
    return found


def inputs(dtype: torch.dtype = torch.float64, rows: int = 5, features: int = 12) -> Tensor:
    return torch.randn(2, rows, features, dtype=dtype, generator=torch.Generator().manual_seed(2))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
