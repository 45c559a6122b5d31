"""A small rectangular model and data whose principal directions are known, for the initialisations that look at data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_lora import CordaConfig, LoraConfig


class Net(nn.Module):
    """x (…, 6) → a and b, which see the same, → a Conv1D: rectangular everywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(6, 8)
        self.c = Conv1D(5, 8)
        self.idle = nn.Linear(6, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(x) * self.b(x)))


def stretched(rows: int, seed: int, spectrum: tuple[float, ...] = (9, 5, 3, 1, 0.5, 0.1)) -> Tensor:
    """Rows whose principal directions are well apart, off the origin."""
    generator = torch.Generator().manual_seed(4)
    turned = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator)).Q
    x = torch.randn(rows, len(spectrum), generator=torch.Generator().manual_seed(seed)) * torch.tensor(spectrum)
    return x @ turned + 1.5


def config(init: str, targets: Any = ("a", "b", "c"), **options: Any) -> LoraConfig:
    options = {"r": 2, "lora_alpha": 3, "fan_in_fan_out": list(targets) == ["c"], **options}
    return LoraConfig(target_modules=list(targets), init_lora_weights=init, **options)


BATCHES = [stretched(30, seed) for seed in range(8)]


def inputs_of(name: str) -> Tensor:
    """Everything that a layer sees of the data."""
    seen: list[Tensor] = []
    model = Net()
    getattr(model, name).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for batch in BATCHES:
        model(batch)
    return torch.cat(seen)


def corda(**settings: Any) -> LoraConfig:
    return config("corda", corda_config=CordaConfig(**settings))


def run(model: nn.Module, batches: list[Tensor] = BATCHES) -> Callable[[], None]:
    def call() -> None:
        for batch in batches:
            model(batch.view(2, -1, 6))

    return call
