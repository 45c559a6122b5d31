"""LoRA-FA (arXiv 2308.03303): A is frozen, and B is updated so that s·B·A follows the gradient of the full weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_core import ConfigError, ModelError

from .. import formulas
from .preconditioned import inverse_gram, pairs_of, preconditioned

#: added to the diagonal of A·Aᵀ, so that it can be inverted
DAMPING = 1e-8


class _Adam(Optimizer):
    """AdamW that adds ε before the bias correction of the second moment, as LoRA-FA's authors do; `torch.optim.AdamW` adds ε after it."""

    def __init__(self, params: Any, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one optimiser step; parameters without a gradient are skipped. Return the loss of `closure`, or None."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, self.state[parameter], group)
        return loss

    def _move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        (first, second), count = group["betas"], state["step"]
        state["exp_avg"].lerp_(parameter.grad, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
        rate = group["lr"] * (1 - second**count) ** 0.5 / (1 - first**count)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt() + group["eps"], value=-rate)


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """Freeze A, and return an AdamW for the trainable parameters of a model that multiplies the gradient of B by (s²·A·Aᵀ)⁻¹.

    With this gradient g·(s²·A·Aᵀ)⁻¹, the change of s·B·A is as near as possible to the gradient of the full weight. Freezing A modifies the model.

    Args:
        model: a model with LoRA adapters.
        r: rank of the adapters, which must be positive; it is only checked: the computation uses the rank and alpha of each layer.
        lora_alpha: alpha of the adapters.
        lr: learning rate.
        weight_decay: weight decay of AdamW.
        use_rslora: None, or the value of `use_rslora` in the configs of the active adapters.

    Raises:
        ConfigError: `r` is not positive, or `use_rslora` differs from a config.
        ModelError: no B of an adapter is trainable.

    Example:
        >>> optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-4)
    """
    if r <= 0:
        raise ConfigError(f"r={r!r} is not positive", hint="give the rank of the config")
    formulas.scaling(lora_alpha, r, bool(use_rslora))
    found = list(pairs_of(model))
    for layer, adapter, _, _ in found:
        if use_rslora is not None and layer.use_rslora[adapter] is not use_rslora:
            raise ConfigError(f"use_rslora={use_rslora}, and the config of {adapter!r} says {layer.use_rslora[adapter]}", hint="leave use_rslora out")
    if not any(b.requires_grad for _, _, _, b in found):
        raise ModelError("no B of a LoRA adapter trains in the model", hint="set_adapter an adapter, without inference_mode")
    for _, _, a, _ in found:
        a.requires_grad_(False)

    def changes() -> list[tuple[nn.Parameter, Tensor]]:
        changed = []
        for layer, adapter, a, b in found:
            if b.grad is not None and adapter in layer.scaling:
                projected = b.grad @ inverse_gram(a, DAMPING).to(b.grad.dtype)
                changed.append((b, projected / float(layer.scaling[adapter]) ** 2 if layer.scaling[adapter] else projected))
        return changed

    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made: Optimizer = preconditioned(_Adam, changes)(training, lr=lr, weight_decay=weight_decay)
    return made
