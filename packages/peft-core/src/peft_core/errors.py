"""The exceptions and warnings of peft-core, and helpers for their messages: suggestions of similar names, lists of names.

Each error is also a subclass of a built-in exception (`ValueError`, `KeyError`, ...), so that code which does not know peft-core can catch it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftError(Exception):
    """An error that the user can correct; the base class of all others.

    Args:
        message: what was given and why it is wrong.
        hint: what to do about it; shown after the message.
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
    """Something works, but perhaps not as the user expects."""


class ConfigError(PeftError, ValueError):
    """A configuration that can't be used: a bad value, or values that exclude one another."""

    code = "config"


class ConfigFileError(ConfigError):
    """`adapter_config.json` is missing, unreadable or holds invalid values."""

    code = "config-file"


class UnknownTunerError(ConfigError, KeyError):
    """No installed or registered tuner has this `peft_type`."""

    code = "unknown-tuner"


class PluginError(PeftError, ImportError):
    """A plugin can't be used. The message names its distribution; `__cause__` is what went wrong inside it."""

    code = "plugin"


class IncompatiblePluginError(PluginError):
    """A plugin that was built for another version of peft-core."""

    code = "plugin-version"


class DuplicateTunerError(PluginError, ValueError):
    """Two distributions offer the same `peft_type`."""

    code = "duplicate-tuner"


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The targets of a config match no module of the model."""

    code = "no-match"


class UnsupportedModuleError(PeftError, ValueError, TypeError):
    """A target is a module of a type that the tuner can't adapt."""

    code = "unsupported-module"


class AdapterNameError(PeftError, ValueError):
    """A name that can't be given to an adapter: taken, malformed, or colliding with a parameter prefix."""

    code = "adapter-name"


class AdapterNotFoundError(PeftError, ValueError, KeyError):
    """The model has no adapter of this name."""

    code = "adapter-not-found"


class CapabilityError(PeftError, ValueError, TypeError):
    """A tuner or the base does not support what was asked: for example a capability that the tuner's spec does not declare."""

    code = "capability"


class RoutingError(PeftError, ValueError):
    """The inputs of a call do not fit the batch, the model or its adapters: `adapter_names`, `task_ids`, a mask."""

    code = "routing"


class MergeError(PeftError, ValueError, RuntimeError):
    """The operation fails because of how adapters are, or would be, merged."""

    code = "merge"


class AdapterFileError(PeftError, ValueError, FileNotFoundError):
    """A folder that does not hold an adapter, or whose weight file can't be read."""

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
    """Return up to `limit` candidates that are spelled like `name`, most similar first; case is ignored."""
    by_casefold: dict[str, str] = {}
    for candidate in candidates:
        by_casefold.setdefault(candidate.casefold(), candidate)
    return [by_casefold[folded] for folded in difflib.get_close_matches(name.casefold(), by_casefold, n=limit, cutoff=0.6)]


def did_you_mean(name: str, candidates: Iterable[str], otherwise: str = "") -> str:
    """Return ``"did you mean 'x' or 'y'?"``, or `otherwise` if no candidate is similar."""
    found = nearest(name, candidates)
    return f"did you mean {' or '.join(map(repr, found))}?" if found else otherwise


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Return the names, quoted and separated by commas; after `limit` names only the number of the others."""
    names = list(names)
    shown = ", ".join(map(repr, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
