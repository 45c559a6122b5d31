"""Hot-swapping: an adapter's weights, rank and scale replaced in place, so that compiled graphs and optimisers go on.

Where nothing is compiled, a larger rank may come: A and B are new parameters then.
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
#: fields in which an adapter may differ from the one whose place it takes; they are written into that one's config
SWAPPABLE = frozenset({"r", "lora_alpha", "rank_pattern", "init_lora_weights", *INITIALIZER_SETTINGS})
#: what `check_hotswap_configs_compatible` compares; the swap itself compares all that is not swappable
_COMPARED = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")
_CHECKS = ("error", "warn", "ignore")


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Check that an adapter with one config can take the place of one with the other.

    Args:
        config0, config1: of the two adapters.

    Raises:
        CapabilityError: one of them is no LoRA.
        ConfigError: they differ in `use_rslora`, `lora_dropout`, `alpha_pattern` or `use_dora`.
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
    """Make adapters ready to be swapped in a compiled model without compiling it again: call it before `torch.compile` and before optimisers.

    Scalings become tensors, which graphs read anew each time, and A and B get room for the largest rank to come. The room is filled with
    zeros, has no effect, and no file has it: saving, loading and merging go on with the rank in use.

    Args:
        model: with LoRA adapters; all of them are made ready.
        target_rank: the largest rank that will be swapped in; None: no more than there is.
        config: config of the adapters to come, or name → config: room is made for their ranks, too.
        check_compiled: what to do if the model is compiled already: ``"error"``, ``"warn"`` or ``"ignore"``.

    Raises:
        ConfigError: `target_rank` is smaller than a rank that is there, or no rank; an unknown `check_compiled`; the model is compiled; a
            variant can't have a larger rank (`Variant.can_be_padded`).
        AdapterNotFoundError: there is no LoRA layer. The model is as before.
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
        raise ConfigError(f"target_rank={target_rank!r}", hint="give a positive integer, or None")


def _lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Return the LoRA layers of a model.

    Raises:
        AdapterNotFoundError: it has none.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise AdapterNotFoundError(f"No adapter layers found in the model {type(model).__name__}", hint="add the LoRA adapters first")
    return layers


def _report_compiled(check_compiled: str) -> None:
    """Raise, or warn, that the model is compiled already."""
    message = "Detected that the model is already compiled: graphs that were made do not see that scalings are tensors now"
    if check_compiled == "error":
        raise ConfigError(message, hint="call prepare_model_for_compiled_hotswap before torch.compile")
    warnings.warn(message, PeftWarning, stacklevel=3)


def _require_room(target_rank: int, places: Sequence[tuple[LoraLayer, str]], layers: Sequence[LoraLayer]) -> None:
    """Check that no adapter at `places` has a rank above `target_rank`; `layers`: those of the whole model, for the hint."""
    for layer, adapter in places:
        if layer.r[adapter] > target_rank:
            raise ConfigError(
                f"the adapter {adapter!r} has a layer of rank {layer.r[adapter]}, which is more than target_rank={target_rank}",
                hint=f"give target_rank={max(max(each.r.values(), default=0) for each in layers)} or more",
            )


def _require_padding(layer: LoraLayer, adapter: str, padded_rank: int) -> None:
    """Check that an adapter computes the same with factors of `padded_rank`, where that is more than they have."""
    variant = layer.variants.get(adapter)
    if variant is not None and not variant.can_be_padded and padded_rank > rank_padding.stored_rank(layer, adapter):
        raise ConfigError(
            f"the adapter {adapter!r} is {variant.name}, which can't have room for a larger rank than its own",
            hint=f"leave target_rank out, or delete_adapter({adapter!r}) first",
        )


def _ranks(config: LoraConfig | Mapping[str, LoraConfig] | None) -> list[int]:
    configs = list(config.values()) if isinstance(config, Mapping) else [config] if config is not None else []
    return [rank for each in configs for rank in (each.r, *(each.rank_pattern or {}).values())]


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


def _padded_rank(layer: LoraLayer, adapter: str, rank: int) -> int:
    """Return how many columns B is to have for a rank: r, or its share for each group of a convolution whose A has no groups."""
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
    """Make an adapter's scaling a tensor, which graphs read anew in each call."""
    if isinstance(layer.scaling[adapter], Tensor):
        return
    b = layer.factors(adapter)[1]
    dtype = torch.promote_types(b.dtype, torch.float32)
    layer.scaling[adapter] = torch.tensor(layer.scaling[adapter], dtype=dtype, device=b.device)  # type: ignore[assignment]
    layer.selection.drop_cached()


# ---- the swap -----------------------------------------------------------------------------------------------------------


def plan_swap(adapter: str, present: LoraConfig, config: LoraConfig, incoming: Sequence[IncomingWeights]) -> Callable[[], None]:
    """Return what writes weights in the place of an adapter's: in layers for which nothing came, the new adapter has no effect.

    Args:
        adapter: whose place they take.
        present: its config.
        config: belongs to the weights; its rank and scale are taken.
        incoming: each layer with what came for it.

    Raises:
        ConfigError: an initialisation that changes the base would have to be done anew.
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
    """Check that the weights of an adapter of one layer can be replaced in place."""
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
    """Check that both adapters began on the same base, and train the same of A and B."""
    ours, theirs = present.init_lora_weights, config.init_lora_weights
    if ours != theirs and (initializer_of(present).needs_base or initializer_of(config).needs_base):
        raise ConfigError(
            f"init_lora_weights={theirs!r} can't take the place of {ours!r}: one of them changes the base, or freezes A or B",
            hint="delete the adapter and load the other, or save it as plain LoRA",
        )


def _check_shift(layer: LoraLayer, adapter: str, r: int, alpha: float, path: str) -> None:
    """Check that what the initialisation took out of the base is the same for both."""
    if layer.merging.shift_of(adapter) is not None and (r, alpha) != (layer.r[adapter], layer.lora_alpha[adapter]):
        raise ConfigError(
            f"what the initialisation took out of the base of {path!r} belongs to r={layer.r[adapter]}, lora_alpha={layer.lora_alpha[adapter]}, "
            f"and the new adapter has r={r}, lora_alpha={alpha}",
            hint="delete the adapter and load the other",
        )


def _fitted(layer: LoraLayer, adapter: str, r: int, part: IncomingWeights) -> tuple[int, list[tuple[Slot, Tensor]]]:
    """Return how many columns the new B has, and (slot, tensor) for each whole parameter, the room that is not in use included.

    Where more columns come than are stored, the tensors have the size to which the parameters will have grown.

    Raises:
        AdapterWeightsError: it does not fit.
    """
    slots = {end: Slot.of(module, name) for end, module, name in layer.holders(adapter)}
    if not part.tensors:
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
    """Return the shape of each parameter when there is room for `columns` of B.

    Raises:
        AdapterWeightsError: there is none, and a compiled graph holds the parameters, or was to.
    """
    present = rank_padding.stored_rank(layer, adapter)
    if columns <= present:
        return {end: slot.shape for end, slot in slots.items()}
    if not part.resizable or isinstance(layer.scaling[adapter], Tensor):
        raise AdapterWeightsError(
            f"size mismatch: {part.path!r} has room for a rank of {present} in its compiled graph, and a rank of {columns} came",
            hint="call prepare_model_for_compiled_hotswap(model, target_rank=...) when the first adapter is loaded, before compiling",
        )
    return {
        end: tuple(rank_padding.padded(end, torch.empty(slot.shape, device="meta"), present, columns).shape) if _is_factor(end) else slot.shape
        for end, slot in slots.items()
    }


def _is_factor(end: str) -> bool:
    return end in (*rank_padding.A_KEYS, *rank_padding.B_KEYS)


def _zeros(layer: LoraLayer, adapter: str, slots: Mapping[str, Slot], stored: Mapping[str, tuple[int, ...]], path: str) -> list[tuple[Slot, Tensor]]:
    """Return zeros for each slot of a layer for which nothing came: the new adapter has no effect there.

    Raises:
        AdapterWeightsError: a variant for which zeros are no such weights.
    """
    if adapter in layer.variants:
        raise AdapterWeightsError(
            f"no new tensor for {path!r}, and {layer.variants[adapter].name} has no weights that mean 'no effect'",
            hint="delete the adapter and load the other",
        )
    return [(slot, torch.zeros(stored[end])) for end, slot in slots.items()]


def _with_room(end: str, tensor: Tensor, stored: tuple[int, ...], columns: int, padded_rank: int, path: str) -> Tensor:
    """Return a tensor of a file as it is stored: an A or a B with zeros for the ranks that are not in use, another as it is.

    Args:
        end: of its file key.
        tensor: of the file.
        stored: shape of the parameter.
        columns, padded_rank: of the file's B, and of the stored one.
        path: of the layer, for messages.

    Raises:
        AdapterWeightsError: another shape.
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
    """Return how many columns B has at rank r, given what it has at the present one."""
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
