"""`AutoPeftModel` and its task classes: they load an adapter and its base, given only the location of the adapter."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..config import HUB_KEYS, PeftConfig, TaskType
from ..errors import ConfigError
from .configs import read_config
from .peft_model import PeftModel

#: the libraries from which a class named in the `auto_mapping` of a config file may be imported; a file must not cause arbitrary imports
ALLOWED_LIBRARIES = ("transformers", "diffusers", "sentence_transformers", "timm", "torchvision", "open_clip")
#: task → the transformers class that loads base models for this task
_BASES = {
    TaskType.CAUSAL_LM.value: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM.value: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS.value: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS.value: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS.value: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION.value: "AutoModel",
}


class AutoPeftModel:
    """Loads an adapter and its base with `from_pretrained`, and returns a model of the class for the task in the adapter's config.

    Args:
        *args, **kwargs: whatever they are, calling the class raises an error.

    Raises:
        OSError: the class is called; use `from_pretrained`.
    """

    #: the only task whose adapters this class loads; None: any
    task: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is designed to be instantiated using the `{name}.from_pretrained(pretrained_model_name_or_path)` method.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        *,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base of an adapter, add the adapter to it, and return the adapted model.

        Args:
            pretrained_model_name_or_path: the folder, or the repository id on the Hub, of the adapter.
            adapter_name: the adapter's name in the returned model.
            is_trainable: True: the adapter is trainable. False: it is frozen, and the model is in eval mode.
            config: the config to use instead of the config file.
            revision: the revision of the adapter's repository; the revision of the base is in the config.
            import_allowlist: libraries, in addition to `ALLOWED_LIBRARIES`, from which the class of the base may be imported if the config file
                names one of them.
            **kwargs: arguments of the base's `from_pretrained` (`dtype`, `device_map`, ...); download options are used for base and adapter.

        Raises:
            ConfigError: the config names no base, belongs to another task, or names a library that must not be imported.
            others: as in `PeftModel.from_pretrained`.
        """
        hub = {name: value for name, value in kwargs.items() if name in HUB_KEYS or name == "subfolder"}
        download_options = {**hub, **({"revision": revision} if revision is not None else {})}
        if config is None:
            config = read_config(pretrained_model_name_or_path, download_options)
        if not config.base_model_name_or_path:
            raise ConfigError(
                f"the adapter in {str(pretrained_model_name_or_path)!r} does not say which base it was trained on (base_model_name_or_path is empty)",
                hint="load the base yourself, then use PeftModel.from_pretrained(base, folder)",
            )
        # libraries that inject adapters without a task (transformers) leave task_type out; then the task of this class is used
        task = str(config.task_type) if config.task_type is not None else cls.task
        if cls.task is not None and task != cls.task:
            raise ConfigError(
                f"Expected target PEFT class: {cls.class_for(task).__name__}, but you have asked for: {cls.class_for(cls.task).__name__} "
                "make sure that you are loading the correct model for your task type.",
                hint=f"the adapter's task_type is {task!r}",
            )
        base_options = {name: value for name, value in kwargs.items() if name != "subfolder"}
        base: Any = _base_class(config, task, import_allowlist or ()).from_pretrained(
            config.base_model_name_or_path, revision=config.revision or "main", **base_options
        )
        _fit_vocabulary(base, pretrained_model_name_or_path, download_options, bool(kwargs.get("trust_remote_code", False)))
        return cls.class_for(task).from_pretrained(base, pretrained_model_name_or_path, adapter_name, is_trainable, config, **download_options)

    @classmethod
    def class_for(cls, task: str | None) -> type[PeftModel]:
        """Return the subclass of `PeftModel` that is instantiated for a task."""
        return PeftModel.class_for(task or "")


def _base_class(config: PeftConfig, task: str | None, further: Sequence[str]) -> Any:
    import transformers

    if task in _BASES:
        return getattr(transformers, _BASES[task])
    mapping = getattr(config, "auto_mapping", None) or {}
    library, name = mapping.get("parent_library"), mapping.get("base_model_class")
    if not library or not name:
        raise ConfigError(
            "Cannot infer the auto class from the config, please make sure that you are loading the correct model for your task type.",
            hint="the config has neither a task_type nor an auto_mapping: load the base yourself",
        )
    if isinstance(further, str):
        raise ConfigError(f"import_allowlist={further!r} is a str", hint=f"write [{further!r}]")
    allowed = (*ALLOWED_LIBRARIES, *further)
    if not any(f"{library}.".startswith(f"{known}.") for known in allowed):
        raise ConfigError(
            f"auto_mapping asks for {name!r} of the library {library!r}, which is not one of {list(allowed)}",
            hint=f"if you trust it, pass import_allowlist=[{str(library).partition('.')[0]!r}]",
        )
    return getattr(importlib.import_module(str(library)), str(name))


def _fit_vocabulary(base: nn.Module, folder: str | os.PathLike[str], hub: dict[str, Any], trust_remote_code: bool) -> None:
    """If a tokenizer was saved with the adapter and has more tokens than the base's embeddings, resize the embeddings to its size."""
    if not _has_tokenizer(folder, hub):
        return
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **hub)
    embeddings: Any = base.get_input_embeddings()  # type: ignore[operator]
    if len(tokenizer) > embeddings.weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]


def _has_tokenizer(folder: str | os.PathLike[str], hub: dict[str, Any]) -> bool:
    name = "tokenizer_config.json"
    local = Path(folder, hub.get("subfolder") or "", name)
    if local.is_file() or Path(folder).is_dir():
        return local.is_file()
    from huggingface_hub import file_exists

    path_in_repo = f"{hub['subfolder']}/{name}" if hub.get("subfolder") else name
    return bool(file_exists(str(folder), path_in_repo, revision=hub.get("revision"), token=hub.get("token")))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For causal language models."""

    task = TaskType.CAUSAL_LM.value


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For encoder-decoder language models."""

    task = TaskType.SEQ_2_SEQ_LM.value


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For sequence classifiers."""

    task = TaskType.SEQ_CLS.value


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For token classifiers."""

    task = TaskType.TOKEN_CLS.value


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For extractive question answerers."""

    task = TaskType.QUESTION_ANS.value


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For models without a head."""

    task = TaskType.FEATURE_EXTRACTION.value
