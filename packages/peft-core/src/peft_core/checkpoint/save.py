"""Saving adapters to folders: the adapter `default` in the root folder, each other adapter in a sub-folder with its name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..base.statistics import batches_seen
from ..config import PeftConfig
from ..errors import AdapterFileError, PeftWarning, listed
from ..plugins import hooks
from ..tuners.exchange import AdapterCheckpoint
from ..tuners.index import AdapterIndex, require_index
from . import embeddings, model_card
from .files import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, AtomicFolder, config_target, find_weights
from .passport import passport
from .stack import MANIFEST_NAME, manifest_text
from .state_dict import adapter_tensors

ROOT_ADAPTER = "default"


def save_adapters(
    index: AdapterIndex,
    save_directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    safe_serialization: bool = True,
    selected_adapters: Sequence[str] | None = None,
    save_embedding_layers: bool | str = "auto",
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    initial: str | os.PathLike[str] | None = None,
) -> None:
    """Write adapters and the model card; if an error occurs, none of the files is written.

    Args:
        index: the adapters of the model.
        save_directory: the root folder; created if missing.
        model: the model from which `state_dict` was taken.
        safe_serialization: True: write safetensors files; False: write pickled dicts.
        selected_adapters: names of the adapters to save; None: all.
        save_embedding_layers: also write the base's embeddings: True, False, or "auto" (if they are targeted or resized).
        is_main_process: if False, only the folders are created.
        state_dict: state dict from which the tensors are taken, instead of from the model.
        initial: folder with the adapter saved right after its creation; if given, convert the adapter so that it applies to the original base.

    Raises:
        AdapterFileError: `save_directory` is a file; or the folder `initial` does not contain an adapter.
        AdapterNotFoundError: an unknown name is selected.
        CapabilityError: `initial` is given, and the adapter's tuner never changes the base.
    """
    root = Path(save_directory)
    if root.is_file():
        raise AdapterFileError(f"save_directory={str(root)!r} should be a directory, not a file", hint="choose another path")
    adapters = list(index.configs) if selected_adapters is None else list(selected_adapters)
    index.require(*adapters)
    folders = {adapter: root if adapter == ROOT_ADAPTER else root / adapter for adapter in adapters}
    created = _contents_of(initial) if initial is not None and is_main_process else None
    for folder in (root, *folders.values()):
        folder.mkdir(parents=True, exist_ok=True)
    if not is_main_process:
        return
    with AtomicFolder() as staged:
        for adapter, folder in folders.items():
            config = index.configs[adapter]
            embedded = embeddings.slots_to_save(index, adapter, save_embedding_layers)
            tensors: Mapping[str, Tensor] = adapter_tensors(index, adapter, state_dict=state_dict, model=model, further=embedded)
            if created is not None:
                kind = str(config.peft_type)
                modules = {path: module for (method, path), module in index.modules_of(adapter) if method == kind}
                converted = index.tuners[kind].relative_to_base(adapter, AdapterCheckpoint(config, tensors, modules), created)
                config, tensors = converted.config, converted.tensors
            name, other = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if safe_serialization else (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME)
            staged.remove(folder / other)  # a stale file in the other format could be loaded instead of this one
            staged.tensors(folder / name, tensors, passport(str(config.peft_type), index.view))
            staged.text(config_target(folder), config_text(index, config))
        if len(folders) > 1:
            staged.text(root / MANIFEST_NAME, manifest_text(index, root, folders))
        staged.text(root / "README.md", model_card.render(index, root / "README.md"))
    _tell_of_statistics(index)
    for adapter, folder in folders.items():
        hooks.adapter_saved(index.base, adapter, str(folder))


def _tell_of_statistics(index: AdapterIndex) -> None:
    """Warn if running statistics of the base model have changed since the first adapter was added: adapter files do not contain them."""
    now = batches_seen(index.view)
    moved = [path for path, count in index.batches_seen.items() if now.get(path, count) != count]
    if moved:
        warnings.warn(
            f"running statistics of the base changed in training and are not saved: {listed(moved)} ({len(moved)} modules with running_mean, "
            "running_var); name them in modules_to_save, or call eval() on them before training",
            PeftWarning,
            stacklevel=4,
        )


def _contents_of(folder: str | os.PathLike[str]) -> AdapterCheckpoint:
    """Return the config and the tensors stored in an adapter's folder."""
    return AdapterCheckpoint(PeftConfig.from_pretrained(folder), find_weights(folder).tensors())


def write_adapter(
    folder: str | os.PathLike[str], config: PeftConfig, tensors: Mapping[str, Tensor], model: nn.Module, *, safe_serialization: bool = True
) -> None:
    """Write the config and the weights of one adapter, which need not be part of a model (a converted adapter, for example).

    Both files are written, or none if an error occurs.

    Args:
        folder: the folder of the adapter; created if missing.
        config: config of the adapter; written with `inference_mode=True`.
        tensors: key in the file → tensor.
        model: an adapted model that contains the base model of this adapter.
        safe_serialization: True: write a safetensors file; False: write a pickled dict.

    Raises:
        AdapterFileError: `folder` is a file.
        AdapterNotFoundError: the model has no adapter.
    """
    index = require_index(model)
    root = Path(folder)
    if root.is_file():
        raise AdapterFileError(f"{str(root)!r} should be a directory, not a file", hint="choose another path")
    root.mkdir(parents=True, exist_ok=True)
    name, other = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if safe_serialization else (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME)
    with AtomicFolder() as staged:
        staged.remove(root / other)
        staged.tensors(root / name, dict(tensors), passport(str(config.peft_type), index.view))
        staged.text(config_target(root), config_text(index, config))


def config_text(index: AdapterIndex, config: PeftConfig) -> str:
    """Return the text of `adapter_config.json`, with inference mode, the base model's name, and its class if the config has no task type."""
    overrides: dict[str, Any] = {"inference_mode": True}
    if config.base_model_name_or_path is None:
        name = getattr(index.base, "name_or_path", None)
        overrides["base_model_name_or_path"] = name if isinstance(name, str) and name else None
    if config.task_type is None:
        overrides["auto_mapping"] = {"base_model_class": type(index.base).__name__, "parent_library": type(index.base).__module__}
    return config.to_json(**overrides)
