"""`peft-core merge`: merges adapters into a base model and writes the result as a new model folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint.stack import MANIFEST_NAME
from ..errors import AdapterFileError, ModelError, listed
from ..models.peft_model import PeftModel
from ..tensor_names import without_wrapper
from . import bases
from .folders import Adapter, adapters_in, raw_config, weights_of
from .output import Report

#: patterns of optional files of a model besides its weights and `config.json`, such as tokenizer files
TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
)


def merge(
    directory: Path, base: Path, out: Path, *, safe: bool = False, progress: bool = False, stage: Callable[[str], None] = lambda _: None
) -> Report:
    """Merge the adapter in `directory` (for a stack: its active adapters) into a base model, and write the result.

    Args:
        directory: the adapter folder.
        base: folder of the base model.
        out: the folder to write; if an error occurs, it is not written at all.
        safe: raise an error if a merged weight is not finite.
        progress: show a progress bar while weights are merged.
        stage: called with a description of each step.

    Raises:
        AdapterFileError: `out` is not empty, or `directory` contains no adapter, or several without a manifest.
        ModelError: the base model can't be read, or some of its parameters would be initialised randomly.
        CapabilityError, MergeError: the method can't be merged.
        Other errors of `PeftModel.from_pretrained`.
    """
    _require_empty(out)
    adapters = adapters_in(directory)
    stacked = (directory / MANIFEST_NAME).is_file()
    if len(adapters) > 1 and not stacked:
        raise AdapterFileError(
            f"{str(directory)!r} holds {len(adapters)} adapters and no {MANIFEST_NAME}", hint=f"give one of them: {str(adapters[0].path)!r}"
        )
    with bases.quiet():
        stage("reading the base")
        model = _base(adapters, base)
        stage("loading the adapter")
        wrapped = PeftModel.from_stack(model, directory) if stacked else PeftModel.from_pretrained(model, adapters[0].path)
        active = list(wrapped.active_adapters)
        stage("merging")
        merged = wrapped.merge_and_unload(progressbar=progress, safe_merge=safe)
        stage("writing")
        files = _write(merged, [directory, base], out)
    return {
        "out": str(out),
        "model": type(merged).__name__,
        "merged": active,
        "files": files,
        "bytes": sum((out / name).stat().st_size for name in files),
    }


def _base(adapters: list[Adapter], base: Path) -> nn.Module:
    # the first adapter with a task type decides the class, because all adapters of a stack have the same task
    raws = [raw_config(adapter) for adapter in adapters]
    at = next((i for i, raw in enumerate(raws) if raw.get("task_type")), 0)
    if not base.is_dir():
        raise AdapterFileError(f"there is no folder {str(base)!r}", hint="--base is a local folder with a whole model; the network is never asked")
    model, absent = bases.load(base, raws[at], dict(sorted(weights_of(adapters[at]).shapes.items())))
    brought = {key for adapter in adapters for key in without_wrapper(weights_of(adapter).shapes)}
    random = [name for name in absent if name not in brought]
    if random:
        raise ModelError(
            f"{str(base)!r} lacks {listed(random)} of {type(model).__name__}, and the adapter does not bring them: they would be random",
            hint="is this the base that the adapter was trained on, and does its task_type fit?",
        )
    return model


def _require_empty(out: Path) -> None:
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise AdapterFileError(f"{str(out)!r} exists and is not an empty folder", hint="name a new folder")
    if not out.absolute().parent.is_dir():
        raise AdapterFileError(f"there is no folder {str(out.absolute().parent)!r}", hint="make it first")


def _write(model: Any, sources: list[Path], out: Path) -> list[str]:
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-") as staging:
        whole = Path(staging) / "whole"
        model.save_pretrained(whole)
        for source in sources:  # the tokenizer of the adapter takes precedence over that of the base model
            for path in sorted({path for pattern in TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()}):
                if not (whole / path.name).exists():
                    shutil.copy2(path, whole / path.name)
        files = sorted(path.name for path in whole.iterdir())
        if out.exists():
            out.rmdir()  # it is empty; some systems can't rename onto an existing folder
        whole.rename(out)
    return files
