"""What several tests of this folder do to the models that they make."""

from __future__ import annotations

import torch
from torch import nn


def shake(model: nn.Module, seed: int = 1, size: float = 0.4) -> None:
    """Give every parameter of LoRA a random value of about this size, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
