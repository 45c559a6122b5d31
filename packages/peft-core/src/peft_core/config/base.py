"""Configurations: dataclasses with the fields of `adapter_config.json`. This module does not import torch."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..errors import ConfigError, ConfigFileError, did_you_mean
from ..plugins import registry
from .names import PeftType, TaskType, jsonable, to_builtin
from .reading import CONFIG_NAME, FORMAT_VERSION, HUB_KEYS, config_from_dict, find_config, require_config
from .values import require_list_of_names, require_names_or_expression, require_number, require_pattern, require_positive_integer


@dataclass(frozen=True)
class SharedOptions:
    """The options of a config that peft-core implements for every method; see `PeftConfig.shared_options`.

    Args:
        modules_to_save: modules of the base model of which full copies are trained and saved; given by the ends of their names.
        bias: which biases of the base model are trained: ``"none"``, ``"all"``, or ``"targets"`` (biases of the adapted modules).
        token_indices: indices of trainable embedding rows: a list for the input embeddings, or module name → list; None: no such rows.
        ensure_weight_tying: whether modules of the base model that share a weight (embedding and output layer) also share it in the adapter;
            None: the method has no such option, and no warning about tied weights is given.
    """

    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    ensure_weight_tying: bool | None = None


@dataclass
class PeftConfig:
    """Base class of adapter configs. Saved as `adapter_config.json`.

    Args:
        task_type: a `TaskType` or its name; selects the task class. None: the plain `PeftModel`.
        peft_type: the method; set by each subclass.
        auto_mapping: class and library of the base model, written when `task_type` is None.
        peft_version: release of the reference implementation whose file format is used.
        base_model_name_or_path: name on the Hub or path of the base model; set by `get_peft_model`.
        revision: revision of the base model.
        inference_mode: whether the adapter's parameters are frozen.

    Raises:
        ConfigError: `task_type` is unknown.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    default_peft_type: ClassVar[str | None] = None
    #: fields that are never written to files
    transient: ClassVar[frozenset[str]] = frozenset()
    #: fields unknown to other readers of the format: written only if they differ from their default
    additional: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.task_type is not None:
            self.task_type = _task_type(self.task_type)
        if self.default_peft_type is not None:
            if self.peft_type is not None and str(self.peft_type).upper() != self.default_peft_type:
                raise ConfigError(
                    f"{type(self).__name__} is for peft_type={self.default_peft_type!r}, not {str(self.peft_type)!r}",
                    hint="use get_peft_config(dict), which picks the class by its peft_type",
                )
            self.peft_type = self.default_peft_type
        if self.peft_type is not None:
            self.peft_type = PeftType(self.peft_type)
        if self.peft_version is None:
            self.peft_version = FORMAT_VERSION
        self.check()

    def check(self) -> None:
        """Validate the values of the fields. Called when the config is created, and again before an adapter is, because fields may be reassigned.

        Raises:
            ConfigError: a field has an invalid value.
        """

    # ---- properties of the method, used by core -------------------------------------------------------------------
    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method learns virtual tokens and leaves the layers of the base as they are."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Always False; exists for code that was written for the reference implementation."""
        return False

    def shared_options(self) -> SharedOptions:
        """Return the options that core implements for every method; the defaults if the config has no such fields."""
        return SharedOptions()

    # ---- to and from files ----------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Return {name: value} of the fields that are written to a file; enum members become their values, sets remain sets."""
        return {
            f.name: to_builtin(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.init and f.name not in self.transient and not (f.name in self.additional and getattr(self, f.name) == f.default)
        }

    def to_json(self, **overrides: Any) -> str:
        """Return the text of `adapter_config.json`. Keys and sets are sorted, so that equal configs give identical text.

        Args:
            **overrides: values to write instead of those of the fields with these names.
        """
        return json.dumps(jsonable({**self.to_dict(), **overrides}), indent=2, sort_keys=True)

    def save_pretrained(self, save_directory: str | os.PathLike[str], auto_mapping_dict: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write `adapter_config.json` into `save_directory`, which is created if missing.

        Args:
            save_directory: the directory.
            auto_mapping_dict: value to write as `auto_mapping`; None: write the value of the config.
            **kwargs: ignored; accepted for compatibility.

        Raises:
            ConfigFileError: `save_directory` is a file.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise ConfigFileError(f"save_directory={str(directory)!r} is a file", hint="give a directory")
        directory.mkdir(parents=True, exist_ok=True)
        overrides = {} if auto_mapping_dict is None else {"auto_mapping": auto_mapping_dict}
        target = directory / CONFIG_NAME
        temporary = target.with_name(f".{CONFIG_NAME}.{os.getpid()}")
        temporary.write_text(self.to_json(**overrides), encoding="utf-8")
        os.replace(temporary, target)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any) -> PeftConfig:
        """Read a config from a directory or from the Hub. The `peft_type` in the file decides the class, not the class this is called on.

        Args:
            pretrained_model_name_or_path: a directory, or a repository id on the Hub.
            subfolder: folder inside the directory or repository.
            **kwargs: download options (`revision`, `token`, `cache_dir`, ...), and values for fields that are missing in the file.

        Raises:
            ConfigFileError: `adapter_config.json` is missing or isn't a JSON object, or it has no `peft_type` and isn't a config of this class.
            UnknownTunerError: no tuner for its `peft_type` is installed.
        """
        hub = {key: kwargs.pop(key) for key in HUB_KEYS if key in kwargs}
        path = find_config(pretrained_model_name_or_path, subfolder, **hub)
        loaded = cls.from_json_file(path)
        require_config(loaded, cls, str(path))
        fields = {**kwargs, **loaded}
        found: PeftConfig = config_from_dict(fields, fallback=cls, origin=str(path), optional=frozenset(kwargs) - set(loaded))
        for name in found.transient & kwargs.keys():  # files never contain transient fields
            setattr(found, name, kwargs[name])
        return found

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """Read a JSON file that contains an object, and return it as a dict.

        Args:
            path_json_file: path of the file.
            **kwargs: ignored; accepted for compatibility.

        Raises:
            ConfigFileError: the file can't be read, or does not contain a JSON object.
        """
        try:
            loaded = json.loads(Path(path_json_file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigFileError(f"{str(path_json_file)!r} can't be read as JSON: {error}") from error
        if not isinstance(loaded, dict):
            raise ConfigFileError(f"{str(path_json_file)!r} holds a {type(loaded).__name__}, not an object")
        return loaded

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> PeftConfig:
        """Build a config from `config_dict`. As for a file, unknown keys are ignored with one warning."""
        found: PeftConfig = config_from_dict(config_dict, fallback=cls)
        return found

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build a config of the class for `kwargs["peft_type"]`; without a `peft_type`, of the class this is called on."""
        target = registry.config_class(kwargs["peft_type"]) if kwargs.get("peft_type") else cls
        return typing.cast(PeftConfig, target(**kwargs))


def _task_type(given: str | TaskType) -> TaskType:
    names = [task.value for task in TaskType]
    if str(given) not in names:
        raise ConfigError(
            f"Invalid task type: {str(given)!r}. Must be one of the following task types: {', '.join(names)}",
            hint=did_you_mean(str(given), names) or None,
        )
    return TaskType(str(given))


@dataclass
class LayerConfig(PeftConfig):
    """Base class of configs of methods that wrap layers. `peft_core.tuners.targeting` documents how layers are selected.

    Args:
        target_modules: a list of names (``name`` matches modules whose path is ``name`` or ends in ``.name``), one regular expression that has
            to match the full path, ``"all-linear"``, or None for the default of the architecture.
        exclude_modules: names or a regular expression; modules that match are not adapted even if `target_modules` matches them.
        layers_to_transform: adapt only the layers with these numbers (only if `target_modules` is a list).
        layers_pattern: name(s) of the list of layers; by default the first number in a path is the layer number.
        rank_pattern, alpha_pattern: per-module values: regular expression for the end of a name → value; the first match is used.
        modules_to_save: modules of which full copies are trained and saved.

    Raises:
        ConfigError: the values of two fields contradict each other.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = None

    def check(self) -> None:
        """Validate the targets, the patterns and `modules_to_save`; converts lists of target names to sets."""
        super().check()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
            require_names_or_expression(name, getattr(self, name))
        self._check_layers()
        self.rank_pattern = {} if self.rank_pattern is None else self.rank_pattern  # files of old releases contain null
        self.alpha_pattern = {} if self.alpha_pattern is None else self.alpha_pattern
        require_pattern("rank_pattern", self.rank_pattern, require_positive_integer)
        require_pattern("alpha_pattern", self.alpha_pattern, require_number)
        require_list_of_names("modules_to_save", self.modules_to_save)

    def _check_layers(self) -> None:
        """Validate `layers_to_transform` and `layers_pattern`: both need a list of targets, and `layers_pattern` needs `layers_to_transform`."""
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"`{name}` cannot be used when `target_modules` is a str", hint="put the layer numbers into the expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified")
        if self.layers_to_transform == []:
            self.layers_to_transform = None  # files contain an empty list, which means all layers

    def shared_options(self) -> SharedOptions:
        """Return the shared options with `modules_to_save`."""
        return SharedOptions(modules_to_save=tuple(self.modules_to_save or ()))


@dataclass
class PromptLearningConfig(PeftConfig):
    """Base class of configs of methods with virtual tokens. Sizes that are None are read from the base model.

    Args:
        num_virtual_tokens: number of virtual tokens in the prompt.
        token_dim: embedding dimension of a virtual token.
        num_transformer_submodules: 1 for decoder-only models and encoders, 2 for encoder-decoder models.
        num_attention_heads: number of attention heads of the keys and values.
        num_layers: number of layers of the base model.
        modules_to_save: modules of which full copies are trained and saved.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        """Always True."""
        return True

    def shared_options(self) -> SharedOptions:
        """Return the shared options with `modules_to_save`."""
        return SharedOptions(modules_to_save=tuple(self.modules_to_save or ()))


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """Build a config of the class for `config_dict["peft_type"]`.

    Args:
        config_dict: fields of the config; keys that are not fields of the class are ignored with one warning.

    Raises:
        UnknownTunerError: no tuner for `peft_type` is installed.
        ConfigError: `peft_type` is missing, or a value is invalid.

    Example:
        >>> get_peft_config({"peft_type": "LORA", "r": 4}).r
        4
    """
    found: PeftConfig = config_from_dict(config_dict)
    return found
