"""Convert an adapter whose initialisation subtracted s·B₀·A₀ from the base weight into plain LoRA of twice the rank for the original base."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_core import AdapterCheckpoint, AdapterWeightsError, ConfigError, Patterns, PeftWarning, Product, Subtraction

from ..config import LoraConfig
from ..extensions import initializer_of
from .starts import shifts_of_start

#: end of the key of A → of B
PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
#: config fields that determine the rank and scaling of the product s·B₀·A₀ that was subtracted from the base
_SAME = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_PREFIX = "base_model.model."
_FOLDER = "path_initial_model_for_weight_conversion is the folder into which this adapter was saved before training"

Factors = tuple[Tensor, Tensor]


def relative_to_base(adapter: str, now: AdapterCheckpoint, initial: AdapterCheckpoint) -> AdapterCheckpoint:
    """Return the adapter [A; A₀] and [B, −B₀], whose product is BA − B₀A₀: the change by training, relative to the original base.

    The layers know which A₀ and B₀ were subtracted from the base. If no layer of this model subtracted anything, the function assumes that the A₀ and
    B₀ of `initial` were subtracted before the base was loaded: the adapter was loaded as a plain adapter onto a saved residual base.

    Rank and alpha are enlarged so that the scaling stays the same; the other tensors of a variant (DoRA's magnitudes) are not changed.

    Args:
        adapter: name of the adapter, for error messages.
        now: the adapter as it would be saved now.
        initial: the adapter as it was saved directly after its creation.

    Raises:
        ConfigError: `initial` has another config; the initialisation subtracted something else than the product of A₀ and B₀ from the base; or an A
            and its B form several products instead of one.
        AdapterWeightsError: `initial` lacks tensors, or its tensors have other shapes.
    """
    pairs = {key: key.removesuffix(a) + b for a, b in PAIRS.items() for key in now.tensors if key.endswith(a)}
    shifts = _shifts(adapter, now)
    if not shifts and not any(_is_product(initial.tensors.get(key), initial.tensors.get(other)) for key, other in pairs.items()):
        warnings.warn(
            f"the initialisation of {adapter!r} did not change the base weights, and its initial B·A is zero: the adapter is saved unconverted, and "
            "path_initial_model_for_weight_conversion has no effect",
            PeftWarning,
            stacklevel=2,
        )
        return now
    _require_same(adapter, now.config, initial.config)
    if not shifts:
        warnings.warn(
            f"the initialisation of {adapter!r} did not change the weights of this base: they are assumed to be the residual, from which the initial "
            "s·B·A was subtracted before; if this is the original base, save without path_initial_model_for_weight_conversion",
            PeftWarning,
            stacklevel=2,
        )
    tensors = dict(now.tensors)
    for key, other in pairs.items():
        path = key.removeprefix(_PREFIX).removesuffix(next(end for end in PAIRS if key.endswith(end)))
        first = _first(adapter, initial.tensors, key, now.tensors[key]), _first(adapter, initial.tensors, other, now.tensors[other])
        if shifts:
            first = _taken_out(shifts.get(path), first)
        tensors[key], tensors[other] = _stacked(path, (now.tensors[key], now.tensors[other]), first, now.config)
    return AdapterCheckpoint(_grown(now.config), tensors)


def _shifts(adapter: str, now: AdapterCheckpoint) -> dict[str, Product]:
    """Return, for each layer whose weight the initialisation changed, path → the product s·B₀·A₀ that was subtracted from the weight.

    Raises:
        ConfigError: the initialisation subtracted something else than s·B₀·A₀.
    """
    found = {}
    for path, merge in shifts_of_start(adapter, now.modules).items():
        change = merge.folds[0].change
        if not (isinstance(change, Subtraction) and isinstance(change.delta, Product)):
            initializer_of(now.config).subtracts_start()  # raises an error with a more exact message, unless the config was edited
            raise ConfigError(
                f"the initialisation of {adapter!r} subtracted a matrix from {path!r} that is not s·B·A: the adapter can't be converted for the "
                "original base",
                hint="save it without path_initial_model_for_weight_conversion, beside the base that unload(restore_base=False) returns",
            )
        found[path] = change.delta
    return found


def _is_product(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether B·A is different from zero by more than rounding errors."""
    if a is None or b is None or not (a.any() and b.any()):
        return False
    a, b = a.flatten(1).float(), b.flatten(1).float()
    if a.shape[0] != b.shape[1]:  # groups, experts: several products
        return True
    return bool((b @ a).abs().max() > 1e-5 * a.abs().max() * b.abs().max())


def _first(adapter: str, tensors: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
    found = tensors.get(key)
    if found is None or found.shape != like.shape:
        what = "lacks it" if found is None else f"has {tuple(found.shape)}"
        raise AdapterWeightsError(f"{key!r} of {adapter!r} is {tuple(like.shape)}, and the initial adapter {what}", hint=_FOLDER)
    return found.to(like)


def _taken_out(product: Product | None, like: Factors) -> Factors:
    """Return the A₀ and B₀ that were subtracted from the base weight, in the shapes of `like`; zeros if the weight was not changed."""
    if product is None:
        return torch.zeros_like(like[0]), torch.zeros_like(like[1])
    return product.a.reshape(like[0].shape).to(like[0]), product.b.reshape(like[1].shape).to(like[1])


def _stacked(path: str, now: Factors, first: Factors, config: LoraConfig) -> Factors:
    """Return [A; A₀] and [B, −B₀], with zeros up to the doubled rank.

    Raises:
        ConfigError: A and B form several products: one for each group of a convolution, or for each expert.
    """
    a, b = torch.cat([now[0], first[0]]), torch.cat([now[1], -first[1]], dim=1)
    # a weight with fewer than r singular vectors has smaller factors; a plain adapter of rank 2r needs the full shapes, so zeros are padded
    rest = 2 * Patterns(config.rank_pattern, "rank_pattern").value(path, config.r) - a.shape[0]
    if rest < 0 or a.shape[0] != b.shape[1]:
        raise ConfigError(
            f"A and B of {path!r} form several products (groups, experts), which can't be combined with the initial A and B",
            hint="save it without path_initial_model_for_weight_conversion",
        )
    return F.pad(a, (0, 0) * (a.ndim - 1) + (0, rest)), F.pad(b, (0, 0) * (b.ndim - 2) + (0, rest))


def _require_same(adapter: str, config: LoraConfig, initial: Any) -> None:
    differing = [name for name in _SAME if getattr(initial, name, None) != getattr(config, name)]
    if differing:
        shown = ", ".join(f"{name}={getattr(initial, name, None)!r} instead of {getattr(config, name)!r}" for name in differing)
        raise ConfigError(f"the initial adapter of {adapter!r} has {shown}", hint=_FOLDER)


def _grown(config: LoraConfig) -> LoraConfig:
    """Return the adapter's config with twice the rank, the same scalings and no special initialiser: its values come only from its file."""
    alpha = math.sqrt(2) if config.use_rslora else 2
    grown = config.without_initializer()
    grown.r = 2 * config.r
    grown.lora_alpha = alpha * config.lora_alpha  # type: ignore[assignment] # any number will do
    grown.rank_pattern = {key: 2 * value for key, value in config.rank_pattern.items()}
    grown.alpha_pattern = {key: alpha * value for key, value in config.alpha_pattern.items()}  # type: ignore[misc]
    return grown
