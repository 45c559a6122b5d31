"""Reads prompts that were trained on source tasks, as initial values of new multitask prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_core import AdapterFileError, AdapterWeightsError

from .config import MultitaskPromptTuningConfig
from .tensor_names import COLS, ROWS, TABLE


@dataclass(frozen=True)
class Source:
    """Initial values of a multitask prompt, read from a file.

    Args:
        table: the shared prompt (tokens, hidden).
        cols: (1, tokens, ranks), rows: (1, ranks, hidden); None: the factors are not read from the file.
    """

    table: Tensor
    cols: Tensor | None = None
    rows: Tensor | None = None


def read_source(config: MultitaskPromptTuningConfig, size: tuple[int, int]) -> Source:
    """Return the initial values from the file `prompt_tuning_init_state_dict_path` of a config.

    Args:
        config: a config whose prompt is initialised from a file.
        size: (tokens, hidden) of the new prompt.

    Raises:
        AdapterFileError: the file does not exist, or can't be read.
        AdapterWeightsError: the file lacks a tensor or the task `prompt_tuning_init_task`, or a shape does not fit.
    """
    path = Path(str(config.prompt_tuning_init_state_dict_path)).expanduser()
    tensors = _tensors(path)
    names = [TABLE] if config.prompt_tuning_init == "ONLY_SOURCE_SHARED" else [TABLE, COLS, ROWS]
    lacking = [name for name in names if not isinstance(tensors.get(name), Tensor)]
    if lacking:
        raise AdapterWeightsError(
            f"{str(path)!r} has no {' and no '.join(map(repr, lacking))}, from which prompt_tuning_init={_name(config)!r} starts; "
            f"it has {', '.join(sorted(map(str, tensors))) or 'nothing'}",
            hint="give the weights of a multitask prompt; 'ONLY_SOURCE_SHARED' takes those of any prompt",
        )
    table = tensors[TABLE].detach().float()
    _check(path, TABLE, table, size, "num_virtual_tokens and the base's hidden width")
    if len(names) == 1:
        return Source(table.clone())
    cols, rows = tensors[COLS].detach().float(), tensors[ROWS].detach().float()
    tasks = cols.shape[0] if cols.ndim == 3 else 0
    _check(path, COLS, cols, (tasks or "tasks", size[0], config.num_ranks), "num_virtual_tokens and num_ranks")
    _check(path, ROWS, rows, (tasks, config.num_ranks, size[1]), "num_ranks and the base's hidden width")
    if config.prompt_tuning_init == "EXACT_SOURCE_TASK":
        task = config.prompt_tuning_init_task
        if task >= tasks:
            raise AdapterWeightsError(
                f"prompt_tuning_init_task={task}, but {str(path)!r} has {tasks} tasks", hint=f"give one of 0 to {tasks - 1}: they are counted from 0"
            )
        return Source(table.clone(), cols[task : task + 1].clone(), rows[task : task + 1].clone())
    return Source(table.clone(), cols.mean(0, keepdim=True), rows.mean(0, keepdim=True))


def _tensors(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AdapterFileError(
            f"prompt_tuning_init_state_dict_path={str(path)!r} is no file", hint="give the adapter_model.safetensors of the source prompt"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterFileError(f"{str(path)!r} can't be read as tensors: {error}", hint="give a .safetensors file") from error
    if not isinstance(loaded, dict):
        raise AdapterFileError(f"{str(path)!r} holds a {type(loaded).__name__}, not a dict of tensors", hint="give a .safetensors file")
    return loaded


def _check(path: Path, name: str, tensor: Tensor, expected: tuple[int | str, ...], says: str) -> None:
    shape = tuple(tensor.shape)
    if shape != expected:
        wanted = ", ".join(map(str, expected))
        raise AdapterWeightsError(
            f"size mismatch: {name!r} of {str(path)!r} is {shape}, but the new prompt needs ({wanted})", hint=f"{says} must be those of the source"
        )


def _name(config: MultitaskPromptTuningConfig) -> str:
    return str(getattr(config.prompt_tuning_init, "value", config.prompt_tuning_init))
