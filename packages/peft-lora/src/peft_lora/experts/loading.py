"""Adapters in the older layout of mixture-of-experts models (see `fused.py`): their configs, and conversions for transformers' own loader.

transformers' conversions describe how the base's checkpoint, which has one module for each expert, maps to the fused parameters. The older
adapters have the same layout as this checkpoint, so the adapter's conversions are made from those of the base.
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
    """Return the changed fields of a config that targets projections of single experts, for a base that fuses all experts into one parameter.

    The result is empty if the config or the base is not of this kind. A target is compared with the names that the projections had when each expert
    was a module, so the qualified name of a dense layer does not match an expert. "all-linear" includes the experts and the routers, since they
    were linear layers.

    Args:
        base: the model.
        config: the config.
        shared: True: a name that also matches modules outside of the experts (Qwen's shared expert) means both these modules and the experts.
            False: it means these modules only.

    Raises:
        ConfigError: the config names only one of two projections that are one fused parameter now, or only some of the experts.
    """
    stems = _fused_modules(base) if config.target_modules and base.is_transformers_model else {}
    projections = _projections_of(_conversions_of(base.base)) if stems else {}  # walks over all modules of the model, with those of all adapters
    if not projections:
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
    """Decides which projections of experts the targets of a config match.

    Args:
        base: the model.
        config: the config.
        projections: name of a fused parameter → names of the projections that it is made of.
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
        #: no target contains a number, so a target that matches one expert matches all experts, and it is enough to test one
        self.of_all = not isinstance(targets, str) and not any(re.search(r"\.\d", f".{target}") for target in targets)
        names = {name for parts in projections.values() for name in parts}
        alone = not shared and not self.every_linear
        #: names of projections that match modules of this base outside of the experts, and so do not mean experts
        self.taken = {leaf for path in base.modules if alone and (leaf := path.rpartition(".")[2]) in names and self.named(path)}

    def parameter(self, stem: str, parameter: str, count: int) -> bool:
        """Return whether the targets match the projections of a fused parameter; `count` is the number of experts in the module `stem`.

        Raises:
            ConfigError: the targets match only some of these projections.
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
        """Return whether the targets match the router at `path`, which is a module with a bare weight parameter (no Linear)."""
        return self._means(path)

    def left_out(self, path: str) -> bool:
        """Return whether `exclude_modules`, `modules_to_save` or `layers_to_transform` of the config leave the path out."""
        excluded, saved, in_layers = self._filters
        return excluded(path) or saved(path) or not in_layers(path)

    def _means(self, path: str) -> bool:
        names = _old_names(path)
        return any(map(self.named, names)) and not any(map(self.left_out, names))


def _is_all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _conversions_of(model: Any) -> Sequence[Any]:
    """Return transformers' checkpoint conversions for a model; empty under transformers 4, whose fused experts never had another layout."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ModuleNotFoundError:
        return ()
    found: Sequence[Any] = get_model_conversion_mapping(model)
    return found


def _projections_of(given: Sequence[Any]) -> dict[str, list[str]]:
    """Return name of a fused parameter → names of the projections of one expert that it is made of."""
    parameters = ((_parameter_of(one), one) for one in given)
    return {parameter: [pattern.split(".")[-2] for pattern in one.source_patterns] for parameter, one in parameters if parameter is not None}


def _fused_modules(base: BaseView) -> dict[str, tuple[list[str], int]]:
    """Return path of each module with fused experts → (names of its fused parameters, number of experts)."""
    found: dict[str, tuple[list[str], int]] = {}
    for path, module in base.modules.items():
        names = [name for name in (GATE_UP, DOWN) if path.endswith(".experts") and module._parameters.get(name) is not None]
        if names:
            found[path] = names, len(module._parameters[names[0]])  # type: ignore[arg-type]
    return found


def _routers(base: BaseView, stems: Collection[str]) -> list[str]:
    """Return the paths of routers that are no Linear any more, next to the modules with fused experts; old adapters call a router `gate`."""
    beside = [f"{stem.rpartition('.')[0]}.gate" for stem in stems]
    return [path for path in beside if path in base.modules and is_bare_router(base.modules[path])]


def _old_names(path: str) -> tuple[str, ...]:
    """Return the paths that a module of a mixture-of-experts block may have had: Mixtral and related models used another name for the block."""
    before, now = RENAMED
    renamed = path.replace(now, before)
    return (path,) if renamed == path else (path, renamed)


def _module_targets(base: BaseView, targets: Collection[str] | str, meant: _Meaning, paths: Sequence[str]) -> set[str]:
    """Return the targets of a config that still match modules of the base; for a regular expression, the paths of the Linears that it matches.

    Args:
        base: the model.
        targets: the config's targets: names, or a regular expression.
        meant: the meaning of the targets.
        paths: paths of the parameters that the targets match as well.
    """
    routers = {path.removesuffix(".weight") for path in paths}
    modules = [path for path in base.modules if path and path not in routers]
    if isinstance(targets, str):
        return {path for path in modules if isinstance(base.modules[path], nn.Linear) and meant.named(path)}
    gone = {name for parts in meant.projections.values() for name in parts if name not in meant.taken} | {"gate"}
    return {name for name in targets if name.rpartition(".")[2] not in gone or any(f".{path}".endswith(f".{name}") for path in modules)}


def conversions(given: Sequence[Any], adapter: str, config: LoraConfig) -> list[Any]:
    """Return transformers' conversions, with those for experts replaced by conversions that join the adapter's LoRA factors of all experts.

    Args:
        given: transformers' conversions for the base's weights.
        adapter: name of the adapter.
        config: the adapter's config, as in the file or with the changes that `adapted_config` returned.
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
    """Return the name of the fused parameter of all experts that a conversion produces; None if it produces none."""
    ends = [parameter for parameter in (GATE_UP, DOWN) if one.target_patterns[0].endswith(f".experts.{parameter}")]
    return ends[0] if ends and hasattr(one, "operations") and all(".experts.*." in pattern for pattern in one.source_patterns) else None


def _names(config: LoraConfig, name: str) -> bool:
    """Return whether a config's targets may match the projection `name` of experts, as far as can be decided without the base model."""
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
        """Joins the LoRA factors of single experts into those of the fused parameter.

        For E experts and `parts` projections in the parameter, A is (E·parts·r, in), and B is (parts·out, parts·r·E), block-diagonal per expert.
        """

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
