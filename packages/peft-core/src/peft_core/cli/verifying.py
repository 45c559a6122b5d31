"""`peft-core verify`: checks that an adapter folder is complete and, if a base model is given, that the adapter fits it."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.files import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, WeightFile
from ..config import get_peft_config
from ..config.reading import LEGACY_KEYS
from ..errors import PeftError, UnknownTunerError, listed
from ..plugins import TunerSpec, registry
from ..tensor_names import split_at_parameter
from .folders import Adapter, adapters_in, changed_fields, raw_config, tensors_of, weights_of
from .output import Report

#: (state, detail) of a check; the states ``"note"`` and ``"skipped"`` are not faults
Result = tuple[str, str]
PASSED: Result = ("ok", "")
#: function that is called after each checked tensor, to show progress
Step = Callable[[], None]


def verify(directory: Path, base: Path | None = None, step: Step = lambda: None) -> Report:
    """Return the results of the checks for every adapter in a folder.

    Args:
        directory: the folder.
        base: folder of the base model that the adapters should fit; it is built without its weights.
        step: called after each checked tensor.

    Raises:
        AdapterFileError: the folder contains no adapter.
        ModelError: the base model can't be built.
    """
    found: list[dict[str, Any]] = []
    for adapter in adapters_in(directory):
        checks = [{"check": name, "state": state, "detail": detail} for name, (state, detail) in _checks(adapter, base, step)]
        found.append({"name": adapter.name, "folder": adapter.path.relative_to(directory).as_posix(), "checks": checks})
    return {
        "ok": not any(check["state"] == "fault" for one in found for check in one["checks"]),
        "directory": str(directory),
        "base": str(base) if base else None,
        "adapters": found,
    }


def tensors_in(directory: Path) -> int:
    """Return the number of tensors that `verify` will check, for its progress bar; 0 if the number is unknown."""
    try:
        return sum(len(weights_of(adapter).shapes) for adapter in adapters_in(directory))
    except PeftError:
        return 0


def _checks(adapter: Adapter, base: Path | None, step: Step) -> Iterator[tuple[str, Result]]:
    raw, readable = _attempt(lambda: raw_config(adapter))
    usable = readable if raw is None else _config(raw)
    yield "config", usable
    file, readable = _attempt(lambda: _with_header(adapter))
    yield "file", readable if file is None else _one_file(adapter)
    if file is None:
        return
    yield "values", _values(file, step)
    if raw is None or usable[0] == "fault":
        return
    spec, _ = _attempt(lambda: registry.resolve(str(raw.get("peft_type") or "")))
    yield "keys", ("skipped", "the tuner is not installed") if spec is None else _keys(raw, spec, file)
    if base is not None:
        yield "base", _base(adapter, raw, file, base)


def _attempt(read: Callable[[], Any]) -> tuple[Any, Result]:
    """Return (result of `read`, `PASSED`), or (None, a fault) if `read` raises a `PeftError`."""
    try:
        return read(), PASSED
    except PeftError as error:
        return None, ("fault", str(error))


def _with_header(adapter: Adapter) -> WeightFile:
    file = weights_of(adapter)
    tensors_of(file)
    return file


def _config(raw: Mapping[str, Any]) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown fields are reported below
        try:
            get_peft_config(raw)
        except UnknownTunerError as error:
            return "note", str(error)
        except PeftError as error:
            return "fault", str(error)
    unknown = [name for name in changed_fields(dict(raw))["unknown"] if name not in LEGACY_KEYS]
    return ("note", f"fields that this release ignores: {listed(unknown)}") if unknown else PASSED


def _one_file(adapter: Adapter) -> Result:
    if all((adapter.path / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        return (
            "fault",
            f"both {SAFETENSORS_WEIGHTS_NAME} and {WEIGHTS_NAME} are there: readers use {SAFETENSORS_WEIGHTS_NAME}, even if {WEIGHTS_NAME} is newer",
        )
    return PASSED


def _values(file: WeightFile, step: Step) -> Result:
    bad = []
    for name, tensor in file.tensors().items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            nan, infinite = int(tensor.float().isnan().sum()), int(tensor.float().isinf().sum())
            bad.append(f"{name} ({nan} NaN, {infinite} infinite of {tensor.numel()})")
        step()
    return ("fault", f"not finite: {', '.join(bad[:4])}{f' and {len(bad) - 4} more' if len(bad) > 4 else ''}") if bad else PASSED


def _keys(raw: Mapping[str, Any], spec: TunerSpec, file: WeightFile) -> Result:
    """Report modules that lack tensors which other modules have, and modules that the config does not target; reads only the tensors' names."""
    if not file.shapes:
        return "fault", "the file holds no tensors"
    ends: dict[str, set[str]] = defaultdict(set)
    for key in file.shapes:
        split = split_at_parameter(key, spec.parameter_prefix)
        if split is not None:
            ends[split[0]].add(split[1])
    faults = []
    for path, present in ends.items():
        fuller = next((other for other in ends.values() if present < other), None)
        if fuller:
            faults.append(f"{path} has {listed(sorted(present))}, but lacks {listed(sorted(fuller - present))}, which other modules have")
    try:
        stray = _outside_targets(raw, spec, list(ends))
    except PeftError as error:
        return "fault", str(error)
    if stray:
        faults.append(f"target_modules={raw['target_modules']!r} does not match {listed(stray, 3)}")
    return ("fault", "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")) if faults else PASSED


def _outside_targets(raw: Mapping[str, Any], spec: TunerSpec, paths: list[str]) -> list[str]:
    from ..tuners.targeting import ALL_LINEAR, target_matcher

    targets = raw.get("target_modules")
    if not targets or (isinstance(targets, str) and targets.lower() == ALL_LINEAR) or raw.get("target_parameters"):
        return []  # in these cases, target_modules does not select modules by their names
    matches = target_matcher(targets, "target_modules")
    return [path for path in paths if not matches(path.removeprefix(spec.base_prefix))]


def _base(adapter: Adapter, raw: Mapping[str, Any], file: WeightFile, base: Path) -> Result:
    from ..base.view import BaseView
    from ..checkpoint.passport import fingerprint
    from ..models.peft_model import PeftModel
    from .bases import build_empty

    model = build_empty(base, raw, dict(sorted(file.shapes.items())))
    written = file.metadata.get("peft_base", "").rpartition(" ")[2]
    same = not written or written == fingerprint(BaseView(model))
    try:
        PeftModel.from_pretrained(model, adapter.path, low_cpu_mem_usage=True)
    except PeftError as error:
        return "fault", str(error)
    return PASSED if same else ("note", f"it fits, but was written for a base with other parameters (fingerprint {written})")
