"""EVA (arXiv 2410.07170): A starts with the principal components of a layer's inputs.

The ranks are distributed over the layers by how much variance their components explain.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import BaseView, ConfigError, InitOptions, PeftModel, PeftWarning, is_conv1d, remove_from_modules, require_index
from peft_core.errors import did_you_mean, listed

from ...config import LoraConfig
from ...contracts import LoraSettings
from ...layers.common import LoraLayer
from ...layers.linear import Linear
from ...planning.target_resolution import planned
from ...subconfigs import EvaConfig
from .initializer import Directions, Eva
from .inputs import eva_config, forward_fn_dict, prepare_layer_inputs_fn_language_modeling, prepare_model_inputs_fn_language_modeling
from .passes import Inputs, LayerStatistics, digest, distribute

__all__ = [
    "forward_fn_dict",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "prepare_layer_inputs_fn_language_modeling",
    "prepare_model_inputs_fn_language_modeling",
]
#: default maximum number of passes over the data; directions that have not converged by then are used nevertheless
MAX_PASSES = 10


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Inputs = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    max_passes: int = MAX_PASSES,
) -> dict[str, Tensor]:
    """Return the principal directions that A of each layer is to start with; how many a layer gets depends on how much variance they explain.

    Args:
        model: a `PeftModel`, or, with `peft_config`, a model without adapters.
        dataloader: gives the batches; must be iterable several times.
        peft_config: the LoRA config; None: the config of the adapter in the `PeftModel`.
        forward_fn: calls the model with a batch.
        prepare_model_inputs_fn: maps (batch, config) to the second argument of `prepare_layer_inputs_fn`; None: the batch itself.
        prepare_layer_inputs_fn: maps (a layer's positional arguments, what `prepare_model_inputs_fn` returned, the layer's name) to a tensor
            (tokens, features); one function for all layers, or a dict by layer name; None: the whole input, flattened.
        adapter_name: name of the adapter in the `PeftModel`.
        gather_distributed_inputs: with torch.distributed: use the rows of all processes.
        show_progress_bar: show a progress bar, if tqdm is installed.
        max_passes: maximum number of passes over the data; after it, directions that have not converged are used nevertheless, with a warning.

    Returns:
        dict from layer name to a tensor (rank, features) in float32 with orthonormal rows (with `whiten`, each row is divided by the square root
        of its singular value). For a `PeftModel`, the names begin with `base_model.model.`. A rank may be 0.

    Raises:
        ConfigError: there is no EVA config, no layer that EVA can initialise, no data, or not enough data.
    """
    config = _config(model, peft_config, adapter_name)
    settings = eva_config(config)
    statistics = _statistics(model, config, adapter_name, settings, prepare_layer_inputs_fn, gather_distributed_inputs)
    budget = sum(stats.rank for stats in statistics)
    bar = _progress_bar(budget, show_progress_bar)
    with _evaluation_mode(model), bar:
        for batch in _batches(dataloader, max_passes):
            if batch is None:  # the end of a pass
                _require_enough_tokens(statistics)
                continue
            prepared = batch if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)
            _analyse(statistics, prepared, functools.partial(forward_fn, model, batch), settings.tau)
            distribute(statistics, budget)
            bar.update(sum(stats.converged for stats in statistics) - bar.n)
            if all(stats.settled for stats in statistics if stats.leads):
                break
        else:
            moving = listed([stats.name for stats in statistics if stats.leads and not stats.settled], 4)
            message = f"EVA: after {max_passes} passes over the data the directions of {moving} have not converged (tau={settings.tau})"
            warnings.warn(message, PeftWarning, stacklevel=2)
    return {stats.name: stats.result(settings.whiten) for stats in statistics}


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Inputs = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    max_passes: int = MAX_PASSES,
) -> None:
    """Set A of each layer to the directions that EVA finds, and the layer's rank to the number of these directions.

    Create the optimiser afterwards: parameters may be replaced.

    A layer whose rank changes gets new parameters and, with `adjust_scaling_factors`, a new alpha, so that its scaling does not change. The
    adapter is removed from a layer whose rank becomes 0. The modules, their ranks and their alphas are written to the config, so that the
    adapter can be saved and loaded like any other.

    Args:
        model: a `PeftModel` with an adapter whose `init_lora_weights` is "eva".
        dataloader: as for `get_eva_state_dict`; not needed with `eva_state_dict`.
        eva_state_dict: the result of `get_eva_state_dict`; layers that are not in it are initialised as with `init_lora_weights=True`, with a
            warning.
        forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name, gather_distributed_inputs, show_progress_bar, max_passes: as
            for `get_eva_state_dict`.

    Raises:
        ConfigError: the model is not suitable, or the tensors do not fit its layers; the model is unchanged then.
    """
    config = _config_to_start(model, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("neither dataloader nor eva_state_dict is given", hint="EVA needs data")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
            max_passes=max_passes,
        )
    layers = _layers(model, adapter_name)
    _check_directions(eva_state_dict, layers)
    absent = [name for name in layers if name not in eva_state_dict]
    if absent:
        warnings.warn(f"EVA: there are no directions for {listed(absent, 4)}, which start as with init_lora_weights=True", PeftWarning, stacklevel=2)
    for name, layer in layers.items():
        rows = eva_state_dict.get(name)
        if rows is None or rows.shape[0]:
            _initialize_layer(layer, adapter_name, config, _name_in_base(name), rows)
    remove_from_modules(require_index(model), adapter_name, [_name_in_base(name) for name, rows in eva_state_dict.items() if not rows.shape[0]])
    _update_config(config, {_name_in_base(name): layer for name, layer in layers.items() if adapter_name in layer.scaling}, adapter_name)


# ---- config and layers --------------------------------------------------------------------------------------------------
def _config(model: nn.Module, given: LoraConfig | None, adapter: str) -> LoraConfig:
    config: Any = given if given is not None else (getattr(model, "peft_config", None) or {}).get(adapter)
    if config is None:
        raise ConfigError(f"there is no config for the adapter {adapter!r}", hint="pass peft_config, or a PeftModel that has this adapter")
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"EVA is for LoRA, and the config is a {type(config).__name__}")
    return config


def _config_to_start(model: nn.Module, adapter: str) -> LoraConfig:
    """Return the config of an adapter, after checking that EVA can initialise this adapter.

    Raises:
        ConfigError: the model is no `PeftModel` or does not have exactly one active adapter, or the adapter is not configured for EVA.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError(f"model is a {type(model).__name__}, not a PeftModel", hint="wrap it with get_peft_model(model, LoraConfig(…)) first")
    if len(model.active_adapters) != 1:
        raise ConfigError(f"EVA needs one active adapter, and there are {model.active_adapters}", hint=f"set_adapter({adapter!r})")
    config = _config(model, None, adapter)
    if config.init_lora_weights != "eva":
        raise ConfigError(f"init_lora_weights of {adapter!r} is {config.init_lora_weights!r}", hint="EVA needs init_lora_weights='eva'")
    return config


def _layers(model: nn.Module, adapter: str) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear) and adapter in module.scaling}


def _statistics(model: nn.Module, config: LoraConfig, adapter: str, settings: EvaConfig, inputs: Inputs, gather: bool) -> list[LayerStatistics]:
    found: dict[str, tuple[nn.Module, int, int]]
    if isinstance(model, PeftModel):
        found = {name: (layer, layer.r[adapter], layer.matrix_shape[1]) for name, layer in _layers(model, adapter).items()}
    else:
        complete = dataclasses.replace(config, target_modules=_every_linear(model)) if config.target_modules is None else config
        found = {name: (module, layer.r, _features(module)) for name, (module, layer) in planned(model, complete).items()}
    if not found:
        raise ConfigError("EVA can initialise no layer of the model", hint="it supports Linear and Conv1D")
    rho = settings.rho
    if rho > 1000:  # means "no limit", as in the reference implementation: all components of the widest layer
        rho = max(features for _, _, features in found.values()) // config.r
    return [
        LayerStatistics(name, module, rank, min(round(rank * rho), features), features, inputs, gather)
        for name, (module, rank, features) in found.items()
    ]


def _every_linear(model: nn.Module) -> list[str]:
    return [name for name, module in BaseView(model).modules.items() if name and (isinstance(module, nn.Linear) or is_conv1d(module))]


def _features(module: Any) -> int:
    return int(module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0])


# ---- passes -------------------------------------------------------------------------------------------------------------
@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager: evaluation mode, without gradients, with adapters disabled; at the end, the mode of each module is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    without_adapters: AbstractContextManager[Any] = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    try:
        with torch.no_grad(), without_adapters:
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batches(dataloader: Iterable[Any], passes: int) -> Iterator[Any]:
    """Yield the batches of each pass over the data, and None at the end of each pass.

    Raises:
        ConfigError: a pass has no batches.
    """
    for number in range(passes):
        empty = True
        for batch in dataloader:
            empty = False
            yield batch
        if empty:
            what = "is empty" if number == 0 else "gives its batches only once"
            raise ConfigError(f"the dataloader {what}", hint="pass a list of batches, or a DataLoader")
        yield None


def _analyse(statistics: list[LayerStatistics], prepared: Any, call: Callable[[], Any], tau: float) -> None:
    """Run the model on a batch and update the PCA of each layer whose directions have not all converged.

    Args:
        statistics: the statistics of all layers; on the first call, layers with equal inputs are grouped.
        prepared: the prepared batch, the second argument of `prepare_layer_inputs_fn`.
        call: runs the model on the batch.
        tau: a direction has converged when its cosine with the previous estimate is at least `tau`.
    """
    if not all(stats.grouped for stats in statistics):
        _group(statistics, prepared, call)
    with _collecting_inputs([stats for stats in statistics if stats.leads and not stats.settled], prepared, tau):
        call()


def _group(statistics: list[LayerStatistics], prepared: Any, forward: Callable[[], Any]) -> None:
    """Make layers with equal inputs, such as q_proj and k_proj, share one PCA; it gets the largest number of components that one of them needs."""
    digests: dict[str, Any] = {}
    handles = []
    for stats in statistics:

        def take_digest(module: nn.Module, args: Any, stats: LayerStatistics = stats) -> None:
            digests[stats.name] = digest(stats.rows(args, prepared))

        handles.append(stats.module.register_forward_pre_hook(take_digest))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    leaders: dict[Any, LayerStatistics] = {}
    for stats in statistics:
        if stats.name not in digests:
            raise ConfigError(f"{stats.name!r} is not called in a forward of the model", hint="leave it out of the targets with exclude_modules")
        stats.follow(leaders.setdefault(digests[stats.name], stats))


@contextmanager
def _collecting_inputs(statistics: list[LayerStatistics], prepared: Any, tau: float) -> Iterator[None]:
    """Context manager: while it is active, each forward pass adds the inputs of the layers in `statistics` to their statistics."""

    def take(module: nn.Module, args: Any) -> None:
        by_module[module].take(args, prepared, tau)

    by_module = {stats.module: stats for stats in statistics}
    handles = [stats.module.register_forward_pre_hook(take) for stats in statistics]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_enough_tokens(statistics: list[LayerStatistics]) -> None:
    for stats in statistics:
        if stats.leads and not stats.pca.rows:
            raise ConfigError(
                f"EVA looks for {stats.pca.components} directions in the inputs of {stats.name!r}, and the data has only {stats.waiting} tokens",
                hint="give more data, or a smaller rho or r",
            )


class _NoProgressBar(AbstractContextManager["_NoProgressBar"]):
    n = 0

    def __exit__(self, *error: Any) -> None:
        return None

    def update(self, by: int) -> None:
        """Do nothing."""


def _progress_bar(total: int, show: bool) -> Any:
    if not show:
        return _NoProgressBar()
    try:
        from tqdm.auto import tqdm
    except ImportError:  # tqdm is optional
        return _NoProgressBar()
    return tqdm(total=total, desc="EVA: converged directions")


# ---- writing ------------------------------------------------------------------------------------------------------------
def _name_in_base(name: str) -> str:
    """Return a module's name in the base model, given its name in the `PeftModel`."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _check_directions(state: Mapping[str, Tensor], layers: Mapping[str, LoraLayer]) -> None:
    for name, rows in state.items():
        if name not in layers:
            raise ConfigError(
                f"eva_state_dict names {name!r}, which is no layer of the adapter",
                hint=did_you_mean(name, layers) or f"layers are {listed(layers, 4)}",
            )
        if rows.dim() != 2 or rows.shape[1] != layers[name].matrix_shape[1]:
            raise ConfigError(f"the directions of {name!r} are {tuple(rows.shape)}, and the layer takes (rank, {layers[name].matrix_shape[1]})")


def _initialize_layer(layer: LoraLayer, adapter: str, config: LoraConfig, path: str, rows: Tensor | None) -> None:
    """Set A of one layer to the directions `rows` (rank, in); if `rows` is None and A is on the meta device, initialise the layer as with True."""
    a, _ = layer.factors(adapter)
    r, alpha = layer.r[adapter], layer.lora_alpha[adapter]
    rank = r if rows is None else rows.shape[0]
    if rank == r and not a.is_meta:
        if rows is not None:
            layer.slots(adapter)["lora_A.weight"].write(rows.to(a.device))
        return
    if rank != r and eva_config(config).adjust_scaling_factors:
        # keeps the scaling s unchanged: s = alpha/r, or alpha/√r with rsLoRA
        alpha *= (rank / r) ** 0.5 if config.use_rslora else rank / r
    trains = a.requires_grad
    variant = layer.variants.get(adapter)
    start = Eva(config) if rows is None else Directions(config, rows)
    settings = LoraSettings(path, rank, alpha, config, start, type(variant) if variant is not None else None)
    layer.drop(adapter)
    layer.attach(adapter, settings, InitOptions(autocast=a.dtype == torch.float32))
    for parameter in layer.parameters_of(adapter).values():
        parameter.requires_grad_(trains)


def _update_config(config: LoraConfig, layers: Mapping[str, LoraLayer], adapter: str) -> None:
    """Write the adapted modules, their ranks and their alphas to the config."""
    config.target_modules = list(layers)
    config.rank_pattern = {path: layer.r[adapter] for path, layer in layers.items() if layer.r[adapter] != config.r}
    alphas: dict[str, Any] = {path: layer.lora_alpha[adapter] for path, layer in layers.items() if layer.lora_alpha[adapter] != config.lora_alpha}
    config.alpha_pattern = alphas
