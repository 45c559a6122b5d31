"""Reads adapter folders for the commands: the adapters in a folder, the headers of their weight files, and their configs."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, WeightFile, find_weights
from ..checkpoint.stack import MANIFEST_NAME, read_stack
from ..config import CONFIG_NAME, FORMAT_VERSION, PeftConfig
from ..config.names import jsonable
from ..errors import AdapterFileError, PeftError, listed
from ..plugins import registry


@dataclass(frozen=True)
class Adapter:
    """One adapter on disk: `name` is its name in the stack (or the name of its folder), `path` is its folder."""

    name: str
    path: Path


@dataclass(frozen=True)
class TensorInfo:
    """Header information about one tensor; `dtype` is the torch name, such as ``"float32"``; `bytes` is its size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numbers(self) -> int:
        """Number of elements of the tensor."""
        product = 1
        for size in self.shape:
            product *= size
        return product


def adapters_in(directory: Path) -> list[Adapter]:
    """Return the adapters of a folder: those in its manifest; without a manifest, the one in the folder itself, or else those in its sub-folders.

    Raises:
        AdapterFileError: the folder does not exist, or contains no adapter.
    """
    if not directory.is_dir():
        raise AdapterFileError(f"there is no folder {str(directory)!r}", hint="give the folder that save_pretrained wrote")
    if (directory / MANIFEST_NAME).is_file():
        return [Adapter(member.name, directory / member.folder) for member in read_stack(directory).members]
    if any((directory / name).is_file() for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        return [Adapter("default", directory)]
    nested = sorted(path.parent for path in directory.glob(f"*/{CONFIG_NAME}"))
    if not nested:
        found = sorted(path.name for path in directory.iterdir())
        raise AdapterFileError(
            f"{str(directory)!r} holds no adapter: there is no {CONFIG_NAME}", hint=f"it holds {listed(found)}" if found else "it is empty"
        )
    return [Adapter(path.name, path) for path in nested]


def raw_config(adapter: Adapter) -> dict[str, Any]:
    """Return the fields of an adapter's config file without validating them.

    Raises:
        ConfigFileError: the file can't be read.
    """
    return PeftConfig.from_json_file(adapter.path / CONFIG_NAME)


def tensors_of(file: WeightFile) -> list[TensorInfo]:
    """Return name, dtype, shape and size of each tensor, from the file's header (a pickled file is loaded instead).

    Raises:
        AdapterFileError: the file can't be read.
    """
    if not file.is_safetensors:
        return [
            TensorInfo(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.numel() * t.element_size())
            for name, t in sorted(file.tensors().items())
        ]
    from safetensors import safe_open

    shapes = file.shapes  # if the file is damaged, this raises the clearer error
    with safe_open(file.path, framework="pt") as handle:
        dtypes = {name: handle.get_slice(name).get_dtype() for name in shapes}
    found = [TensorInfo(name, _torch_name(dtypes[name]), shape, 0) for name, shape in sorted(shapes.items())]
    return [dataclasses.replace(info, bytes=info.numbers * _width(dtypes[info.name])) for info in found]


def weights_of(adapter: Adapter) -> WeightFile:
    """Return an adapter's weight file. Raises the same errors as `find_weights`."""
    return find_weights(adapter.path)


def changed_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the differences between a config and the defaults of its class.

    Returns:
        A dict with ``changed`` (field → value), ``unknown`` (fields that the class does not have), ``compared`` (False: the tuner is not
        installed, and `changed` has every non-empty field), ``reason`` (why the config could not be compared).
    """
    fields = {key: value for key, value in raw.items() if key not in ("peft_type", "auto_mapping")}
    try:
        cls = registry.config_class(str(raw.get("peft_type") or ""))
    except PeftError as error:
        said = {key: value for key, value in sorted(fields.items()) if value not in (None, [], {}, "", False)}
        return {"changed": said, "unknown": [], "compared": False, "reason": error.message}
    defaults = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = jsonable(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = jsonable(field.default_factory())
        else:
            defaults[field.name] = None
    defaults["peft_version"] = FORMAT_VERSION
    changed = {key: value for key, value in sorted(fields.items()) if key in defaults and value != defaults[key]}
    return {"changed": changed, "unknown": sorted(set(fields) - set(defaults)), "compared": True, "reason": ""}


def _torch_name(dtype: str) -> str:
    match = re.fullmatch(r"(BF|F|I|U)(\d+)(\w*)", dtype)
    if match is None:
        return dtype.lower()
    kind = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint"}[match.group(1)]
    return f"{kind}{match.group(2)}{match.group(3).lower()}"


def _width(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return int(bits.group()) // 8 if bits else 1
