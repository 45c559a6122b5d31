"""Loading tensors into an adapter. All keys and shapes are checked before the first tensor is written, so that an error changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from ..config import PeftConfig
from ..errors import AdapterWeightsError, MergeError, PeftWarning, did_you_mean, listed
from ..layers.slots import Slot
from ..plugins import hooks, registry
from ..tensor_names import is_duplicate_of_saved, key_renamer, with_expected_prefix, without_wrapper
from ..tuners.index import AdapterIndex
from . import embeddings
from .files import WeightFile
from .state_dict import keyed_slots, names_in_memory

Strict = bool | str


class LoadResult(NamedTuple):
    """`missing_keys`: keys of the adapter that are not in the file; `unexpected_keys`: keys of the file that the adapter does not have."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass(frozen=True)
class TensorSource:
    """Named tensors to load: the shapes are known at once, the values are read later.

    Args:
        shapes: name → shape.
        read: returns {name: tensor}.
        origin: description of the source, for error messages.
        writer: names and versions of the software that wrote the file, for error messages.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[], Mapping[str, Tensor]]
    origin: str
    writer: str = ""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], origin: str = "the given state dict") -> TensorSource:
        """Return a source for `tensors`, which are already in memory."""
        return cls({name: tuple(tensor.shape) for name, tensor in tensors.items()}, lambda: tensors, origin)

    @classmethod
    def of_file(cls, file: WeightFile, device: Any, peft_type: str, config: Any, key_mapping: Mapping[str, str] | None) -> TensorSource:
        """Return a source for the tensors of `file`, renamed with `key_mapping` and converted by the plugins' hooks."""
        rename = key_renamer(key_mapping)
        writer = ", ".join(f"{key} {value}" for key, value in file.metadata.items() if key != "format")

        def read() -> dict[str, Tensor]:
            return hooks.convert_state_dict(peft_type, {rename(name): tensor for name, tensor in file.tensors(device).items()}, config)

        if hooks.converts():
            tensors = read()
            return cls({name: tuple(tensor.shape) for name, tensor in tensors.items()}, lambda: tensors, str(file.path), writer)
        return cls({rename(name): shape for name, shape in file.shapes.items()}, read, str(file.path), writer)


def translated(index: AdapterIndex, config: PeftConfig, source: TensorSource) -> TensorSource:
    """Return `source` with its tensors converted to the module layout of this base model. If a conversion is needed, updates `config` in place.

    Raises:
        ConfigError: the tensors were written for a layout that can't be converted.
    """
    tuner = index.tuner_for(registry.resolve(str(config.peft_type)))
    found = tuner.translate(index.view, config, without_wrapper(source.shapes))
    if found is None:
        return source
    for name, value in found.fields.items():
        setattr(config, name, value)
    tensors = found.convert(without_wrapper(source.read()))
    return replace(TensorSource.of(tensors, source.origin), writer=source.writer)


def write_tensors(
    index: AdapterIndex, adapter: str, source: TensorSource, *, wrapped: bool = True, strict: Strict = True, ignore_mismatched_sizes: bool = False
) -> LoadResult:
    """Write the tensors of `source` into an adapter.

    Args:
        index, adapter: the adapters of the model, and the name of the adapter whose weights are written.
        source: the tensors.
        wrapped: whether the keys are those of a wrapped model, see `keyed_slots`.
        strict: True: missing and unexpected tensors are errors; ``"warn"``: they give a warning; False: they are only returned.
        ignore_mismatched_sizes: skip tensors with mismatched shapes, with a warning.

    Raises:
        MergeError: the adapter is merged.
        AdapterWeightsError: keys or shapes do not match; one message reports all mismatches, and nothing is written.
    """
    if adapter in index.merged_adapters():
        raise MergeError(
            f"the adapter {adapter!r} is merged: loaded weights would not update the merged base weights", hint="call unmerge_adapter() first"
        )
    slots = keyed_slots(index, adapter, wrapped=wrapped)
    shapes, renamed = _matched(index, adapter, slots, source, wrapped)
    missing = _missing(slots, shapes)
    surplus = [key for key in shapes if key not in slots]
    misshapen = [key for key, slot in slots.items() if key in shapes and shapes[key] != slot.shape and not slot.unread]
    refused = (missing, surplus) if strict is True else ([], [])
    faults = _faults(slots, shapes, *refused, [] if ignore_mismatched_sizes else misshapen)
    if faults:
        raise AdapterWeightsError(
            f"{source.origin} does not fit the adapter {adapter!r} on {index.view.name}: {'; '.join(faults)}",
            hint=_hint(missing, surplus, misshapen, source.writer),
        )
    if strict == "warn" and missing:
        warnings.warn(f"Found missing adapter keys while loading the checkpoint: {missing}.", PeftWarning, stacklevel=4)
    if strict == "warn" and surplus:
        warnings.warn(f"{source.origin} has unexpected tensors for the adapter {adapter!r}: {listed(surplus)}", PeftWarning, stacklevel=4)
    if misshapen:
        warnings.warn(f"skipped tensors with mismatched shapes: {listed(misshapen)}", PeftWarning, stacklevel=4)
    _write(slots, with_expected_prefix({renamed.get(key, key): tensor for key, tensor in source.read().items()}, slots), misshapen)
    index.selection.drop_cached()
    return LoadResult(missing, surplus)


def _matched(
    index: AdapterIndex, adapter: str, slots: dict[str, Slot], source: TensorSource, wrapped: bool
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return two dicts for the tensors of `source`: {checkpoint key: shape} and {name in memory: checkpoint key}.

    If the source contains embeddings of the base model (resized vocabulary), adds their slots to `slots` in place.
    """
    embedded = {**embeddings.slots(index, adapter, wrapped=wrapped), **embeddings.second_slots(index, adapter, wrapped=wrapped)}
    expected = {*slots, *embedded}
    shapes, renamed = with_expected_prefix(source.shapes, expected), {}
    if not shapes.keys() <= expected:
        # the source may be a whole model's state dict, whose keys are in-memory parameter names that contain the adapter's name
        found = names_in_memory(index, adapter, slots, source.shapes)
        renamed = {name: key for name, key in found.items() if name in shapes and key not in shapes}
        shapes = {renamed.get(key, key): shape for key, shape in shapes.items()}
    slots.update((key, slot) for key, slot in embedded.items() if key in shapes)
    return {key: shape for key, shape in shapes.items() if not is_duplicate_of_saved(key, slots)}, renamed


def _missing(slots: Mapping[str, Slot], shapes: Collection[str]) -> list[str]:
    """Return the keys that are missing. The optional tensors of one `Slot.stands_for` are required as soon as one of them is present."""
    needed = {other for slot in slots.values() if any(other in shapes for other in slot.stands_for) for other in slot.stands_for}
    return [key for key, slot in slots.items() if key not in shapes and (not slot.optional or key in needed)]


def _write(slots: Mapping[str, Slot], tensors: Mapping[str, Tensor], misshapen: Sequence[str]) -> None:
    """Write each tensor into the slot of its key, except the keys in `misshapen`.

    For a slot with `Slot.stands_for`: if all tensors that it lists are present, this slot is skipped; otherwise the listed tensors are skipped.
    """
    skipped = set(misshapen)
    whole = {key for key in slots if key in tensors and key not in skipped}
    for key, slot in slots.items():
        skipped.update([key] if slot.stands_for and whole.issuperset(slot.stands_for) else slot.stands_for)
    for key, slot in slots.items():
        if key in tensors and key not in skipped:
            slot.write(tensors[key])


def _faults(
    slots: Mapping[str, Slot], shapes: Mapping[str, tuple[int, ...]], missing: list[str], surplus: list[str], misshapen: list[str]
) -> list[str]:
    faults = []
    if missing:
        faults.append(f"missing keys: {listed(missing, 4)}")
    if surplus:
        faults.append(f"unexpected keys: {listed(surplus, 4)}")
    if misshapen:
        shown = [f"{key!r} is {shapes[key]}, expected {slots[key].shape}" for key in misshapen[:4]]
        faults.append(f"size mismatch: {', '.join(shown)}{f' and {len(misshapen) - 4} more' if len(misshapen) > 4 else ''}")
    return faults


def _hint(missing: list[str], surplus: list[str], misshapen: list[str], writer: str) -> str:
    if missing and surplus:
        near = did_you_mean(missing[0], surplus)
        hint = (
            near.replace("did you mean", "the first missing key may be stored as").rstrip("?") if near else "does the config belong to these weights?"
        )
    elif misshapen:
        hint = "was the adapter trained on another base, or with another rank?"
    elif missing:
        hint = "strict=False (or 'warn') keeps the initial values of missing tensors"
    else:
        hint = "strict=False (or 'warn') ignores unexpected tensors"
    return f"{hint} (written by: {writer})" if writer else hint
