"""Riemannian preconditioning of LoRA (arXiv 2402.02347): the gradient of each factor is preconditioned with the Gram matrix of the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from peft_core import ConfigError, ModelError

from .preconditioned import inverse_gram, pairs_of, preconditioned


def create_riemannian_optimizer(model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any) -> Optimizer:
    """Return an optimiser of the trainable parameters: it multiplies gradients of A by (Bᵀ·B + reg·I)⁻¹, and those of B by (A·Aᵀ + reg·I)⁻¹.

    Parameters that are not the A or B of a Linear (biases, heads, embeddings) are updated by `optimizer_cls` with their unchanged gradients.

    Args:
        model: a model with LoRA adapters.
        optimizer_cls: class of the optimiser.
        lr: learning rate.
        reg: damping; it keeps the inverses finite where a factor does not have full rank, such as B at initialisation.
        **kwargs: further arguments of `optimizer_cls` (`betas`, `weight_decay`, ...).

    Raises:
        ConfigError: `reg` is not positive.
        ModelError: the model has no trainable parameter.

    Example:
        >>> optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-4)
    """
    if not reg > 0:
        raise ConfigError(f"reg={reg!r} is not positive", hint="0.01 is a usual number")
    found = list(pairs_of(model))
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not training:
        raise ModelError("nothing in the model trains", hint="set_adapter an adapter, without inference_mode")

    def changes() -> list[tuple[nn.Parameter, Tensor]]:
        changed = []
        for _, _, a, b in found:
            if a.grad is not None:
                changed.append((a, inverse_gram(b.T, reg).to(a.grad.dtype) @ a.grad))
            if b.grad is not None:
                changed.append((b, b.grad @ inverse_gram(a, reg).to(b.grad.dtype)))
        return changed

    made: Optimizer = preconditioned(optimizer_cls, changes)(training, lr=lr, **kwargs)
    return made
