"""Configurations: dataclasses that are `adapter_config.json` in another form. Imports no torch."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import numbers
import os
import types
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .errors import ConfigError, ConfigFileError, PeftWarning, did_you_mean, listed
from .plugins import registry

CONFIG_NAME = "adapter_config.json"
#: The file format we write is the one of this release of the reference implementation; its readers look at `peft_version`.
FORMAT_VERSION = "0.21.2"
#: Keys of old releases that never changed a result: dropped with a warning.
LEGACY_KEYS = frozenset({"postprocess_past_key_value_function", "enable_lora"})
HUB_KEYS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "repo_type", "use_auth_token", "tqdm_class")

_C = TypeVar("_C", bound="PeftConfig")


class TaskType(str, enum.Enum):
    """What the adapted model is for; decides the task class, its heads and its labels."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    def __str__(self) -> str:
        return self.value


class _OpenEnum(type):
    def __getattr__(cls, name: str) -> PeftType:
        if name.startswith("_") or name != name.upper():
            raise AttributeError(name)
        return PeftType(name)


class PeftType(str, metaclass=_OpenEnum):
    """The name of a method: any upper-case word, because anybody can publish one. `PeftType.LORA == "LORA"`."""

    def __new__(cls, value: str) -> PeftType:
        return super().__new__(cls, str(value).upper())

    @property
    def value(self) -> str:
        """The plain string, as an enum member would show it."""
        return str.__str__(self)

    @property
    def name(self) -> str:
        """The same as `value`."""
        return self.value

    def __repr__(self) -> str:
        return f"PeftType.{self.value}"


@dataclass(frozen=True)
class Extras:
    """What a config asks of core besides its own method: see `PeftConfig.extras`.

    Args:
        modules_to_save: modules of the base that are trained and saved as whole copies, by the end of their names.
        bias: which biases of the base train: ``"none"``, ``"all"``, or ``"targets"`` (those of the adapted modules).
    """

    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"


@dataclass
class PeftConfig:
    """What every adapter's config has. Saved as `adapter_config.json`.

    Args:
        task_type: a `TaskType` or its name; selects the task class. None: the plain `PeftModel`.
        peft_type: the method; set by each subclass.
        auto_mapping: class and library of the base model, written when there is no task type.
        peft_version: release whose file format the writer followed.
        base_model_name_or_path: where the base model came from; filled in by `get_peft_model`.
        revision: revision of the base model.
        inference_mode: the adapter's parameters are frozen.

    Raises:
        ConfigError: an unknown `task_type`.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    default_peft_type: ClassVar[str | None] = None
    #: fields that are never written
    transient: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.task_type is not None:
            names = [task.value for task in TaskType]
            if str(self.task_type) not in names:
                raise ConfigError(
                    f"Invalid task type: {str(self.task_type)!r}. Must be one of the following task types: {', '.join(names)}",
                    hint=did_you_mean(str(self.task_type), names) or None,
                )
            self.task_type = TaskType(str(self.task_type))
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
        """Check every value by itself: when the config is made, and again before an adapter is, since fields can be assigned.

        Raises:
            ConfigError: a bad value.
        """

    # ---- what core asks -------------------------------------------------------------------------------------------
    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method learns virtual tokens and leaves the layers of the base as they are."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Always False: kept for code that asks."""
        return False

    def extras(self) -> Extras:
        """Return what this adapter wants of core besides its own method; a config without such fields wants nothing."""
        return Extras()

    # ---- to and from files ----------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Return every field that belongs in a file, enums and sets still as they are."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.init and f.name not in self.transient}

    def to_json(self, **overrides: Any) -> str:
        """Return the text of `adapter_config.json`: keys and sets sorted, so that equal configs give equal bytes."""
        return json.dumps(_jsonable({**self.to_dict(), **overrides}), indent=2, sort_keys=True)

    def save_pretrained(self, save_directory: str | os.PathLike[str], auto_mapping_dict: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write `adapter_config.json` into a directory, which is created if missing.

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
        """Read a config from a directory or from the Hub; the class follows the file's `peft_type`, whatever class this is called on.

        Args:
            pretrained_model_name_or_path: directory, or repository id on the Hub.
            subfolder: folder inside it.
            **kwargs: download options (`revision`, `token`, `cache_dir`, ...), and values for fields that the file lacks.

        Raises:
            ConfigFileError: there is no `adapter_config.json`, or it isn't a JSON object.
            UnknownTunerError: its `peft_type` isn't installed.
        """
        hub = {key: kwargs.pop(key) for key in HUB_KEYS if key in kwargs}
        path = find_config(pretrained_model_name_or_path, subfolder, **hub)
        loaded = cls.from_json_file(path)
        fields = {**kwargs, **loaded}
        return config_from_dict(fields, fallback=cls, origin=str(path), optional=frozenset(kwargs) - set(loaded))

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """Return the object in a JSON file as a dict.

        Raises:
            ConfigFileError: not readable as a JSON object.
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
        """Build a config from a dict as tolerantly as from a file: unknown keys give one warning."""
        return config_from_dict(config_dict, fallback=cls)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build the config class of `kwargs["peft_type"]`, or of the class this is called on."""
        target = registry.config_class(kwargs["peft_type"]) if kwargs.get("peft_type") else cls
        return typing.cast(PeftConfig, target(**kwargs))


@dataclass
class LayerConfig(PeftConfig):
    """What the configs of methods that wrap layers share: which layers. Rules: `peft_core.tuners.targeting`.

    Args:
        target_modules: names (each matches a module called so, or ending in ``.name``), one regular expression for whole
            names, ``"all-linear"``, or None for the default of the architecture.
        exclude_modules: names or a regular expression; wins over `target_modules`.
        layers_to_transform: only these layer numbers (with a list of `target_modules`).
        layers_pattern: name(s) of the list of layers; default: the first number in a name.
        rank_pattern, alpha_pattern: per-module values: regular expression for the end of a name → value; the first match counts.
        modules_to_save: modules trained and saved as whole copies.

    Raises:
        ConfigError: values that exclude one another.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = None

    def check(self) -> None:
        """Check the targets; turns lists of names into sets."""
        super().check()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
            elif value is not None and not isinstance(value, (str, set, frozenset)):
                raise ConfigError(f"{name}={value!r} is a {type(value).__name__}", hint="give a list of names or one regular expression")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"`{name}` cannot be used when `target_modules` is a str", hint="put the layer numbers into the expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified")
        if isinstance(self.modules_to_save, str):
            raise ConfigError(f"modules_to_save={self.modules_to_save!r} is a str", hint=f"write [{self.modules_to_save!r}]")
        self.rank_pattern = {} if self.rank_pattern is None else self.rank_pattern  # old files have null
        self.alpha_pattern = {} if self.alpha_pattern is None else self.alpha_pattern
        for key, rank in self.rank_pattern.items():
            require_positive_integer(f"rank_pattern[{key!r}]", rank)
        for key, alpha in self.alpha_pattern.items():
            require_number(f"alpha_pattern[{key!r}]", alpha)

    def extras(self) -> Extras:
        """Return the saved modules."""
        return Extras(modules_to_save=tuple(self.modules_to_save or ()))


@dataclass
class PromptLearningConfig(PeftConfig):
    """What the configs of methods with virtual tokens share. Dimensions left at None are read from the base model.

    Args:
        num_virtual_tokens: how many virtual tokens the prompt has.
        token_dim: width of one of them.
        num_transformer_submodules: 1 for decoder-only models and encoders, 2 for encoder-decoder models.
        num_attention_heads: heads of the keys and values.
        num_layers: layers of the base model.
        modules_to_save: modules trained and saved as whole copies.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        """True."""
        return True

    def extras(self) -> Extras:
        """Return the saved modules."""
        return Extras(modules_to_save=tuple(self.modules_to_save or ()))


def require_positive_integer(name: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` is an integer above 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value <= 0:
        raise ConfigError(
            f"`{name}` should be a positive integer value but the value passed is {value!r}", hint="8 is a usual rank" if name == "r" else None
        )


def require_number(name: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} is no finite number")


def require_probability(name: str, value: Any, *, one: bool = False) -> None:
    """Raise `ConfigError` unless 0 ≤ value < 1 (with `one`: ≤ 1)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not (0 <= float(value) < 1 or (one and value == 1)):
        raise ConfigError(f"{name}={value!r} is no probability", hint=f"0 ≤ {name} {'≤' if one else '<'} 1")


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """Build the config that `config_dict["peft_type"]` names.

    Args:
        config_dict: fields of the config; keys that the class does not know give one warning and are ignored.

    Raises:
        UnknownTunerError: `peft_type` is not installed.
        ConfigError: it is missing, or a value is bad.

    Example:
        >>> get_peft_config({"peft_type": "LORA", "r": 4}).r
        4
    """
    if not config_dict.get("peft_type"):
        raise ConfigError("the config has no 'peft_type'", hint=f"add one of {listed(registry.names(), 20) or 'the installed tuners (none is)'}")
    return config_from_dict(config_dict)


def config_from_dict(
    config_dict: Mapping[str, Any],
    fallback: type[PeftConfig] = PeftConfig,
    origin: str | None = None,
    optional: frozenset[str] = frozenset(),
) -> PeftConfig:
    """Build a config from untrusted fields: the class by `peft_type`, unknown keys warned about once (those in `optional` never)."""
    peft_type = config_dict.get("peft_type")
    cls = typing.cast("type[PeftConfig]", registry.config_class(peft_type)) if peft_type else fallback
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    known = {key: value for key, value in config_dict.items() if key in fields and key not in cls.transient}
    dropped = sorted(key for key in config_dict if key not in known and key not in optional)
    if dropped:
        legacy = all(key in LEGACY_KEYS for key in dropped)
        why = "old releases wrote them and they have no effect" if legacy else "perhaps it was written by a newer release"
        warnings.warn(
            f"Unexpected keyword arguments {dropped} for class {cls.__name__}{f' in {origin}' if origin else ''}, these are ignored: {why}.",
            PeftWarning,
            stacklevel=3,
        )
    try:
        return cls(**{key: _restored(fields[key], value, cls) for key, value in known.items()})
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{origin or cls.__name__}: {error}") from error


def find_config(model_id: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> Path:
    """Return the path of an `adapter_config.json`, downloading it if `model_id` is no local directory.

    Raises:
        ConfigFileError: there is none.
    """
    directory = Path(model_id) / (subfolder or "")
    if (directory / CONFIG_NAME).is_file():
        return directory / CONFIG_NAME
    if directory.is_dir() or os.path.isabs(model_id) or not _looks_like_hub_id(str(model_id)):
        nested = sorted(p.parent.name for p in directory.glob(f"*/{CONFIG_NAME}")) if directory.is_dir() else []
        hint = f"adapters lie in its sub-folders {listed(nested)}: pass subfolder=..." if nested else "save_pretrained of a PeftModel writes one"
        raise ConfigFileError(f"Can't find '{CONFIG_NAME}' at {str(directory)!r}", hint=hint)
    from huggingface_hub import hf_hub_download

    hub.pop("use_auth_token", None)
    try:
        return Path(hf_hub_download(str(model_id), CONFIG_NAME, subfolder=subfolder, **hub))
    except Exception as error:
        raise ConfigFileError(
            f"Can't find '{CONFIG_NAME}' at {str(model_id)!r}: no such directory, and the Hub says: {error}",
            hint="check the path or the repository id, and the network",
        ) from error


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "~")) and "\\" not in name


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, PeftType):
        return value.value
    return value


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_jsonable(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return _plain(value)


def _restored(fld: dataclasses.Field[Any], value: Any, cls: type) -> Any:
    """Turn a nested JSON object into the dataclass that the field's annotation names."""
    if not isinstance(value, Mapping):
        return value
    for candidate in _annotated_types(fld, cls):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            names = {f.name for f in dataclasses.fields(candidate) if f.init}
            return candidate(**{key: item for key, item in value.items() if key in names})
    return value


def _annotated_types(fld: dataclasses.Field[Any], cls: type) -> tuple[Any, ...]:
    hints = _type_hints(cls)
    annotation = hints.get(fld.name)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        members: tuple[Any, ...] = typing.get_args(annotation)
        # a field that may also be a plain dict stays one
        return () if any(member is dict or typing.get_origin(member) is dict for member in members) else members
    return (annotation,)


def _type_hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a third party's annotation that only a type checker can resolve
        return {}
