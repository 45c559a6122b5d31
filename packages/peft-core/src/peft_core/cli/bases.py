"""Loads base models from local folders: their configs, and the models on the meta device or with weights. Never uses the network."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..tensor_names import is_weight_in
from ..tuners.tasks import task_of

AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def config_of(path: Path) -> Any:
    """Return the transformers config from a folder or a `config.json`; custom code in the folder is not executed.

    Raises:
        ModelError: there is no such config, or transformers does not support it.
    """
    if not path.exists():
        raise ModelError(f"there is no {str(path)!r}", hint="give a local folder with a config.json; the network is never asked")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _unreadable(path, error) from error


def build_empty(path: Path, adapter: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Return the base model for an adapter on the meta device, with names and shapes of parameters but without values.

    Args:
        path: folder of the base model, or its `config.json`.
        adapter: the fields of the adapter's config; with ``{}``, the config of the base model decides the class.
        shapes: shapes of the adapter's tensors; the number of labels is taken from a saved head.

    Raises:
        ModelError: transformers can't build the model.
    """
    config = config_of(path)
    _set_labels(config, adapter, shapes)
    try:
        with torch.device("meta"):
            model: nn.Module = _builder(config, adapter)
    except Exception as error:
        raise _unreadable(path, error) from error
    return model.eval()


def load(path: Path, adapter: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[nn.Module, list[str]]:
    """Return the base model for an adapter, with weights in the dtype of its files, and the names of the parameters missing in these files.

    The arguments and the errors are those of `build_empty`.
    """
    config = config_of(path)
    _set_labels(config, adapter, shapes)
    failure: Exception | None = None
    for cls in _classes(config, adapter):
        try:
            model, info = cls.from_pretrained(str(path), config=config, dtype="auto", local_files_only=True, output_loading_info=True)
            return model.eval(), sorted(info["missing_keys"])
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            failure = failure or error
    raise _unreadable(path, failure) from failure


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context manager that silences the log messages and progress bars of transformers; the commands print their own."""
    logging: Any = importlib.import_module("transformers.utils.logging")  # its functions have no types
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _builder(config: Any, adapter: Mapping[str, Any]) -> nn.Module:
    failure: Exception | None = None
    for cls in _classes(config, adapter):
        try:
            model: nn.Module = cls.from_config(config) if hasattr(cls, "from_config") else cls._from_config(config)
            return model
        except ValueError as error:  # this Auto class does not support the architecture: try the next class
            failure = failure or error
    raise failure or ValueError("no class for this config")


def _classes(config: Any, adapter: Mapping[str, Any]) -> list[Any]:
    """Return the model classes to try, in this order: for the task, from the adapter's `auto_mapping`, from the base model's config."""
    import transformers

    names = [AUTO.get(str(adapter.get("task_type"))), (adapter.get("auto_mapping") or {}).get("base_model_class")]
    names += [*(getattr(config, "architectures", None) or ()), "AutoModel"]
    found = []
    for name in names:
        cls = getattr(transformers, name, None) if isinstance(name, str) else None
        # the name may come from an untrusted file: accept only model classes
        if isinstance(cls, type) and (name in (*AUTO.values(),) or issubclass(cls, transformers.PreTrainedModel)):
            found.append(cls)
    return found


def _set_labels(config: Any, adapter: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Set `config.num_labels` to the size of the adapter's saved head, unless the base model already has a head for this task."""
    heads = task_of(adapter.get("task_type")).heads
    task = AUTO.get(str(adapter.get("task_type")), "").removeprefix("AutoModel")
    if "classifier" not in heads or any(str(name).endswith(task) for name in getattr(config, "architectures", None) or ()):
        return
    rows = [shape[0] for key, shape in shapes.items() if len(shape) == 2 and is_weight_in(key, heads)]
    if rows:
        config.num_labels = rows[-1]


def _unreadable(path: Path, error: Exception | None) -> ModelError:
    text = str(error).strip().partition(os.linesep)[0]
    return ModelError(f"{str(path)!r} can't be used as a transformers model: {type(error).__name__}: {text}", hint="is its config.json complete?")
