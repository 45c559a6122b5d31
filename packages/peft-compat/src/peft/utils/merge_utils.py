"""Ways to combine tensors of several adapters, as `peft_lora.add_weighted_adapter` does."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from peft_core.errors import ConfigError
from peft_lora.tools import combining

Sign = Literal["total", "frequency"]


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """Return `weights` (tasks,) with further dimensions of 1, so that they multiply `task_tensors` (tasks, ...)."""
    return weights.view(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """Return `tensor`, of any shape, with all but the share `density` of largest magnitude set to 0."""
    return combining.keep_largest(tensor, density)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Return `tensor`, of any shape, of which each entry stays with probability `density`, divided by it if `rescale`."""
    found = combining.keep_random(tensor, density)
    return found if rescale else found * density


def prune(tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False) -> Tensor:
    """Return a tensor with only a share of its entries.

    Args:
        tensor: of any shape; `density`: the share, from 0 on; 1 or more: all.
        density: as said.
        method: which stay: the largest, or any.
        rescale: of random ones, keep the mean.

    Raises:
        ConfigError: `density` is negative, or another method.
    """
    if density >= 1:
        return tensor
    if density < 0:
        raise ConfigError(f"Density should be >= 0, got {density}", hint="give a share")
    if method not in ("magnitude", "random"):
        raise ConfigError(f"Unknown method {method}", hint="write 'magnitude' or 'random'")
    return magnitude_based_pruning(tensor, density) if method == "magnitude" else random_pruning(tensor, density, rescale)


def calculate_majority_sign_mask(tensor: Tensor, method: Sign = "total") -> Tensor:
    """Return where `tensor` (tasks, ...) has the sign that most tasks have, by magnitude (``"total"``) or number, in `method`; bool (tasks, ...)."""
    sign = tensor.sign()
    return sign == combining.elected_sign(list(tensor), method)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """Return the sum of `task_tensors` (tasks, ...) where `majority_sign_mask`, of that shape, divided by how many these are: (...)."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp(min=1)


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """Return the sum of `task_tensors`, of one shape each, times `weights` (tasks,)."""
    stacked = torch.stack(task_tensors)
    return (stacked * reshape_weight_task_tensors(stacked, weights)).sum(0)


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """Return the sum of the largest entries, a share `density`, of `task_tensors`, of one shape each, times `weights` (tasks,)."""
    return task_arithmetic([prune(tensor, density, "magnitude") for tensor in task_tensors], weights)


def ties(task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: Sign = "total") -> Tensor:
    """Return what TIES makes of tensors.

    Args:
        task_tensors: of one shape each.
        weights: (tasks,).
        density: which share of each tensor stays.
        majority_sign_method: how the sign of an entry is elected.
    """
    return _with_signs([prune(tensor, density, "magnitude") for tensor in task_tensors], weights, majority_sign_method)


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """Return the sum of random entries, a share `density`, rescaled, of `task_tensors`, of one shape each, times `weights` (tasks,)."""
    return task_arithmetic([prune(tensor, density, "random", rescale=True) for tensor in task_tensors], weights)


def dare_ties(task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: Sign = "total") -> Tensor:
    """Return what DARE with TIES' signs makes of tensors; `task_tensors`, `weights`, `density`, `majority_sign_method` and shapes as in `ties`."""
    return _with_signs([prune(tensor, density, "random", rescale=True) for tensor in task_tensors], weights, majority_sign_method)


def _with_signs(tensors: list[Tensor], weights: Tensor, method: Sign) -> Tensor:
    stacked = torch.stack(tensors)
    mask = calculate_majority_sign_mask(stacked, method)
    return disjoint_merge(stacked * reshape_weight_task_tensors(stacked, weights), mask)
