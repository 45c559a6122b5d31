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

from peft_core import BaseView, ConfigError

from .fused import DOWN, ELSEWHERE, GATE_UP, shortest, widened

if TYPE_CHECKING:
    from ..config import LoraConfig


def adapted_config(base: BaseView, config: LoraConfig, *, shared: bool = True) -> Mapping[str, Any]:
    """Return the fields of a config that names projections of single experts, for a base that has them in one parameter; else nothing.

    Args:
        base: the model.
        config: the config.
        shared: names that modules outside of the experts have, too (Qwen's shared expert), mean both; False: they mean these modules alone.

    Raises:
        ConfigError: it names only one of two projections that are one parameter now.
    """
    stems = [path for path, module in base.modules.items() if path.endswith(".experts") and {GATE_UP, DOWN} & module._parameters.keys()]
    if not stems or not config.target_modules or not base.is_transformers_model:
        return {}
    found = _projections(_conversions_of(base.base), config)
    if not shared and any(is_named and name in base.leaf_names for named in found.values() for name, is_named in named.items()):
        return {}
    _require_whole(found)
    fused = [parameter for parameter, named in found.items() if all(named.values())]
    if not fused:
        return {}
    routers = [path for path, module in base.modules.items() if _is_router(path, module) and _names(config, "gate")]
    gone = {name for parameter in fused for name in found[parameter]} | ({"gate"} if routers else set())
    paths = [f"{stem}.{parameter}" for stem in stems for parameter in fused] + [f"{path}.weight" for path in routers]
    fields = {
        "target_modules": _module_targets(base, config.target_modules, gone),
        "target_parameters": sorted({*(config.target_parameters or ()), *shortest(base, paths)}),
    }
    return {**fields, **(widened(config) if GATE_UP in fused else {})}


def _conversions_of(model: Any) -> Sequence[Any]:
    """Return transformers' conversions of a model; none from transformers 4, whose models with joint experts never had others."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ModuleNotFoundError:
        return ()
    found: Sequence[Any] = get_model_conversion_mapping(model)
    return found


def _require_whole(found: Mapping[str, Mapping[str, bool]]) -> None:
    """Check that a config names all projections of a fused parameter, or none: `found` as of `_projections`.

    Raises:
        ConfigError: it does not.
    """
    for parameter, named in found.items():
        if 0 < sum(named.values()) < len(named):
            given = next(name for name, is_named in named.items() if is_named)
            raise ConfigError(f"target_modules name {given!r} alone: on this base {list(named)} are one parameter, {parameter}", hint=ELSEWHERE)


def _module_targets(base: BaseView, targets: Collection[str] | str, gone: Collection[str]) -> set[str]:
    """Return what of a config's targets is still a module of the base.

    Args:
        base: the model.
        targets: names, or an expression: then the modules of the base that it means.
        gone: names of projections that are parts of a parameter now.
    """
    linears = [path for path, module in base.modules.items() if isinstance(module, nn.Linear)]
    if isinstance(targets, str):
        return {path for path in linears if re.fullmatch(targets, path)}
    return {name for name in targets if name.rpartition(".")[2] not in gone or any(f".{path}".endswith(f".{name}") for path in linears)}


def conversions(given: Sequence[Any], adapter: str, config: LoraConfig) -> list[Any]:
    """Return transformers' conversions of the base's weights, those of experts replaced by what joins the factors of an adapter.

    Args:
        given: transformers' conversions.
        adapter: name of the adapter.
        config: its config, as in the file or as `adapted_config` has it.
    """
    inner = "base_layer." if any(str(name).endswith(DOWN) for name in config.target_parameters or ()) else ""
    named = _projections(given, config)
    if all(named.get(DOWN, {"": False}).values()):
        inner = "base_layer."
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


def _projections(given: Sequence[Any], config: LoraConfig) -> dict[str, dict[str, bool]]:
    """Return fused parameter → projection of one expert → whether the config names it."""
    found: dict[str, dict[str, bool]] = {}
    for one in given:
        parameter = _parameter_of(one)
        if parameter is not None:
            names = [pattern.split(".")[-2] for pattern in one.source_patterns]
            found[parameter] = {name: _names(config, name) for name in names}
    return found


def _parameter_of(one: Any) -> str | None:
    """Return which parameter of all experts a conversion makes."""
    ends = [parameter for parameter in (GATE_UP, DOWN) if one.target_patterns[0].endswith(f".experts.{parameter}")]
    return ends[0] if ends and hasattr(one, "operations") and all(".experts.*." in pattern for pattern in one.source_patterns) else None


def _names(config: LoraConfig, name: str) -> bool:
    targets: Any = config.target_modules or ()
    if isinstance(targets, str):
        examples = [f"model.layers.0.{block}.{'' if name == 'gate' else 'experts.0.'}{name}" for block in ("block_sparse_moe", "mlp")]
        return any(re.fullmatch(targets, example) for example in examples)
    return any(target.rpartition(".")[2] == name for target in targets)


def _is_router(path: str, module: nn.Module) -> bool:
    return path.endswith(".gate") and not isinstance(module, nn.Linear) and "weight" in module._parameters


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
