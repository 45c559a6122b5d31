"""The exceptions and warnings of peft-core, and helpers for their messages: suggestions of similar names, lists of names.

Each error is also a subclass of a built-in exception (`ValueError`, `KeyError`, ...), so that code which does not know peft-core can catch it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftError(Exception):
    """An error that the user can correct; the base class of all others.

    Args:
        message: the value that was given and why it is wrong.
        hint: how to correct the error; shown after the message.
        code: a stable identifier for programs, such as ``"unknown-tuner"``; each class has its own default.
    """

    code = "peft"

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class PeftWarning(UserWarning):
    """A warning: the operation succeeds, but its result may not be what the user expects."""


class ConfigError(PeftError, ValueError):
    """A configuration is invalid: a field has an invalid value, or the values of two fields contradict each other."""

    code = "config"


class ConfigFileError(ConfigError):
    """`adapter_config.json` is missing, unreadable or holds invalid values."""

    code = "config-file"


class UnknownTunerError(ConfigError, KeyError):
    """No installed or registered tuner has this `peft_type`."""

    code = "unknown-tuner"


class PluginError(PeftError, ImportError):
    """A plugin can't be used. The message names its distribution; `__cause__` is the exception that the plugin raised."""

    code = "plugin"


class IncompatiblePluginError(PluginError):
    """A plugin requires another version of peft-core."""

    code = "plugin-version"


class DuplicateTunerError(PluginError, ValueError):
    """Two installed distributions provide a tuner for the same `peft_type`."""

    code = "duplicate-tuner"


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The target modules of a config match no module of the model."""

    code = "no-match"


class UnsupportedModuleError(PeftError, ValueError, TypeError):
    """A target module has a type that the tuner can't adapt."""

    code = "unsupported-module"


class AdapterNameError(PeftError, ValueError):
    """An adapter name is invalid: it is already in use, is malformed, or collides with a parameter prefix."""

    code = "adapter-name"


class AdapterNotFoundError(PeftError, ValueError, KeyError):
    """The model has no adapter of this name."""

    code = "adapter-not-found"


class CapabilityError(PeftError, ValueError, TypeError):
    """The tuner or the base model does not support an operation: for example, the tuner's spec does not declare the capability."""

    code = "capability"


class RoutingError(PeftError, ValueError):
    """The arguments of a call do not match the batch, the model or its adapters: `adapter_names`, `task_ids` or a mask."""

    code = "routing"


class MergeError(PeftError, ValueError, RuntimeError):
    """An operation fails because of merged adapters, or adapters can't be merged or unmerged."""

    code = "merge"


class AdapterFileError(PeftError, ValueError, FileNotFoundError):
    """A folder does not contain an adapter, or its weight file can't be read."""

    code = "adapter-file"


class AdapterWeightsError(PeftError, RuntimeError, ValueError):
    """Tensors in a file do not match the adapter; the message lists all missing and unexpected keys and all shape mismatches."""

    code = "adapter-weights"


class ModelError(PeftError, ValueError):
    """The base model lacks something that a tuner or a task needs."""

    code = "model"


class NoSuchModuleError(ModelError, AttributeError):
    """The model has no module of this name."""

    code = "no-such-module"


class MissingMethodError(ModelError, AttributeError):
    """The base model lacks a method that its task needs."""

    code = "missing-method"


def nearest(name: str, candidates: Iterable[str], limit: int = 3) -> list[str]:
    """Return up to `limit` candidates whose spelling is similar to `name`, most similar first; case is ignored."""
    by_casefold: dict[str, str] = {}
    for candidate in candidates:
        by_casefold.setdefault(candidate.casefold(), candidate)
    return [by_casefold[folded] for folded in difflib.get_close_matches(name.casefold(), by_casefold, n=limit, cutoff=0.6)]


def did_you_mean(name: str, candidates: Iterable[str], otherwise: str = "") -> str:
    """Return ``"did you mean 'x' or 'y'?"``, or `otherwise` if no candidate is similar."""
    found = nearest(name, candidates)
    return f"did you mean {' or '.join(map(repr, found))}?" if found else otherwise


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Return the first `limit` names, quoted and separated by commas, followed by the number of the remaining names."""
    names = list(names)
    shown = ", ".join(map(repr, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
