"""Adapters that took their first values out of the base, as plain LoRA of twice the rank for the original base."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_core import AdapterCheckpoint, AdapterWeightsError, ConfigError, Patterns, PeftWarning

from ..config import LoraConfig
from ..contracts import Initializer

#: ends of the keys of A and B
A_KEY, B_KEY = ".lora_A.weight", ".lora_B.weight"
#: fields that say how much of A₀ and B₀ left the base
_SAME = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def relative_to_base(adapter: str, now: AdapterCheckpoint, initial: AdapterCheckpoint, initializer: Initializer) -> AdapterCheckpoint:
    """Return the adapter [A; A₀] and [B, −B₀], whose product is BA − B₀A₀: what training changed, seen from the base before it was shifted.

    Rank and alpha grow such that the scaling stays; a variant's own tensors (DoRA's magnitudes) are right as they are.

    Args:
        adapter: its name, for messages.
        now: the adapter as it would be saved.
        initial: as it was saved when it had just been created.
        initializer: the adapter's.

    Raises:
        ConfigError: `initial` has another config, or the initialisation takes out of the base what A₀ and B₀ do not say.
        AdapterWeightsError: `initial` lacks tensors, or has them in other shapes.
    """
    config: LoraConfig = now.config
    if not initializer.subtracts_start():
        warnings.warn(
            f"the adapter {adapter!r} with init_lora_weights={config.init_lora_weights!r} left the base as it was: it is saved as it is, and "
            "path_initial_model_for_weight_conversion is of no use",
            PeftWarning,
            stacklevel=2,
        )
        return now
    _require_same(adapter, config, initial.config)
    ranks = Patterns(config.rank_pattern, "rank_pattern")
    tensors = dict(now.tensors)
    for key in [key for key in now.tensors if key.endswith(A_KEY)]:
        path = key.removesuffix(A_KEY)
        a, b = now.tensors[key], now.tensors[path + B_KEY]
        a0, b0 = (_first(adapter, initial.tensors, name, like) for name, like in ((key, a), (path + B_KEY, b)))
        stacked = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
        # a weight with fewer singular vectors than r has smaller factors, which a plain adapter of rank 2r has not
        rest = 2 * ranks.value(path.removeprefix("base_model.model."), config.r) - stacked[0].shape[0]
        tensors[key], tensors[path + B_KEY] = F.pad(stacked[0], (0, 0, 0, rest)), F.pad(stacked[1], (0, rest))
    return AdapterCheckpoint(_grown(config), tensors)


def _first(adapter: str, tensors: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
    found = tensors.get(key)
    if found is None or found.shape != like.shape:
        what = "lacks it" if found is None else f"has {tuple(found.shape)}"
        raise AdapterWeightsError(
            f"{key!r} of {adapter!r} is {tuple(like.shape)}, and the initial adapter {what}",
            hint="path_initial_model_for_weight_conversion is the folder into which this adapter was saved before training",
        )
    return found.to(like)


def _require_same(adapter: str, config: LoraConfig, initial: Any) -> None:
    differing = [name for name in _SAME if getattr(initial, name, None) != getattr(config, name)]
    if differing:
        shown = ", ".join(f"{name}={getattr(initial, name, None)!r} instead of {getattr(config, name)!r}" for name in differing)
        raise ConfigError(
            f"the initial adapter of {adapter!r} has {shown}",
            hint="path_initial_model_for_weight_conversion is the folder into which this adapter was saved before training",
        )


def _grown(config: LoraConfig) -> LoraConfig:
    """Return the config of the adapter with twice the rank and the same scalings, which starts from nothing but its file."""
    alpha = math.sqrt(2) if config.use_rslora else 2
    grown = config.without_initializer()
    grown.r = 2 * config.r
    grown.lora_alpha = alpha * config.lora_alpha  # type: ignore[assignment] # any number will do
    grown.rank_pattern = {key: 2 * value for key, value in config.rank_pattern.items()}
    grown.alpha_pattern = {key: alpha * value for key, value in config.alpha_pattern.items()}  # type: ignore[misc]
    return grown
