"""Hot-swapping: replace an adapter's weights, rank and scaling in place, so that compiled graphs and optimisers stay valid.

If the model is not compiled, the new adapter may have a larger rank: A and B are then replaced by new, larger parameters,
and optimisers have to be created again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import (
    AdapterNotFoundError,
    AdapterWeightsError,
    CapabilityError,
    ConfigError,
    IncomingWeights,
    ModuleValues,
    Patterns,
    PeftConfig,
    PeftWarning,
    Slot,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
)
from peft_core.errors import did_you_mean, listed

from .. import formulas
from ..config import INITIALIZER_SETTINGS, LoraConfig
from ..extensions import initializer_of
from ..layers import rank_padding
from ..layers.common import LoraLayer

__all__ = [
    "SWAPPABLE",
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "plan_swap",
    "prepare_model_for_compiled_hotswap",
]
#: config fields in which the new adapter may differ from the adapter that it replaces; the swap copies their values into the config in use
SWAPPABLE = frozenset({"r", "lora_alpha", "rank_pattern", "init_lora_weights", *INITIALIZER_SETTINGS})
#: config fields that `check_hotswap_configs_compatible` compares; the swap itself compares all fields that are not in `SWAPPABLE`
_COMPARED = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")
_CHECKS = ("error", "warn", "ignore")


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Check that an adapter with one of two configs can be replaced by an adapter with the other config.

    Args:
        config0, config1: the configs of the two adapters.

    Raises:
        CapabilityError: one of the configs is not a `LoraConfig`.
        ConfigError: the configs differ in `use_rslora`, `lora_dropout`, `alpha_pattern` or `use_dora`.
    """
    for config in (config0, config1):
        if not isinstance(config, LoraConfig):
            raise CapabilityError(f"hot-swapping works with LoRA, not with {config.peft_type!s}", hint="delete the adapter and load the other")
    for name in _COMPARED:
        ours, theirs = getattr(config0, name), getattr(config1, name)
        if ours != theirs:
            raise ConfigError(f"Configs are incompatible: for {name}, {ours} != {theirs}", hint="delete the adapter and load the other")


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Prepare all LoRA adapters of a model, so that later swaps need no recompilation. Call it before `torch.compile` and before making optimisers.

    Scalings become tensors, which a compiled graph reads in each call, and A and B are padded with zeros to the largest expected rank. The padding
    has no effect on the output and is not written to files: saving, loading and merging use the unpadded rank. After any error the model
    is unchanged.

    Args:
        model: a model with LoRA adapters; all of its adapters are prepared.
        target_rank: the largest rank that will be swapped in; None: `target_rank` adds no padding.
        config: config of the adapters that will be swapped in, or a dict name → config; A and B are padded to the largest rank in these configs, if
            that is larger than `target_rank`.
        check_compiled: what to do if the model is compiled already: ``"error"``, ``"warn"`` or ``"ignore"``.

    Raises:
        ConfigError: `target_rank` is smaller than the rank of a present adapter, or is not a positive integer; `check_compiled` is unknown; the
            model is compiled; a variant can't be padded to a larger rank (`Variant.can_be_padded`).
        AdapterNotFoundError: the model has no LoRA layer.
    """
    _require_check(check_compiled)
    _require_rank(target_rank)
    layers = _lora_layers(model)
    if check_compiled != "ignore" and _is_compiled(model):
        _report_compiled(check_compiled)
    places = [(layer, adapter) for layer in layers if layer.hotswappable for adapter in layer.adapters() if adapter not in layer.tied]
    if target_rank is not None:
        _require_room(target_rank, places, layers)
    wanted = max([target_rank or 0, *_ranks(config)])
    plans = [(layer, adapter, _padded_rank(layer, adapter, wanted)) for layer, adapter in places]
    for layer, adapter, padded_rank in plans:
        _require_padding(layer, adapter, padded_rank)
    for layer, adapter, padded_rank in plans:
        _widen(layer, adapter, padded_rank)
        _keep_scaling_as_tensor(layer, adapter)


def _require_check(check_compiled: str) -> None:
    if check_compiled not in _CHECKS:
        raise ConfigError(
            f"check_compiled={check_compiled!r} is unknown", hint=did_you_mean(str(check_compiled), _CHECKS) or f"write one of {listed(_CHECKS)}"
        )


def _require_rank(target_rank: Any) -> None:
    if target_rank is not None and (not isinstance(target_rank, int) or isinstance(target_rank, bool) or target_rank < 1):
        raise ConfigError(f"target_rank={target_rank!r} is not a positive integer", hint="give a positive integer, or None")


def _lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Return the LoRA layers of a model.

    Raises:
        AdapterNotFoundError: the model has no LoRA layer.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise AdapterNotFoundError(f"No adapter layers found in the model {type(model).__name__}", hint="add the LoRA adapters first")
    return layers


def _report_compiled(check_compiled: str) -> None:
    """Raise a `ConfigError` (``check_compiled="error"``) or warn that the model is compiled already."""
    message = "Detected that the model is already compiled: its graphs keep the old scalings as constants, and would not see a swap"
    if check_compiled == "error":
        raise ConfigError(message, hint="call prepare_model_for_compiled_hotswap before torch.compile")
    warnings.warn(message, PeftWarning, stacklevel=3)


def _require_room(target_rank: int, places: Sequence[tuple[LoraLayer, str]], layers: Sequence[LoraLayer]) -> None:
    """Check that no (layer, adapter) pair in `places` has a rank above `target_rank`; `layers`: all LoRA layers, for the error's hint."""
    for layer, adapter in places:
        if layer.r[adapter] > target_rank:
            raise ConfigError(
                f"the adapter {adapter!r} has a layer of rank {layer.r[adapter]}, which is more than target_rank={target_rank}",
                hint=f"give target_rank={max(max(each.r.values(), default=0) for each in layers)} or more",
            )


def _require_padding(layer: LoraLayer, adapter: str, padded_rank: int) -> None:
    """Check that an adapter's output stays the same when its factors are padded to `padded_rank`, if that is more than their stored rank."""
    variant = layer.variants.get(adapter)
    if variant is not None and not variant.can_be_padded and padded_rank > rank_padding.stored_rank(layer, adapter):
        raise ConfigError(
            f"the adapter {adapter!r} uses {variant.name}, whose A and B can't be padded to a larger rank",
            hint=f"leave target_rank out, or delete_adapter({adapter!r}) first",
        )


def _ranks(config: LoraConfig | Mapping[str, LoraConfig] | None) -> list[int]:
    configs = list(config.values()) if isinstance(config, Mapping) else [config] if config is not None else []
    return [rank for each in configs for rank in (each.r, *(each.rank_pattern or {}).values())]


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


def _padded_rank(layer: LoraLayer, adapter: str, rank: int) -> int:
    """Return how many columns the stored B needs for a rank, at least as many as it has now.

    A rank r needs r columns, or r / groups (rounded up) on a grouped convolution whose A is not grouped.
    """
    present = rank_padding.stored_rank(layer, adapter)
    used = layer.used_rank.get(adapter, present)
    share, rest = divmod(rank * used, layer.r[adapter]) if used < layer.r[adapter] else (rank, 0)
    return max(present, share + bool(rest))


def _widen(layer: LoraLayer, adapter: str, padded_rank: int) -> None:
    present = rank_padding.stored_rank(layer, adapter)
    if padded_rank == present:
        return
    for end, module, name in layer.holders(adapter):
        if end in (*rank_padding.A_KEYS, *rank_padding.B_KEYS):
            old: Any = getattr(module, name)
            new = nn.Parameter(rank_padding.padded(end, old.detach(), present, padded_rank), requires_grad=old.requires_grad)
            setattr(module, name, new) if not isinstance(module, nn.ParameterDict) else module.__setitem__(name, new)
    layer.used_rank.setdefault(adapter, present)
    layer.selection.drop_cached()


def _keep_scaling_as_tensor(layer: LoraLayer, adapter: str) -> None:
    """Replace an adapter's scaling by a tensor, which a compiled graph reads in each call; a Python float would be a constant in the graph."""
    if isinstance(layer.scaling[adapter], Tensor):
        return
    b = layer.factors(adapter)[1]
    dtype = torch.promote_types(b.dtype, torch.float32)
    layer.scaling[adapter] = torch.tensor(layer.scaling[adapter], dtype=dtype, device=b.device)  # type: ignore[assignment]
    layer.selection.drop_cached()


# ---- the swap -----------------------------------------------------------------------------------------------------------


def plan_swap(adapter: str, present: LoraConfig, config: LoraConfig, incoming: Sequence[IncomingWeights]) -> Callable[[], None]:
    """Return a function that replaces an adapter's weights by new ones; in layers without new tensors it writes zeros, which have no effect.

    Args:
        adapter: name of the adapter that is replaced.
        present: config of the adapter that is replaced.
        config: config of the new weights; rank and scaling are computed from it.
        incoming: each layer of the adapter together with its new tensors.

    Raises:
        ConfigError: the initialisations of the two adapters differ, and one of them changes the base weight.
        AdapterWeightsError: shapes or ranks do not fit. Nothing is changed.
    """
    _check_start(present, config)
    ranks: Patterns[int] = Patterns(config.rank_pattern or {}, "rank_pattern")
    alphas: Patterns[int] = Patterns(config.alpha_pattern or {}, "alpha_pattern")
    steps: list[Callable[[], None]] = []
    for part in incoming:
        layer = part.module
        assert isinstance(layer, LoraLayer)
        _require_swappable(layer, adapter, part.path)
        values = ModuleValues(part.path, ranks, alphas)
        r, alpha = values.rank(config.r), values.alpha(config.lora_alpha)
        _check_shift(layer, adapter, r, alpha, part.path)
        steps.append(partial(_write, layer, adapter, r, alpha, *_fitted(layer, adapter, r, part)))

    def write() -> None:
        with torch.no_grad():
            for step in steps:
                step()

    return write


def _require_swappable(layer: LoraLayer, adapter: str, path: str) -> None:
    """Check that the weights which an adapter has in one layer can be replaced in place."""
    if not layer.hotswappable:
        raise CapabilityError(
            f"{path!r} is of the kind {layer.ops.kind!r}, where weights can't be swapped", hint="delete the adapter and load the other"
        )
    if adapter in layer.tied:
        raise CapabilityError(
            f"{path!r} uses the A and B of another module (ensure_weight_tying), which can't be swapped",
            hint="delete the adapter and load the other",
        )


def _check_start(present: LoraConfig, config: LoraConfig) -> None:
    """Check that the initialisations of both adapters change the base weight in the same way, and freeze the same factors (A, B or none)."""
    ours, theirs = present.init_lora_weights, config.init_lora_weights
    if ours != theirs and (initializer_of(present).needs_base or initializer_of(config).needs_base):
        raise ConfigError(
            f"init_lora_weights={theirs!r} can't take the place of {ours!r}: one of them changes the base, or freezes A or B",
            hint="delete the adapter and load the other, or save it as plain LoRA",
        )


def _check_shift(layer: LoraLayer, adapter: str, r: int, alpha: float, path: str) -> None:
    """Check that both adapters have the same rank and alpha, if the initialisation subtracted s·B₀·A₀ from the base weight of the layer."""
    if layer.merging.shift_of(adapter) is not None and (r, alpha) != (layer.r[adapter], layer.lora_alpha[adapter]):
        raise ConfigError(
            f"the initialisation subtracted a matrix from the base weight of {path!r} that fits only r={layer.r[adapter]}, "
            f"lora_alpha={layer.lora_alpha[adapter]}, and the new adapter has r={r}, lora_alpha={alpha}",
            hint="delete the adapter and load the other",
        )


def _fitted(layer: LoraLayer, adapter: str, r: int, part: IncomingWeights) -> tuple[int, list[tuple[Slot, Tensor]]]:
    """Return how many columns the new B has, and (slot, tensor) for each parameter; the tensor has the shape of the padded parameter.

    If the new B has more columns than the stored B, the tensors have the shape that the parameters get when they are enlarged.

    Raises:
        AdapterWeightsError: a tensor is missing, or its shape or rank does not fit.
    """
    slots = {end: Slot.of(module, name) for end, module, name in layer.holders(adapter)}
    if not part.tensors:  # the new adapter has no weights in this layer
        columns = _columns_of(layer, adapter, r)
        stored = _stored_shapes(layer, adapter, slots, columns, part)
        return columns, _zeros(layer, adapter, slots, stored, part.path)
    missing = [end for end in slots if end not in part.tensors]
    if missing:
        raise AdapterWeightsError(f"no new tensor for {listed(missing)} of {part.path!r}", hint="does the config belong to these weights?")
    b_end = next(end for end in slots if end in rank_padding.B_KEYS)
    shape = tuple(part.tensors[b_end].shape)
    columns = shape[1] if len(shape) > 1 else 0
    stored = _stored_shapes(layer, adapter, slots, columns, part)
    room = max(columns, rank_padding.stored_rank(layer, adapter))
    pairs = [(slot, _with_room(end, part.tensors[end], stored[end], columns, room, part.path)) for end, slot in slots.items()]
    if layer.merging.shift_of(adapter) is None and columns != _columns_of(layer, adapter, r):
        raise AdapterWeightsError(
            f"{b_end!r} of {part.path!r} is {shape}, and the config says that the rank is {r}",
            hint="give the config that belongs to these weights",
        )
    return columns, pairs


def _stored_shapes(layer: LoraLayer, adapter: str, slots: Mapping[str, Slot], columns: int, part: IncomingWeights) -> dict[str, tuple[int, ...]]:
    """Return the shape that each parameter has, after enlarging it if needed, so that B has at least `columns` columns.

    Raises:
        AdapterWeightsError: the stored B has fewer columns, and the parameters can't be enlarged: a compiled graph uses them, or the model is
            prepared for compilation.
    """
    present = rank_padding.stored_rank(layer, adapter)
    if columns <= present:
        return {end: slot.shape for end, slot in slots.items()}
    if not part.resizable or isinstance(layer.scaling[adapter], Tensor):
        raise AdapterWeightsError(
            f"size mismatch: the compiled graph has room for rank {present} in {part.path!r}, and the new adapter has rank {columns}",
            hint="call prepare_model_for_compiled_hotswap(model, target_rank=...) when the first adapter is loaded, before compiling",
        )
    return {
        end: tuple(rank_padding.padded(end, torch.empty(slot.shape, device="meta"), present, columns).shape) if _is_factor(end) else slot.shape
        for end, slot in slots.items()
    }


def _is_factor(end: str) -> bool:
    return end in (*rank_padding.A_KEYS, *rank_padding.B_KEYS)


def _zeros(layer: LoraLayer, adapter: str, slots: Mapping[str, Slot], stored: Mapping[str, tuple[int, ...]], path: str) -> list[tuple[Slot, Tensor]]:
    """Return zeros for each slot of a layer without new tensors: the new adapter has no effect in this layer.

    Raises:
        AdapterWeightsError: the layer has a variant, whose effect is not zero when its tensors are zero.
    """
    if adapter in layer.variants:
        raise AdapterWeightsError(
            f"no new tensor for {path!r}, and with {layer.variants[adapter].name} zeros have an effect, too",
            hint="delete the adapter and load the other",
        )
    return [(slot, torch.zeros(stored[end])) for end, slot in slots.items()]


def _with_room(end: str, tensor: Tensor, stored: tuple[int, ...], columns: int, padded_rank: int, path: str) -> Tensor:
    """Return a tensor from a file in the shape of its parameter: A and B are padded with zeros to the stored rank, others are returned unchanged.

    Args:
        end: end of the tensor's file key.
        tensor: the tensor from the file.
        stored: shape of the parameter.
        columns, padded_rank: how many columns B has in the file, and how many the stored B has.
        path: path of the layer, for error messages.

    Raises:
        AdapterWeightsError: `tensor` has another shape than expected.
    """
    factor = _is_factor(end)
    expected = tuple(rank_padding.unpadded(end, torch.empty(stored, device="meta"), padded_rank, columns).shape) if factor else stored
    if tuple(tensor.shape) != expected:
        raise AdapterWeightsError(
            f"size mismatch: {end!r} of {path!r} is {tuple(tensor.shape)}, expected {expected}",
            hint="was the adapter trained on another base?",
        )
    return rank_padding.padded(end, tensor, columns, padded_rank) if factor and columns < padded_rank else tensor


def _columns_of(layer: LoraLayer, adapter: str, r: int) -> int:
    """Return how many columns B has at rank `r`, computed from the ratio of columns to rank that the present adapter has."""
    return layer.used_rank.get(adapter, rank_padding.stored_rank(layer, adapter)) * r // layer.r[adapter]


def _write(layer: LoraLayer, adapter: str, r: int, alpha: float, columns: int, pairs: Sequence[tuple[Slot, Tensor]]) -> None:
    if columns > rank_padding.stored_rank(layer, adapter):
        _widen(layer, adapter, columns)
    for slot, tensor in pairs:
        slot.write(tensor)
    if columns < rank_padding.stored_rank(layer, adapter):
        layer.used_rank[adapter] = columns
    else:
        layer.used_rank.pop(adapter, None)
    layer.r[adapter], layer.lora_alpha[adapter] = r, alpha
    layer.set_scaling(adapter, formulas.scaling(alpha, r, layer.use_rslora[adapter]))
    layer.selection.drop_cached()
