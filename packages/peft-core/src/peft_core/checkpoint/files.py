"""Adapter folders on disk: find them, read them lazily, and write them so that a reader sees the old config and weights or the new ones, no mix."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CONFIG_NAME
from ..errors import AdapterFileError, listed

SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"


@dataclass(frozen=True)
class WeightFile:
    """The weight file of one adapter. Names and shapes can be read without loading the tensors (safetensors files only)."""

    path: Path

    @property
    def is_safetensors(self) -> bool:
        """Whether the file is a safetensors file; if not, it is a pickled dict, which is read with weights-only unpickling."""
        return self.path.suffix == ".safetensors"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name → shape; for a safetensors file, read from the header only.

        Raises:
            AdapterFileError: the file is damaged.
        """
        if not self.is_safetensors:
            return {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        with self._open("cpu") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The metadata in the header of a safetensors file: the tuner's distribution package, the base (see `passport`). Empty for a pickled file."""
        if not self.is_safetensors:
            return {}
        with self._open("cpu") as handle:
            return dict(handle.metadata() or {})

    def tensors(self, device: str | torch.device | None = None) -> dict[str, Tensor]:
        """Return a dict: name → tensor, with all tensors on `device` (default: CPU).

        Raises:
            AdapterFileError: the file is damaged, or the pickled file is not a dict of tensors.
        """
        target = str(device or "cpu")
        if self.is_safetensors:
            with self._open(target) as handle:
                return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        try:
            loaded = torch.load(self.path, map_location=target, weights_only=True)
        except Exception as error:
            raise AdapterFileError(f"{str(self.path)!r} can't be read: {error}", hint="is it a dict of tensors saved with torch.save?") from error
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise AdapterFileError(f"{str(self.path)!r} is no dict of tensors")
        return loaded

    @contextlib.contextmanager
    def _open(self, device: str) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            handle = safe_open(self.path, framework="pt", device=device)
        except (SafetensorError, OSError) as error:
            raise AdapterFileError(f"{str(self.path)!r} can't be read: {error}", hint="is the file complete?") from error
        with handle:
            yield handle


def find_weights(model_id: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> WeightFile:
    """Return an adapter's weight file from a local folder or the Hub: `adapter_model.safetensors`, or `adapter_model.bin` if there is no such file.

    Raises:
        AdapterFileError: neither file exists.
    """
    directory = Path(model_id) / (subfolder or "")
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    for name in names:
        if (directory / name).is_file():
            return WeightFile(directory / name)
    if directory.is_dir() or os.path.isabs(model_id):
        found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
        raise AdapterFileError(
            f"Can't find weights for {str(directory)!r}: neither {names[0]} nor {names[1]} is there",
            hint=f"the folder holds {listed(found)}" if found else "the folder is empty or missing",
        )
    from huggingface_hub import hf_hub_download

    hub.pop("use_auth_token", None)
    error: Exception | None = None
    for name in names:
        try:
            return WeightFile(Path(hf_hub_download(str(model_id), name, subfolder=subfolder, **hub)))
        except Exception as caught:
            error = caught
    raise AdapterFileError(f"Can't find weights for {str(model_id)!r} on the Hub: {error}", hint="check the repository id and the network") from error


class AtomicFolder:
    """Writes files under temporary names and renames all of them at the end of the block; on an error, none of the targets is changed.

    Example:
        >>> with AtomicFolder() as folder:
        ...     folder.text(path / "adapter_config.json", text)
    """

    def __init__(self) -> None:
        self._staged: list[tuple[Path, Path]] = []
        self._removed: list[Path] = []

    def __enter__(self) -> AtomicFolder:
        return self

    def text(self, target: Path, text: str) -> None:
        """Write a text file under a temporary name; it gets the name `target` at the end of the block."""
        self._stage(target).write_text(text, encoding="utf-8")

    def tensors(self, target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a weight file under a temporary name: safetensors if `target` ends in ``.safetensors``, otherwise a pickled dict."""
        path = self._stage(target)
        whole = _unshared(tensors)
        if target.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(whole, path, metadata=dict(metadata))
            _sort_metadata(path)
        else:
            torch.save(whole, path)

    def remove(self, target: Path) -> None:
        """Delete the file `target`, if it exists, at the end of the block."""
        self._removed.append(target)

    def _stage(self, target: Path) -> Path:
        path = target.with_name(f".{target.name}.{os.getpid()}.part")
        self._staged.append((path, target))
        return path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        backups: list[tuple[Path, Path | None]] = []
        try:
            if kind is None:
                self._commit(backups)
        except BaseException:
            for target, backup in reversed(backups):
                target.unlink(missing_ok=True)
                if backup is not None:
                    os.replace(backup, target)
            backups.clear()
            raise
        finally:
            for path, _ in self._staged:
                path.unlink(missing_ok=True)
            for _, backup in backups:
                if backup is not None:
                    backup.unlink(missing_ok=True)

    def _commit(self, backups: list[tuple[Path, Path | None]]) -> None:
        """Rename all files to their targets, and delete the files to be removed.

        Before each change, (target, path of the backup of its old content, or None) is appended to `backups`.
        """
        for path, target in self._staged:
            backups.append((target, _moved_aside(target)))
            os.replace(path, target)
        for target in self._removed:
            backup = _moved_aside(target)
            if backup is not None:
                backups.append((target, backup))


def _moved_aside(target: Path) -> Path | None:
    """Rename a file to a backup name, so that it can be restored, and return the new path; None if there is no such file."""
    if not target.exists():
        return None
    backup = target.with_name(f".{target.name}.{os.getpid()}.before")
    os.replace(target, backup)
    return backup


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a safetensors file: safetensors writes it in random order, but equal adapters should give equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies of the tensors where needed, so that no two share memory, because the file format does not support views."""
    seen: set[int] = set()
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        pointer = tensor.untyped_storage().data_ptr() if tensor.numel() and not tensor.is_meta else 0
        if pointer in seen and pointer:
            tensor = tensor.clone()
        seen.add(pointer)
        whole[name] = tensor
    return whole


def config_target(directory: Path) -> Path:
    """Return the path of the adapter config in a folder."""
    return directory / CONFIG_NAME
