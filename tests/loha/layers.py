"""One layer with a LoHa adapter whose weights are random, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_core import get_peft_model
from peft_loha import LoHaConfig


class One(nn.Module):
    """A model that is one layer, called ``target``."""

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.target(x)
        return found


def adapted(target: nn.Module, *, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """Return the model and its LoHa layer; ``s`` is not 1, and no factor is zero."""
    torch.manual_seed(seed)
    options = {"r": 3, "alpha": 5, "init_weights": False, "target_modules": ["target"], **options}
    model: Any = get_peft_model(One(target).to(dtype), LoHaConfig(**options))
    return model, model.base_model.model.target


def weights(layer: Any, adapter: str = "default") -> dict[str, Tensor]:
    """Return the adapter's tensors by the end of their name: ``w1_a``, …"""
    return {key.removeprefix("hada_"): value for key, value in layer.parameters_of(adapter).items()}


def flat_delta(layer: Any, adapter: str = "default") -> Tensor:
    """Return s·ΔW (out, in) by the sum over all pairs of components, in float64."""
    w = {key: value.detach().double() for key, value in weights(layer, adapter).items()}
    return layer.scaling[adapter] * torch.einsum("oa,ob,ai,bi->oi", w["w1_a"], w["w2_a"], w["w1_b"], w["w2_b"])


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Compare values, as parts of the largest."""
    found, expected = found.detach(), expected.detach()
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))
