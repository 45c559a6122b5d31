"""Checks of the arguments and adapters of `add_weighted_adapter`, made before it changes the model, and the config of the new adapter."""

from __future__ import annotations

import copy
import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peft_core import AdapterIndex, ConfigError
from peft_core.errors import did_you_mean, listed

from ..config import LoraConfig
from ..extensions import variant_of
from ..layers.common import LoraLayer
from ..offers import variant_specs
from . import combining
from .factorisation import KINDS

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
#: types that combine the Aᵢ with each other, and the Bᵢ with each other
BY_FACTORS = ("linear", *PRUNING)
TYPES = ("exact", "svd", "cat", *BY_FACTORS, *(f"{name}_svd" for name in PRUNING))
MAJORITIES = ("total", "frequency")
Layers = dict[str, tuple[LoraLayer, list[str]]]


@dataclass(frozen=True)
class Request:
    """The arguments of `add_weighted_adapter`."""

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    combination_type: str
    svd_rank: int | None
    svd_clamp: float | None
    svd_driver: str | None
    density: float | None
    majority_sign_method: str

    @property
    def takes_svd(self) -> bool:
        """Whether A and B come from an SVD."""
        return self.combination_type in ("exact", "svd") or self.combination_type.endswith("_svd")

    @property
    def method(self) -> str:
        """The combination type without ``"_svd"``."""
        return self.combination_type.removesuffix("_svd")

    @property
    def merger(self) -> combining.Merger:
        """The function that combines several tensors into one."""
        if self.method not in PRUNING:
            return combining.weighted_sum
        return combining.merger(self.method, float(self.density or 0), self.majority_sign_method)


def check(index: AdapterIndex, request: Request) -> Layers:
    """Check a request, and return the layers: path → (the layer, the names of the requested adapters in this layer).

    Raises:
        AdapterNotFoundError, ConfigError: an adapter does not exist, an argument is invalid, or the adapters can't be combined.
    """
    _check_arguments(request)
    index.require(*request.adapters)
    for name in request.adapters:
        _check_config(index.configs[name], name)
    _check_tokens(index, request)
    _check_saved(index, request)
    layers: Layers = {}
    for name in request.adapters:
        for (kind, path), module in index.modules_of(name):
            if kind != "LORA":
                continue
            if not isinstance(module, LoraLayer) or module.ops.kind not in KINDS:
                raise ConfigError(f"{path!r} is a {type(module).__name__}, of which no weighted sum can be made", hint="leave it out of the targets")
            _check_layer(module, name, path, request)
            layers.setdefault(path, (module, []))[1].append(name)
    embedding = next((path for path, (layer, _) in layers.items() if layer.ops.kind == "embedding"), None)
    if embedding is not None and any(index.configs[name].lora_bias for name in request.adapters):  # type: ignore[attr-defined]
        raise ConfigError(
            f"some of the adapters have lora_bias, and an embedding ({embedding!r}) has none", hint="combine them without one of the two"
        )
    if request.combination_type in BY_FACTORS and len(request.adapters) > 1:
        for path, (layer, names) in layers.items():
            ranks = {name: layer.r[name] for name in names}
            if len(set(ranks.values())) > 1:
                raise ConfigError(
                    f"combination_type={request.combination_type!r} adds A to A and B to B, and in {path!r} the ranks are {ranks}",
                    hint="use 'exact', 'svd' or 'cat'",
                )
    return layers


def _check_arguments(request: Request) -> None:
    _check_sum(request.adapters, request.weights)
    _check_method(request)
    _check_svd(request.svd_rank, request.svd_clamp)


def _check_sum(names: Sequence[str], weights: Sequence[float]) -> None:
    if not names:
        raise ConfigError("adapters is empty", hint="name at least one")
    if len(set(names)) != len(names):
        raise ConfigError(f"adapters={list(names)} names one twice", hint="add their weights")
    if len(weights) != len(names):
        raise ConfigError(f"there are {len(names)} adapters and {len(weights)} weights", hint="give one weight for each")
    for weight in weights:
        if not _is_number(weight):
            raise ConfigError(f"weights has {weight!r}", hint="give finite numbers")


def _check_method(request: Request) -> None:
    kind = request.combination_type
    if kind not in TYPES:
        raise ConfigError(f"Invalid combination_type: {kind!r}", hint=did_you_mean(str(kind), TYPES) or f"write one of {listed(TYPES, 20)}")
    if request.method in PRUNING:
        density = request.density
        if density is None or not _is_number(density):
            raise ConfigError(f"combination_type={kind!r} needs a density, not {density!r}", hint="density=0.5 keeps half of the entries")
        if density < 0 or (density == 0 and request.method.startswith("dare")):
            raise ConfigError(f"density={density}", hint="give a share of the entries that stay, in (0, 1)")
    if request.majority_sign_method not in MAJORITIES:
        raise ConfigError(f"majority_sign_method={request.majority_sign_method!r} is unknown", hint=f"write one of {listed(MAJORITIES)}")


def _check_svd(rank: Any, clamp: Any) -> None:
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ConfigError(f"svd_rank={rank!r}", hint="give a positive integer, or None for the largest rank of the adapters")
    if clamp is not None and not (_is_number(clamp) and 0 < clamp <= 1):
        raise ConfigError(f"svd_clamp={clamp!r}", hint="give a quantile in (0, 1]")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(float(value))


def _check_config(config: Any, name: str) -> None:
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"the adapter {name!r} is {config.peft_type!s}, not LORA", hint="convert_to_lora makes LoRA of it")
    if config.bias != "none":
        raise ConfigError(
            f"the adapter {name!r} trains biases of the base (bias={config.bias!r}), which belong to no adapter", hint="use bias='none'"
        )
    for field in ("target_parameters", "trainable_token_indices", "layer_replication"):
        if getattr(config, field):
            raise ConfigError(f"add_weighted_adapter does not support {field}, which the adapter {name!r} has", hint="leave the adapter out")


def _check_tokens(index: AdapterIndex, request: Request) -> None:
    """Check that all adapters act on the same tokens."""
    first, *others = request.adapters
    ours = _token_settings(index.configs[first])
    for name in others:
        theirs = _token_settings(index.configs[name])
        if ours != theirs:
            raise ConfigError(
                f"{first!r} and {name!r} act on different tokens ({ours or 'all'} and {theirs or 'all'}): no adapter does what both do",
                hint="combine adapters with the same invocation tokens",
            )


def _token_settings(config: Any) -> dict[str, Any]:
    """Return the config fields that restrict an adapter to some tokens: field → value; empty if the adapter acts on all tokens."""
    variant = variant_of(config)
    if variant is None or not variant.by_token:
        return {}
    given = {spec.field: getattr(config, spec.field) for spec in variant_specs() if spec.field is not None and hasattr(config, spec.field)}
    return {field: value for field, value in given.items() if value}


def _check_layer(layer: LoraLayer, name: str, path: str, request: Request) -> None:
    if layer.merging.shift_of(name) is not None:
        raise ConfigError(
            f"the initialisation of {name!r} took out of the base weight what it put into the adapter: it has no effect of its own to be weighted",
            hint="convert_to_lora makes plain LoRA of it; load that on the original base",
        )
    variant = layer.variants.get(name)
    if variant is not None and not variant.by_token and request.combination_type in (*BY_FACTORS, "cat"):
        raise ConfigError(
            f"combination_type={request.combination_type!r} combines A and B, which is not all of the adapter {name!r} in {path!r} ({variant.name})",
            hint="use 'exact' or 'svd', which work on whole changes of weights",
        )


def _check_saved(index: AdapterIndex, request: Request) -> None:
    """Check that the adapters' copies of each module in `modules_to_save` are all equal, or that only one adapter has a copy."""
    first: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name in request.adapters:
        for (kind, path), module in index.modules_of(name):
            if kind == "LORA":
                continue
            slots = module.slots(name)
            if path not in first:
                first[path] = (name, slots)
                continue
            other, before = first[path]
            if not all(torch.equal(slot.read(), before[end].read()) for end, slot in slots.items()):
                raise ConfigError(
                    f"{other!r} and {name!r} both save {path!r} whole, with other weights (modules_to_save): there is no weighted sum of them",
                    hint="combine adapters of which at most one saves a module",
                )


# ---- the config of the result -------------------------------------------------------------------------------------------


def combined_config(index: AdapterIndex, request: Request, layers: Layers) -> tuple[LoraConfig, dict[str, int]]:
    """Return the config of the new adapter, and its rank in each layer (path → rank). The configs of the combined adapters are not changed.

    Raises:
        ConfigError: some adapters have a regular expression as `target_modules`, others a list of names.
    """
    configs: list[Any] = [index.configs[name] for name in request.adapters]
    present = {path: [layer.r[name] for name in names] for path, (layer, names) in layers.items()}
    plain = [config.r for config in configs]
    if request.takes_svd:
        rank = request.svd_rank or max(*plain, *(r for found in present.values() for r in found))
        ranks = dict.fromkeys(layers, rank)
    elif request.combination_type == "cat":
        rank = sum(plain)
        ranks = {path: max(rank, sum(found)) for path, found in present.items()}
    else:
        ranks = {path: found[0] for path, found in present.items()}
        rank = max(set(ranks.values()), key=[*ranks.values()].count, default=plain[0])
    others = {f"^{path}": found for path, found in ranks.items() if found != rank}
    result = copy.deepcopy(configs[0]).without_initializer()
    result.r = result.lora_alpha = rank
    result.rank_pattern, result.alpha_pattern = dict(others), dict(others)
    # the effect of these settings is already part of the combined A and B
    result.use_rslora = False
    result.variant = result.plugin_settings = None
    defaults = {each.name: each.default for each in dataclasses.fields(LoraConfig)}
    for spec in variant_specs():
        if spec.field is not None and spec.field in defaults:
            setattr(result, spec.field, defaults[spec.field])
    for field, value in _token_settings(configs[0]).items():
        setattr(result, field, copy.copy(value))
    result.lora_bias = any(config.lora_bias for config in configs)
    result.inference_mode = True
    saved = dict.fromkeys(name for config in configs for name in config.modules_to_save or ())
    result.modules_to_save = list(saved) or None
    _set_targets(result, configs, list(layers))
    return result, ranks


def _set_targets(result: LoraConfig, configs: Sequence[LoraConfig], paths: list[str]) -> None:
    targets = [config.target_modules for config in configs]
    kinds = {isinstance(target, str) for target in targets}
    if len(kinds) > 1:
        raise ConfigError(
            "some of the adapters target modules by an expression (str), some by names (list)",
            hint="write the targets of all in the same way",
        )
    narrowing = [(config.exclude_modules, config.layers_to_transform, config.layers_pattern) for config in configs]
    if any(each != narrowing[0] for each in narrowing):
        # the adapters narrow their targets differently: a union of the targets would match other modules than the layers combined here
        result.target_modules = set(paths)
        result.exclude_modules = result.layers_to_transform = result.layers_pattern = None
    elif kinds == {True}:
        result.target_modules = "|".join(f"({target})" for target in dict.fromkeys(map(str, targets)))
    else:
        result.target_modules = {name for target in targets for name in target or ()}
