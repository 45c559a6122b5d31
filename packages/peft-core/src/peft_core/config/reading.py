"""Building configs from untrusted fields, which come from a dict, a file, a folder or the Hub."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ConfigFileError, PeftWarning, listed
from ..plugins import registry

CONFIG_NAME = "adapter_config.json"
#: release of the reference implementation whose file format is written; its readers check `peft_version`
FORMAT_VERSION = "0.21.2"
#: keys of old releases that never had an effect on results: ignored with a warning
LEGACY_KEYS = frozenset({"postprocess_past_key_value_function", "enable_lora"})
HUB_KEYS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "repo_type", "use_auth_token", "tqdm_class")


def config_from_dict(
    config_dict: Mapping[str, Any],
    fallback: type[Any] | None = None,
    origin: str | None = None,
    optional: frozenset[str] = frozenset(),
) -> Any:
    """Build a config from untrusted fields. `peft_type` decides the class; unknown keys are ignored with one warning.

    Args:
        config_dict: name → value of the fields.
        fallback: class of the config if there is no `peft_type`.
        origin: where the fields come from, for messages.
        optional: names of fields that give no warning if they are unknown.

    Raises:
        UnknownTunerError: no tuner for `peft_type` is installed.
        ConfigError: `peft_type` is missing and there is no `fallback`, or a value is invalid.
    """
    peft_type = config_dict.get("peft_type")
    if peft_type is not None and not isinstance(peft_type, str):
        raise ConfigError(f"{f'{origin}: ' if origin else ''}peft_type={peft_type!r} is no name of a method")
    cls: Any = registry.config_class(peft_type) if peft_type else fallback
    if cls is None:
        raise ConfigError("the config has no 'peft_type'", hint=f"add one of {listed(registry.names(), 20) or 'the installed tuners (none is)'}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    known = {key: value for key, value in config_dict.items() if key in fields and key not in cls.transient}
    dropped = sorted(key for key in config_dict if key not in known and key not in optional)
    if dropped:
        _warn_dropped(dropped, cls, origin)
    try:
        return cls(**{key: _restored(fields[key], value, cls) for key, value in known.items()})
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{origin or cls.__name__}: {error}") from error


def require_config(loaded: Mapping[str, Any], cls: type[Any], origin: str) -> None:
    """Check that the object read from a file is an adapter config: it has a `peft_type`, or all its keys are fields of `cls`.

    Args:
        loaded: the object.
        cls: the config class that reads the file; `PeftConfig` for any config.
        origin: path of the file, for the error message.

    Raises:
        ConfigFileError: the object is not an adapter config, but for example the config of another library.
    """
    if loaded.get("peft_type") is not None:
        return
    known = {f.name for f in dataclasses.fields(cls) if f.init} | LEGACY_KEYS
    foreign = sorted(str(key) for key in loaded if key not in known)
    says_none = "peft_type" in loaded and cls.default_peft_type is None
    if foreign or says_none:
        raise ConfigFileError(
            f"{origin!r} is no config of an adapter: it has no 'peft_type', which is required{f', but {listed(foreign)}' if foreign else ''}",
            hint=f"add one of {listed(registry.names(), 20)}, or read it by the class of its method"
            if not foreign
            else "is it the config of another library?",
        )


def _warn_dropped(dropped: Sequence[str], cls: type, origin: str | None) -> None:
    legacy = all(key in LEGACY_KEYS for key in dropped)
    why = "old releases wrote them and they have no effect" if legacy else "perhaps it was written by a newer release"
    warnings.warn(
        f"Unexpected keyword arguments {list(dropped)} for class {cls.__name__}{f' in {origin}' if origin else ''}, these are ignored: {why}.",
        PeftWarning,
        stacklevel=4,
    )


def find_config(model_id: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> Path:
    """Return the path of an `adapter_config.json`; downloads it if `model_id` is not a local directory.

    Raises:
        ConfigFileError: there is no such file.
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


def _restored(fld: dataclasses.Field[Any], value: Any, cls: type) -> Any:
    """Return `value`; if it is a nested JSON object and the field is annotated with a dataclass, an instance of that dataclass."""
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
        # if the annotation also allows a plain dict, the value remains a dict
        return () if any(member is dict or typing.get_origin(member) is dict for member in members) else members
    return (annotation,)


def _type_hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a third party's annotation that only a type checker can resolve
        return {}
