"""KappaTune (arXiv 2506.16289): adapt the layers whose weights have the smallest condition numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import ConfigError

from .kinds import dequantize_module_weight


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Return the modules and parameters of a model whose weights have the smallest condition numbers κ = σ_max / σ_min.

    Such weights spread their knowledge over all directions, so that changing them disturbs it the least. Weights of a quantised base are dequantised.

    Args:
        model: the base; the function analyses its Linears and its experts' parameters (experts, out, in), whose κ is the mean over the experts.
        top_p: the share of the modules, and of the parameters, to return, in (0, 1]; at least one module and one parameter if the model has any.
        max_dim_size_to_analyze: weights with a larger dimension are left out.
        moe_param_suffixes: suffixes of the names of experts' parameters; None: every parameter with three dimensions in a module called `experts`.
        show_progress: show a progress bar.

    Returns:
        ``{"target_modules": [...], "target_parameters": [...]}``, sorted by κ, the smallest first; a value is None if there are no such weights. Both
        keys are fields of `LoraConfig`.

    Raises:
        ConfigError: `top_p` is out of range, or the model has no weight to analyse.

    Example:
        >>> config = LoraConfig(**find_kappa_target_modules(base, top_p=0.1, show_progress=False))
    """
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p!r} is no share", hint="give a number above 0 and up to 1")
    modules, parameters = condition_numbers(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    if not modules and not parameters:
        raise ConfigError(f"{type(model).__name__} has no Linear and no experts with sides of at most {max_dim_size_to_analyze}")
    return {
        "target_modules": smallest(modules, max(1, int(len(modules) * top_p))) or None,
        "target_parameters": smallest(parameters, max(1, int(len(parameters) * top_p))) or None,
    }


def condition_numbers(
    model: nn.Module, longest: int, suffixes: Sequence[str] | None, show_progress: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Return two dicts, name → κ for a model's Linears and for its experts' parameters. The arguments are those of `find_kappa_target_modules`."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linears = {name: module for name, module in linears.items() if max(module.in_features, module.out_features) <= longest}
    stacks = {name: value for name, value in model.named_parameters() if value.ndim == 3 and _of_experts(name, suffixes)}
    stacks = {name: value for name, value in stacks.items() if max(value.shape[-2:]) <= longest}
    found: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for name, weight in _shown([*linears.items(), *stacks.items()], show_progress):
        whole = isinstance(weight, nn.Module)
        found[0 if whole else 1][name] = condition_number(dequantize_module_weight(weight) if whole else weight)
    return found


def smallest(kappas: Mapping[str, float], count: int) -> list[str]:
    """Return the `count` names with the smallest condition numbers, the smallest first."""
    return sorted(kappas, key=kappas.__getitem__)[:count]


def condition_number(weight: Tensor) -> float:
    """Return σ_max / σ_min of a matrix (out, in), or the mean of this quotient over a stack (..., out, in); inf if a matrix is singular."""
    with torch.no_grad():
        sigma = torch.linalg.svdvals(weight.detach().float())
        return float((sigma[..., 0] / sigma[..., -1]).mean())


def _of_experts(name: str, suffixes: Sequence[str] | None) -> bool:
    return name.endswith(tuple(suffixes)) if suffixes is not None else "experts" in name.split(".")


def _shown(items: Sequence[Any], show: bool) -> Any:
    if not show:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc="condition numbers")
