"""Ways to combine tensors: pruning, electing signs, weighted sums. Sources: TIES arXiv 2306.01708, DARE arXiv 2311.03099."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Return a tensor with all but the ⌊density · numel⌋ entries of largest magnitude set to zero."""
    kept = int(density * tensor.numel())
    flat = tensor.flatten()
    found = torch.zeros_like(flat)
    if kept:
        at = flat.abs().topk(min(kept, flat.numel())).indices
        found[at] = flat[at]
    return found.view(tensor.shape)


def keep_random(tensor: Tensor, density: float) -> Tensor:
    """Keep each entry with probability `density`, divided by `density` so that its expectation stays the same, and set the others to zero."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def elected_sign(tensors: Sequence[Tensor], method: str) -> Tensor:
    """Return the majority sign (±1) of each entry over all tensors: by ``"total"`` magnitude, or by ``"frequency"``. A tie gives +1."""
    stacked = torch.stack(list(tensors))
    votes = stacked.sum(0) if method == "total" else stacked.sign().sum(0)
    return torch.where(votes >= 0, 1.0, -1.0).to(stacked.dtype)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ wᵢ·tᵢ."""
    return torch.stack([tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]).sum(0)


def disjoint_mean(tensors: Sequence[Tensor], weights: Sequence[float], sign: Tensor) -> Tensor:
    """Return, for each entry, Σ wᵢ·tᵢ over the tensors that have the elected sign at this entry, divided by the number of these tensors."""
    masks = [tensor.sign() == sign for tensor in tensors]
    total = weighted_sum([tensor * mask for tensor, mask in zip(tensors, masks, strict=True)], weights)
    return total / torch.stack(masks).sum(0).clamp(min=1)


Merger = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


def merger(method: str, density: float, majority: str) -> Merger:
    """Return a function that combines several tensors into one.

    Args:
        method: ``"ties"``, ``"dare_linear"``, ``"dare_ties"`` or ``"magnitude_prune"``.
        density: share of the entries that are not set to zero; 1 or more: all.
        majority: the method of `elected_sign`, ``"total"`` or ``"frequency"``.
    """
    return partial(_merge, method, density, majority)


def _merge(method: str, density: float, majority: str, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if density < 1:
        prune = keep_random if method.startswith("dare") else keep_largest
        tensors = [prune(tensor, density) for tensor in tensors]
    if method in ("ties", "dare_ties"):
        return disjoint_mean(tensors, weights, elected_sign(tensors, majority))
    return weighted_sum(tensors, weights)
