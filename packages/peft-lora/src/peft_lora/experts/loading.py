"""Adapters of mixture-of-experts models of the older layout (see `fused.py`), as transformers' own loader is told of them.

The layout of a base's own file, with one module for each expert, is what transformers' conversions say; an adapter's is the same.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_core import BaseView, ConfigError, layer_filter, target_matcher

from .fused import DOWN, ELSEWHERE, GATE_UP, RENAMED, is_bare_router, shortest, widened, without_dropout

if TYPE_CHECKING:
    from ..config import LoraConfig


def adapted_config(base: BaseView, config: LoraConfig, *, shared: bool = True) -> Mapping[str, Any]:
    """Return the fields of a config that names projections of single experts, for a base that has them in one parameter; else nothing.

    A target is compared with the names that the projections had when each expert was a module: a qualified name of a dense layer is no name of
    an expert. "all-linear" means experts and routers, too, since they were linear layers.

    Args:
        base: the model.
        config: the config.
        shared: names that modules outside of the experts have, too (Qwen's shared expert), mean both; False: they mean these modules alone.

    Raises:
        ConfigError: it names only one of two projections that are one parameter now, or some of the experts only.
    """
    projections = _projections_of(_conversions_of(base.base)) if config.target_modules and base.is_transformers_model else {}
    stems = _fused_modules(base) if projections else {}
    if not stems:
        return {}
    meant = _Meaning(base, config, projections, shared=shared)
    fused = {stem: [one for one in names if one in projections and meant.parameter(stem, one, count)] for stem, (names, count) in stems.items()}
    paths = [f"{stem}.{parameter}" for stem, parameters in fused.items() for parameter in parameters]
    paths += [f"{path}.weight" for path in _routers(base, stems) if meant.router(path)]
    if not paths:
        return {}
    fields: dict[str, Any] = {"target_parameters": sorted({*(config.target_parameters or ()), *shortest(base, paths)})}
    if not meant.every_linear:
        fields["target_modules"] = _module_targets(base, config.target_modules or (), meant, paths)
    return {**fields, **(widened(config) if any(GATE_UP in found for found in fused.values()) else {}), **(without_dropout(config) if shared else {})}


class _Meaning:
    """Says which projections of experts the targets of a config mean.

    Args:
        base: the model.
        config: the config.
        projections: fused parameter → names of the projections that it is made of.
        shared: as in `adapted_config`.
    """

    def __init__(self, base: BaseView, config: LoraConfig, projections: Mapping[str, Sequence[str]], *, shared: bool) -> None:
        targets: Any = config.target_modules
        self.every_linear = _is_all_linear(targets)
        self.named = target_matcher(r"(?s:.*)" if self.every_linear else targets, "target_modules")
        self.projections = projections
        excluded, in_layers = target_matcher(config.exclude_modules, "exclude_modules"), layer_filter(config)
        saved = target_matcher([*(config.modules_to_save or ()), *base.heads], "modules_to_save")
        self._filters = excluded, saved, in_layers
        #: without a number in any name, what holds for one expert holds for all
        self.of_all = not isinstance(targets, str) and not any(re.search(r"\.\d", f".{target}") for target in targets)
        names = {name for parts in projections.values() for name in parts}
        alone = not shared and not self.every_linear
        #: names that mean modules of this base instead
        self.taken = {leaf for path in base.modules if alone and (leaf := path.rpartition(".")[2]) in names and self.named(path)}

    def parameter(self, stem: str, parameter: str, count: int) -> bool:
        """Return whether the projections of a fused parameter are meant; `count` is the number of experts in the module `stem`.

        Raises:
            ConfigError: only some of them are.
        """
        names = self.projections[parameter]
        if self.taken & {*names} or self.left_out(stem) or self.left_out(f"{stem}.{parameter}"):
            return False
        numbers = range(1 if self.every_linear or self.of_all else count)
        meant = {name: [self._means(f"{stem}.{number}.{name}") for number in numbers] for name in names}
        found = [one for experts in meant.values() for one in experts]
        if not any(found):
            return False
        if not all(found):
            given = next(name for name, experts in meant.items() if any(experts))
            what = f"{given!r} of some experts alone" if not all(meant[given]) else f"{given!r} alone"
            raise ConfigError(f"target_modules name {what}: on this base {list(names)} are one parameter, {parameter}", hint=ELSEWHERE)
        return True

    def router(self, path: str) -> bool:
        """Return whether a router is meant that is a module with a bare weight."""
        return self._means(path)

    def left_out(self, path: str) -> bool:
        """Return whether other fields of the config leave a part of the base out."""
        excluded, saved, in_layers = self._filters
        return excluded(path) or saved(path) or not in_layers(path)

    def _means(self, path: str) -> bool:
        names = _old_names(path)
        return any(map(self.named, names)) and not any(map(self.left_out, names))


def _is_all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _conversions_of(model: Any) -> Sequence[Any]:
    """Return transformers' conversions of a model; none from transformers 4, whose models with joint experts never had others."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ModuleNotFoundError:
        return ()
    found: Sequence[Any] = get_model_conversion_mapping(model)
    return found


def _projections_of(given: Sequence[Any]) -> dict[str, list[str]]:
    """Return fused parameter → names of the projections of one expert that it is made of."""
    parameters = ((_parameter_of(one), one) for one in given)
    return {parameter: [pattern.split(".")[-2] for pattern in one.source_patterns] for parameter, one in parameters if parameter is not None}


def _fused_modules(base: BaseView) -> dict[str, tuple[list[str], int]]:
    """Return path of each module that has all experts → its fused parameters, and the number of experts."""
    found: dict[str, tuple[list[str], int]] = {}
    for path, module in base.modules.items():
        names = [name for name in (GATE_UP, DOWN) if path.endswith(".experts") and module._parameters.get(name) is not None]
        if names:
            found[path] = names, len(module._parameters[names[0]])  # type: ignore[arg-type]
    return found


def _routers(base: BaseView, stems: Collection[str]) -> list[str]:
    """Return the paths of routers beside modules with all experts that are no Linear any more; `gate` is what old adapters call them."""
    beside = [f"{stem.rpartition('.')[0]}.gate" for stem in stems]
    return [path for path in beside if path in base.modules and is_bare_router(base.modules[path])]


def _old_names(path: str) -> tuple[str, ...]:
    """Return the names that a part of a mixture may have had: Mixtral and its relatives called the block in another way."""
    before, now = RENAMED
    renamed = path.replace(now, before)
    return (path,) if renamed == path else (path, renamed)


def _module_targets(base: BaseView, targets: Collection[str] | str, meant: _Meaning, paths: Sequence[str]) -> set[str]:
    """Return what of a config's targets is still a module of the base.

    Args:
        base: the model.
        targets: names, or an expression: then the modules of the base that it means.
        meant: what they mean.
        paths: the parameters that they mean, too.
    """
    routers = {path.removesuffix(".weight") for path in paths}
    modules = [path for path in base.modules if path and path not in routers]
    if isinstance(targets, str):
        return {path for path in modules if isinstance(base.modules[path], nn.Linear) and meant.named(path)}
    gone = {name for parts in meant.projections.values() for name in parts if name not in meant.taken} | {"gate"}
    return {name for name in targets if name.rpartition(".")[2] not in gone or any(f".{path}".endswith(f".{name}") for path in modules)}


def conversions(given: Sequence[Any], adapter: str, config: LoraConfig) -> list[Any]:
    """Return transformers' conversions of the base's weights, those of experts replaced by what joins the factors of an adapter.

    Args:
        given: transformers' conversions.
        adapter: name of the adapter.
        config: its config, as in the file or as `adapted_config` has it.
    """
    parameters = [*map(str, config.target_parameters or ()), *(DOWN for name in _projections_of(given).get(DOWN, ()) if _names(config, name))]
    inner = "base_layer." if any(name.endswith(DOWN) for name in parameters) else ""
    return [made for one in given for made in _of_adapter(one, adapter, inner)]


def _of_adapter(one: Any, adapter: str, inner: str) -> Iterator[Any]:
    parameter = _parameter_of(one)
    if parameter is None:
        yield one
        return
    for factor in "AB":
        end = f"lora_{factor}.{adapter}.weight"
        sources = [pattern.removesuffix("weight") + end for pattern in one.source_patterns]
        target = one.target_patterns[0].removesuffix(parameter) + (inner if parameter == GATE_UP else "") + end
        yield _converter()(sources, target, [_operation()(factor)])


def _parameter_of(one: Any) -> str | None:
    """Return which parameter of all experts a conversion makes."""
    ends = [parameter for parameter in (GATE_UP, DOWN) if one.target_patterns[0].endswith(f".experts.{parameter}")]
    return ends[0] if ends and hasattr(one, "operations") and all(".experts.*." in pattern for pattern in one.source_patterns) else None


def _names(config: LoraConfig, name: str) -> bool:
    """Return whether a config may mean a projection of experts, as far as it can be said without a base."""
    targets: Any = config.target_modules or ()
    if isinstance(targets, str):
        return _is_all_linear(targets) or any(re.fullmatch(targets, old) for old in _old_names(f"model.layers.0.mlp.experts.0.{name}"))
    return any(target.rpartition(".")[2] == name for target in targets)


def _converter() -> Any:
    from transformers.core_model_loading import WeightConverter

    return WeightConverter


@functools.cache
def _operation() -> Any:
    from transformers.core_model_loading import ConversionOps

    kind: Any = ConversionOps

    class JoinExperts(kind):  # type: ignore[misc]
        """Factors of single experts → of the joint parameter: A (E·parts·r, in), B (parts·out, parts·r·E), block-diagonal per expert."""

        def __init__(self, factor: str) -> None:
            self.factor = factor

        @torch.no_grad()
        def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any) -> dict[str, Tensor]:
            parts = list(zip(*(input_dict.pop(pattern) for pattern in source_patterns), strict=True))
            if self.factor == "A":
                return {target_patterns[0]: torch.cat([tensor for part in parts for tensor in part])}
            blocks = [torch.block_diag(*part) for part in parts]  # type: ignore[no-untyped-call]
            return {target_patterns[0]: torch.stack(blocks, dim=-1).flatten(1).contiguous()}

    return JoinExperts
