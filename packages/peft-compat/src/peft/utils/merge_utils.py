"""Functions that combine the tensors of several adapters (task tensors) with the methods of `peft_lora.add_weighted_adapter`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from peft_core.errors import ConfigError
from peft_lora.tools import combining

Sign = Literal["total", "frequency"]


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """Return `weights` (tasks,) reshaped to (tasks, 1, ..., 1), so that they broadcast over `task_tensors` (tasks, ...)."""
    return weights.view(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """Return `tensor`, of any shape, with the share `density` of its entries with the largest magnitude unchanged and all other entries set to 0."""
    return combining.keep_largest(tensor, density)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Return `tensor`, of any shape, with each entry set to 0 with probability 1 - `density`; if `rescale`, the others are divided by `density`."""
    found = combining.keep_random(tensor, density)
    return found if rescale else found * density


def prune(tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False) -> Tensor:
    """Return a tensor of the same shape in which only a share of the entries is not set to 0.

    Args:
        tensor: a tensor of any shape.
        density: the share of entries that are not set to 0; at least 0. With 1 or more, `tensor` is returned unchanged.
        method: which entries are not set to 0: ``"magnitude"``: those with the largest magnitude; ``"random"``: random entries.
        rescale: for ``"random"``, divide the remaining entries by `density`, which preserves the mean.

    Raises:
        ConfigError: `density` is negative, or `method` is unknown.
    """
    if density >= 1:
        return tensor
    if density < 0:
        raise ConfigError(f"Density should be >= 0, got {density}", hint="give a share")
    if method not in ("magnitude", "random"):
        raise ConfigError(f"Unknown method {method}", hint="write 'magnitude' or 'random'")
    return magnitude_based_pruning(tensor, density) if method == "magnitude" else random_pruning(tensor, density, rescale)


def calculate_majority_sign_mask(tensor: Tensor, method: Sign = "total") -> Tensor:
    """Return a bool mask (tasks, ...): True for each entry of `tensor` (tasks, ...) that has the majority sign of its position.

    `method` says how the majority sign is found: by the total magnitude (``"total"``) or by the number of tasks (``"frequency"``).
    """
    sign = tensor.sign()
    return sign == combining.elected_sign(list(tensor), method)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """Return the mean over tasks, of shape (...), of the entries of `task_tensors` (tasks, ...) where `majority_sign_mask` (tasks, ...) is True."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp(min=1)


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """Return the weighted sum of `task_tensors`, which all have the same shape, with the factors `weights` (tasks,)."""
    stacked = torch.stack(task_tensors)
    return (stacked * reshape_weight_task_tensors(stacked, weights)).sum(0)


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """Return the weighted sum, with the factors `weights` (tasks,), of `task_tensors` of equal shapes after magnitude pruning to `density`.

    In each tensor, only the share `density` of the entries with the largest magnitude is used.
    """
    return task_arithmetic([prune(tensor, density, "magnitude") for tensor in task_tensors], weights)


def ties(task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: Sign = "total") -> Tensor:
    """Return the task tensors merged with TIES.

    Args:
        task_tensors: one tensor per task, all of the same shape.
        weights: the factors of the tasks, (tasks,).
        density: the share of each tensor's entries, those with the largest magnitude, that are not set to 0.
        majority_sign_method: how the majority sign of an entry is found: ``"total"`` or ``"frequency"``.
    """
    return _with_signs([prune(tensor, density, "magnitude") for tensor in task_tensors], weights, majority_sign_method)


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """Return the task tensors merged with DARE: the weighted sum (factors `weights`, (tasks,)) of randomly pruned tensors.

    In each of the `task_tensors`, which have equal shapes, a random share `density` of the entries is used and rescaled by 1 / `density`.
    """
    return task_arithmetic([prune(tensor, density, "random", rescale=True) for tensor in task_tensors], weights)


def dare_ties(task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: Sign = "total") -> Tensor:
    """Return the task tensors merged with TIES, but with random pruning and rescaling as in DARE.

    `task_tensors`, `weights`, `density` (the share of random entries), `majority_sign_method` and all shapes are the same as in `ties`.
    """
    return _with_signs([prune(tensor, density, "random", rescale=True) for tensor in task_tensors], weights, majority_sign_method)


def _with_signs(tensors: list[Tensor], weights: Tensor, method: Sign) -> Tensor:
    stacked = torch.stack(tensors)
    mask = calculate_majority_sign_mask(stacked, method)
    return disjoint_merge(stacked * reshape_weight_task_tensors(stacked, weights), mask)
