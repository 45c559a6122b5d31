"""`create_arrow_model`: load adapters from files onto a base, and add a router that chooses among them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peft_core import ConfigError, PeftModel

from ..config import LoraConfig
from ..layers.common import LoraLayer
from ..subconfigs import ArrowConfig

ROUTER = "arrow_router"
Place = str | os.PathLike[str]


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[Place],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[Place] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load LoRA adapters as `task_0`, `task_1`, … (and `gks_0`, …), add the adapter `arrow_router`, which routes among them, and activate it.

    The router needs no training.

    Args:
        base_model: the base; it is wrapped in place, as by `PeftModel.from_pretrained`.
        task_specific_adapter_paths: the experts: folders, or ``"user/repo"`` or ``"user/repo/subfolder"`` on the Hub.
        arrow_config: how tokens are routed; a copy of it becomes part of the router's config.
        general_adapter_paths: adapters of general knowledge, whose mean is subtracted from each expert; required with `use_gks`.
        **adapter_kwargs: keyword arguments of `PeftModel.load_adapter` (`torch_device`, `token`, ...).

    Returns:
        The model, with the router active.

    Raises:
        ConfigError: there is no expert; `top_k` is larger than the number of experts; `use_gks` is set without general adapters; the adapters have
            different targets or ranks, or are not plain LoRA. The base is then unchanged.
        others: the errors of `PeftModel.from_pretrained`.

    Example:
        >>> model = create_arrow_model(base, ["./code", "./maths", "./law"], ArrowConfig(top_k=2))
    """
    return build_arrow_model(PeftModel, base_model, task_specific_adapter_paths, arrow_config, general_adapter_paths, adapter_kwargs)


def build_arrow_model(
    kind: type[PeftModel],
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[Place],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[Place] | None,
    adapter_kwargs: Mapping[str, Any],
) -> PeftModel:
    """Do what `create_arrow_model` does, and return a model of the class `kind`."""
    tasks, general = list(task_specific_adapter_paths), list(general_adapter_paths or ())
    _check_numbers(arrow_config, tasks, general)
    places = {f"task_{i}": path for i, path in enumerate(tasks)} | {f"gks_{i}": path for i, path in enumerate(general)}
    flags = [(parameter, parameter.requires_grad) for parameter in base_model.parameters()]
    training = base_model.training
    model: PeftModel | None = None
    try:
        for name, place in places.items():
            path, options = _located(place, adapter_kwargs)
            if model is None:
                model = kind.from_pretrained(base_model, path, name, **options)
            else:
                model.load_adapter(path, name, **options)
        assert model is not None
        model.add_adapter(ROUTER, _router_config(model, arrow_config, tasks, general))
        model.set_adapter(ROUTER, inference_mode=True)
    except BaseException:
        if model is not None:
            model.unload(restore_base=True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            base_model.train(training)
        raise
    return model


def _check_numbers(arrow_config: ArrowConfig, tasks: Sequence[Place], general: Sequence[Place]) -> None:
    """Check that there are enough adapters for the router's config."""
    if not tasks:
        raise ConfigError("task_specific_adapter_paths is empty", hint="give at least one adapter")
    if arrow_config.top_k > len(tasks):
        raise ConfigError(
            f"top_k={arrow_config.top_k}, but there are {len(tasks)} adapters to choose from", hint=f"set top_k to at most {len(tasks)}"
        )
    if arrow_config.use_gks and not general:
        raise ConfigError("use_gks=True, but general_adapter_paths is empty", hint="give adapters of general knowledge, or set use_gks=False")


def _located(place: Place, options: Mapping[str, Any]) -> tuple[Place, dict[str, Any]]:
    """Return the path and the keyword arguments for `from_pretrained`; ``"user/repo/subfolder"`` is split into the repository and `subfolder`."""
    text = os.fspath(place)
    if os.path.isdir(text) or os.path.isabs(text) or text.startswith(".") or text.count("/") < 2:
        return place, dict(options)
    user, repo, subfolder = text.split("/", 2)
    return f"{user}/{repo}", {**options, "subfolder": subfolder}


def _router_config(model: PeftModel, arrow_config: ArrowConfig, tasks: Sequence[Place], general: Sequence[Place]) -> LoraConfig:
    """Return the router's config, with the targets and the rank of the adapters, which must be equal in all adapters.

    Raises:
        ConfigError: the adapters have different targets or ranks, or one of them is not plain LoRA.
    """
    configs: dict[str, Any] = dict(model.peft_config)
    _require_alike(model, configs)
    like = next(iter(configs.values()))
    router = dataclasses.replace(arrow_config)
    router.task_adapter_names = [f"task_{i}" for i in range(len(tasks))]
    router.gks_adapter_names = [f"gks_{i}" for i in range(len(general))]
    return LoraConfig(
        r=like.r,
        lora_alpha=like.lora_alpha,
        target_modules=like.target_modules,
        exclude_modules=like.exclude_modules,
        layers_to_transform=like.layers_to_transform,
        layers_pattern=like.layers_pattern,
        rank_pattern=dict(like.rank_pattern),
        fan_in_fan_out=like.fan_in_fan_out,
        task_type=like.task_type,
        inference_mode=True,
        arrow_config=router,
    )


def _require_alike(model: PeftModel, configs: Mapping[str, Any]) -> None:
    """Check that all adapters are plain LoRA with the same targets and ranks."""
    first = next(iter(configs))
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    expected = _shapes(layers, first)
    for name, config in configs.items():
        if not isinstance(config, LoraConfig):
            raise ConfigError(f"the adapter {name!r} is {config.peft_type!s}", hint="Arrow routes among LoRA adapters")
        for path, layer in layers.items():
            if name in layer.scaling and (config.lora_bias or layer.merging.shift_of(name) is not None or layer.low_rank_factors(name) is None):
                raise ConfigError(
                    f"the adapter {name!r} is more than a product B·A beside {path!r}", hint="Arrow routes among adapters such as plain LoRA"
                )
        shapes = _shapes(layers, name)
        if shapes != expected:
            path = next(path for path in (*expected, *shapes) if shapes.get(path) != expected.get(path))
            raise ConfigError(
                f"the adapters {first!r} and {name!r} do not agree on {path!r}: {expected.get(path, 'none')} and {shapes.get(path, 'none')}",
                hint="Arrow needs the same targets and ranks in all adapters",
            )


def _shapes(layers: Mapping[str, LoraLayer], adapter: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of an adapter's tensors in each layer that it adapts."""
    return {path: {key: slot.shape for key, slot in layer.slots(adapter).items()} for path, layer in layers.items() if adapter in layer.scaling}
