"""KappaTune (arXiv 2506.16289): adapt the layers whose weights have the smallest condition numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import ConfigError


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Return the modules and parameters of a model whose weights have the smallest condition numbers κ = σ_max / σ_min.

    Such weights spread what they know over all directions, so that changing them disturbs the least.

    Args:
        model: the base; its Linears are looked at, and parameters of experts (experts, out, in), whose κ is the mean over experts.
        top_p: which share of all of them to take, in (0, 1]; at least one is taken.
        max_dim_size_to_analyze: weights with a longer side are left out.
        moe_param_suffixes: ends of the names of experts' parameters; None: every parameter with three dimensions in a module called `experts`.
        show_progress: show a progress bar.

    Returns:
        ``{"target_modules": [...], "target_parameters": [...]}``, the smallest κ first; None where there is none. Both are fields of `LoraConfig`.

    Raises:
        ConfigError: `top_p` is out of range, or there is no weight to look at.

    Example:
        >>> config = LoraConfig(**find_kappa_target_modules(base, top_p=0.1, show_progress=False))
    """
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p!r} is no share", hint="give a number above 0 and up to 1")
    weights: list[tuple[str, bool, Tensor]] = [(name, True, module.weight) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights += [(name, False, value) for name, value in model.named_parameters() if value.ndim == 3 and _of_experts(name, moe_param_suffixes)]
    fitting = [entry for entry in weights if max(entry[2].shape[-2:]) <= max_dim_size_to_analyze]
    if not fitting:
        raise ConfigError(f"{type(model).__name__} has no Linear and no experts with sides of at most {max_dim_size_to_analyze}")
    kappas = [(condition_number(weight), name, whole) for name, whole, weight in _shown(fitting, show_progress)]
    chosen = sorted(kappas, key=lambda entry: entry[0])[: max(1, int(len(kappas) * top_p))]
    return {
        "target_modules": [name for _, name, whole in chosen if whole] or None,
        "target_parameters": [name for _, name, whole in chosen if not whole] or None,
    }


def condition_number(weight: Tensor) -> float:
    """Return σ_max / σ_min of a matrix (out, in), or the mean of them over a stack (..., out, in); inf where a matrix is singular."""
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
