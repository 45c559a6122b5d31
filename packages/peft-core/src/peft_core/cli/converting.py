"""`peft-core convert`: rewrites an adapter folder in another format or dtype, or with other tensor names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, AtomicFolder
from ..checkpoint.stack import MANIFEST_NAME
from ..config import CONFIG_NAME
from ..errors import AdapterFileError, ConfigError, did_you_mean, listed
from ..tensor_names import key_renamer
from .folders import Adapter, adapters_in, raw_config, weights_of
from .output import Report

FORMATS = {"safetensors": SAFETENSORS_WEIGHTS_NAME, "bin": WEIGHTS_NAME}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert(directory: Path, out: Path, *, form: str = "safetensors", dtype: str | None = None, rename: Sequence[str] = ()) -> Report:
    """Rewrite all adapters of a folder; if an error occurs, no file in `out` is written. `out` may be `directory`.

    Args:
        directory, out: folder to read, and folder to write.
        form: ``"safetensors"`` or ``"bin"``.
        dtype: new dtype of floating-point tensors; None: dtypes are not changed.
        rename: rules ``REGEX=REPLACEMENT`` for the part of a tensor name after ``base_model.model.``; the first rule that matches is applied.

    Raises:
        ConfigError: unknown format or dtype; or the renaming matches no tensor, or gives two tensors the same name.
        AdapterFileError: `directory` contains no adapter, or `out` is a file.
    """
    _require(form, FORMATS, "--format")
    if dtype is not None:
        _require(dtype, DTYPES, "--dtype")
    mapping = dict(map(_rule, rename))
    if out.is_file():
        raise AdapterFileError(f"{str(out)!r} is a file", hint="give a folder")
    adapters = adapters_in(directory)
    read = [_converted(adapter, dtype, mapping) for adapter in adapters]
    if mapping and not any(renamed for _, _, renamed in read):
        raise ConfigError(f"--rename {listed(rename)} matches no tensor", hint="`peft-core inspect` lists their names")
    written = _write(directory, out, adapters, read, form)
    return {
        "out": str(out),
        "adapters": [
            {"name": adapter.name, "tensors": len(tensors), "renamed": renamed, "bytes": sum(t.numel() * t.element_size() for t in tensors.values())}
            for adapter, (tensors, _, renamed) in zip(adapters, read, strict=True)
        ],
        "files": written,
    }


def _require(given: str, known: Mapping[str, Any], option: str) -> None:
    if given not in known:
        raise ConfigError(f"{option} {given!r} is unknown", hint=did_you_mean(given, known, f"write one of {', '.join(known)}"))


def _rule(text: str) -> tuple[str, str]:
    pattern, equals, replacement = text.rpartition("=")  # split at the last "=": regular expressions may contain "="
    if not equals or not pattern:
        raise ConfigError(f"--rename {text!r} is no REGEX=REPLACEMENT", hint=r"for example --rename '^model\.layers=layers'")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--rename {text!r}: {pattern!r} is no regular expression: {error}") from error
    return pattern, replacement


def _converted(adapter: Adapter, dtype: str | None, mapping: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """Return (new name → converted tensor, metadata of the file header, number of renamed tensors) for an adapter."""
    raw_config(adapter)  # a folder that can't be loaded is not rewritten
    file = weights_of(adapter)
    rename = key_renamer(mapping)
    tensors: dict[str, Tensor] = {}
    renamed = 0
    for name, tensor in file.tensors().items():
        try:
            new = rename(name)
        except (re.error, IndexError) as error:
            raise ConfigError(f"--rename can't be applied to {name!r}: {error}", hint=r"groups in a replacement are \1, \2") from error
        if new in tensors:
            raise ConfigError(f"--rename gives two tensors of {adapter.name!r} the name {new!r}", hint="use a more specific regular expression")
        renamed += new != name
        tensors[new] = tensor.to(DTYPES[dtype]) if dtype and tensor.is_floating_point() else tensor
        if dtype and tensor.is_floating_point() and bool(tensor.isfinite().all()) and not bool(tensors[new].isfinite().all()):
            raise ConfigError(f"{name!r} has values too large for {dtype}", hint="bfloat16 has the range of float32")
    return tensors, {"format": "pt", **file.metadata}, renamed


def _write(
    directory: Path, out: Path, adapters: Sequence[Adapter], read: Sequence[tuple[dict[str, Tensor], dict[str, str], int]], form: str
) -> list[str]:
    name, others = FORMATS[form], [other for key, other in FORMATS.items() if key != form]
    written: list[Path] = []
    made = [folder for folder in dict.fromkeys([out, *(out / a.path.relative_to(directory) for a in adapters)]) if not folder.exists()]
    try:
        for folder in made:
            folder.mkdir(parents=True, exist_ok=True)
        with AtomicFolder() as staged:
            for adapter, (tensors, metadata, _) in zip(adapters, read, strict=True):
                folder = out / adapter.path.relative_to(directory)
                staged.tensors(folder / name, tensors, metadata)
                staged.text(folder / CONFIG_NAME, (adapter.path / CONFIG_NAME).read_text(encoding="utf-8"))
                for other in others:
                    staged.remove(folder / other)
                written += [folder / name, folder / CONFIG_NAME]
            for beside in (MANIFEST_NAME, "README.md"):
                if (directory / beside).is_file():
                    staged.text(out / beside, (directory / beside).read_text(encoding="utf-8"))
                    written.append(out / beside)
    except BaseException:
        for folder in reversed(made):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    return sorted(path.relative_to(out).as_posix() for path in written)
