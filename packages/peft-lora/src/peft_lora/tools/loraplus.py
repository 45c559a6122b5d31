"""LoRA+ (arXiv 2402.12354): B learns faster than A."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from peft_core import ConfigError, ModelError


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """Return an optimiser for a model's trainable parameters with learning rate `lr` for A and ``lr · ratio`` for B (section 4 of the paper).

    Vectors (biases, magnitudes) have the learning rate of B, and biases and norms have no weight decay. The factors of embeddings have a separate
    learning rate.

    Args:
        model: a model with LoRA adapters.
        optimizer_cls: class of the optimiser.
        lr: learning rate of A and of everything else that trains.
        loraplus_lr_ratio: learning rate of B divided by that of A; above 1 (the paper finds 16 good in many cases).
        loraplus_weight_decay: weight decay of everything but biases and norms.
        loraplus_lr_embedding: learning rate of the factors of embeddings.
        **kwargs: further arguments of `optimizer_cls` (`betas`, `eps`, ...).

    Raises:
        ConfigError: the ratio is not positive.
        ModelError: the model has no trainable parameter.

    Example:
        >>> optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=5e-5, loraplus_lr_ratio=16)
    """
    if loraplus_lr_ratio <= 0:
        raise ConfigError(f"loraplus_lr_ratio={loraplus_lr_ratio!r} is not positive", hint="the paper uses 16")
    a: list[nn.Parameter] = []
    b: list[nn.Parameter] = []
    fixed: list[nn.Parameter] = []
    embedded: list[nn.Parameter] = []
    norms = {id(p) for module in model.modules() if "norm" in type(module).__name__.lower() for p in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_embedding" in name:
            embedded.append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            (fixed if "bias" in name or id(parameter) in norms else b).append(parameter)
        else:
            a.append(parameter)
    faster = lr * loraplus_lr_ratio
    groups = [
        {"params": a, "lr": lr, "weight_decay": loraplus_weight_decay},
        {"params": embedded, "lr": loraplus_lr_embedding, "weight_decay": loraplus_weight_decay},
        {"params": b, "lr": faster, "weight_decay": loraplus_weight_decay},
        {"params": fixed, "lr": faster, "weight_decay": 0.0},
    ]
    if not any(group["params"] for group in groups):  # empty groups are not removed: training scripts use the indices of the groups
        raise ModelError("nothing in the model trains", hint="set_adapter an adapter, without inference_mode")
    optimizer: Any = optimizer_cls
    return optimizer(groups, lr=lr, **kwargs)  # type: ignore[no-any-return]
