"""Converts adapters of mixture-of-experts models that have one module for each expert, for a base that fuses all experts into one parameter.

transformers 5 fused the experts: `experts.0.w1`, `experts.0.w3`, … became `experts.gate_up_proj`; `experts.0.w2`, … became `experts.down_proj`; and
the router became a module with a bare weight parameter. Mixtral's names are w1, w3, w2 and `block_sparse_moe`; Qwen2-MoE and its many related models
use gate_proj, up_proj, down_proj and `mlp`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_core import BaseView, CheckpointTranslation, ConfigError, PeftWarning

if TYPE_CHECKING:
    from ..config import LoraConfig

GATE_UP, DOWN = "gate_up_proj", "down_proj"
#: old name of a projection → (fused parameter, index of the projection in it)
_PLACES = {"w1": (GATE_UP, 0), "w3": (GATE_UP, 1), "w2": (DOWN, 0), "gate_proj": (GATE_UP, 0), "up_proj": (GATE_UP, 1), "down_proj": (DOWN, 0)}
_EXPERT = re.compile(r"(?P<stem>.*\.experts)\.(?P<number>\d+)\.(?P<name>\w+)\.lora_(?P<factor>[AB])\.weight")
_ROUTER = re.compile(r"(?P<stem>.*\.gate)\.lora_[AB]\.weight")
RENAMED = (".block_sparse_moe.", ".mlp.")
ELSEWHERE = "such an adapter can be used with transformers 4 only"


@dataclass(frozen=True)
class _Fused:
    """The file's keys for one fused parameter: (index of the projection, number of the expert, ``"A"`` or ``"B"``) → key in the file."""

    parameter: str
    keys: Mapping[tuple[int, int, str], str]

    @property
    def parts(self) -> int:
        return 2 if self.parameter == GATE_UP else 1

    @property
    def experts(self) -> int:
        return 1 + max(expert for _, expert, _ in self.keys)


def translation(base: BaseView, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> CheckpointTranslation | None:
    """Return how to convert a file with one module for each expert, for this base; None if the file needs no translation.

    Args:
        base: the model.
        config: the config in the file.
        shapes: name of a tensor in the file → its shape.

    Raises:
        ConfigError: only one of two fused projections was trained, an expert is missing, or the ranks differ.
    """
    fused, routers = _fused_keys(base, shapes), _bare_routers(base, config.target_parameters or (), shapes)
    if not fused and not routers:
        return None
    for stem, parameters in fused.items():
        for one in parameters.values():
            _check(stem, one, shapes, config)
    taken = {key for parameters in fused.values() for one in parameters.values() for key in one.keys.values()}
    taken |= {key for key in shapes if (match := _ROUTER.fullmatch(key)) and _renamed(match["stem"], base.modules) in routers}

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        done = {_renamed_key(key, base.modules): tensor for key, tensor in tensors.items() if key not in taken or _ROUTER.fullmatch(key)}
        for stem, parameters in fused.items():
            for parameter, one in parameters.items():
                inner = "base_layer." if parameter == GATE_UP and DOWN in parameters else ""
                a, b = _fuse(one, tensors)
                done |= {f"{stem}.{inner}lora_A.weight": a, f"{stem}.{inner}lora_B.weight": b}
        return done

    return CheckpointTranslation(_fields(base, config, fused, routers, [key for key in shapes if key not in taken]), convert)


def _fused_keys(base: BaseView, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, _Fused]]:
    """Return path of the experts → name of a fused parameter → its keys in the file; empty if in this base, too, each expert is a module."""
    keys: dict[tuple[str, str], dict[tuple[int, int, str], str]] = {}
    for key in shapes:
        match = _EXPERT.fullmatch(key)
        if match is None or match["name"] not in _PLACES:
            continue
        stem = _renamed(match["stem"], base.modules)
        parameter, place = _PLACES[match["name"]]
        experts = base.modules.get(stem)
        if experts is not None and parameter in experts._parameters:
            keys.setdefault((stem, parameter), {})[place, int(match["number"]), match["factor"]] = key
    fused: dict[str, dict[str, _Fused]] = {}
    for (stem, parameter), found in keys.items():
        fused.setdefault(stem, {})[parameter] = _Fused(parameter, found)
    return fused


def _bare_routers(base: BaseView, known: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Return the paths of routers in the file that are no Linear any more in the base.

    A router whose weight is among the target parameters `known` is left out: the file was already saved for the newer layout of this router.
    """
    routers = set()
    for match in filter(None, map(_ROUTER.fullmatch, shapes)):
        stem = _renamed(match["stem"], base.modules)
        router = base.modules.get(stem)
        if router is not None and is_bare_router(router) and not any(f".{stem}.weight".endswith(f".{target}") for target in known):
            routers.add(stem)
    return routers


def is_bare_router(module: nn.Module) -> bool:
    """Return whether a router is a module with a bare `weight` parameter instead of a Linear."""
    return not isinstance(module, nn.Linear) and module._parameters.get("weight") is not None


def _check(stem: str, one: _Fused, shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> None:
    missing = [place for place in range(one.parts) if not any(key[0] == place for key in one.keys)]
    if missing:
        raise ConfigError(
            f"the adapter has one of the two projections that are fused into {stem}.{one.parameter} only ({next(iter(one.keys.values()))!r})",
            hint=ELSEWHERE,
        )
    wanted = {(place, expert, factor) for place in range(one.parts) for expert in range(one.experts) for factor in "AB"}
    if wanted - one.keys.keys():
        raise ConfigError(f"the adapter lacks some of the {one.experts} experts of {stem!r}", hint=ELSEWHERE)
    ranks = {shapes[key][0] for (_, _, factor), key in one.keys.items() if factor == "A"}
    if ranks != {config.r}:
        raise ConfigError(
            f"the ranks of the experts of {stem!r} are {sorted(ranks)}, and r={config.r}: experts in one parameter have one rank and one scale",
            hint=ELSEWHERE,
        )


def _fuse(one: _Fused, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (E·parts·r, in), with the rows of one expert after another, and B (parts·out, parts·r·E), which is block-diagonal for each expert.

    E is the number of experts. In the columns of B, the expert is the fastest index.
    """
    a_s, b_s = [], []
    for expert in range(one.experts):
        a_s.append(torch.cat([tensors[one.keys[place, expert, "A"]] for place in range(one.parts)]))
        b_s.append(torch.block_diag(*(tensors[one.keys[place, expert, "B"]] for place in range(one.parts))))  # type: ignore[no-untyped-call]
    return torch.cat(a_s), torch.stack(b_s, dim=-1).flatten(1).contiguous()


def _fields(
    base: BaseView, config: LoraConfig, fused: Mapping[str, Mapping[str, _Fused]], routers: set[str], others: Sequence[str]
) -> dict[str, Any]:
    """Return the changed config fields for the base with fused experts; `others` are the file's keys that do not belong to fused parameters."""
    modules = {path for key in others if (path := _renamed_key(key, base.modules).rpartition(".lora_")[0])}
    targets = config.target_modules
    if isinstance(targets, str) or targets is None:
        # the regular expression was written for module names that no longer exist: use the modules in the file instead
        new_targets: set[str] = modules
    else:
        new_targets = {target for target in targets if any(path == target or path.endswith(f".{target}") for path in modules)}
    paths = [f"{stem}.{parameter}" for stem, found in fused.items() for parameter in found]
    paths += [f"{path}.weight" for path in routers]
    fields: dict[str, Any] = {
        "target_modules": new_targets,
        "target_parameters": sorted({*(config.target_parameters or ()), *shortest(base, paths)}),
    }
    if any(GATE_UP in found for found in fused.values()):
        fields |= widened(config)
    return fields | without_dropout(config)


def widened(config: LoraConfig) -> dict[str, Any]:
    """Return `rank_pattern` and `alpha_pattern` for two fused projections of rank r: the rank becomes 2r, and the scaling stays the same."""
    alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
    key = rf".*\.{GATE_UP}"
    ranks, alphas = {key: 2 * config.r}, {key: alpha}
    return {  # patterns that the config already has keep their values and come first
        "rank_pattern": {**config.rank_pattern, **ranks, **config.rank_pattern},
        "alpha_pattern": {**config.alpha_pattern, **alphas, **config.alpha_pattern},
    }


def without_dropout(config: LoraConfig) -> dict[str, Any]:
    """Return `lora_dropout` = 0, and warn about the change: adapted parameters do not support dropout. Empty if dropout is off already.

    Only used for adapters from files: their outputs in evaluation do not depend on dropout.
    """
    if not config.lora_dropout:
        return {}
    warnings.warn(
        f"lora_dropout={config.lora_dropout} is 0 from now on: the experts are parameters on this base, whose inputs can't be dropped. "
        "This makes a difference to further training only",
        PeftWarning,
        stacklevel=7,
    )
    return {"lora_dropout": 0.0}


def shortest(base: BaseView, paths: Sequence[str]) -> list[str]:
    """Return short suffixes of the parameter paths if they match no other parameter of the base, otherwise the full paths."""
    short = sorted({path.rpartition(".")[2] if path.endswith((GATE_UP, DOWN)) else ".".join(path.split(".")[-2:]) for path in paths})
    every = [f"{name}.{parameter}" for name, module in base.modules.items() for parameter in module._parameters]
    matched = {path for path in every if any(path.endswith(f".{end}") for end in short)}
    return short if matched == set(paths) else sorted(paths)


def _renamed(path: str, known: Mapping[str, nn.Module]) -> str:
    """Return the path under which the base has this module: `path`, or `path` with Mixtral's block name replaced."""
    return path if path in known else path.replace(*RENAMED)


def _renamed_key(key: str, known: Mapping[str, nn.Module]) -> str:
    path, mark, rest = key.rpartition(".lora_")
    return f"{_renamed(path, known)}{mark}{rest}" if mark else key
