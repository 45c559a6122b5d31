"""The names of tensors in files and in memory. Only this module of core builds or splits such names; it works on strings and imports no torch.

In a file, the key of a tensor of a wrapped module is ``<prefix><path of the module in the base>.<end>``; the module's slots define the end. In
memory the name also contains the adapter's name, after the parameter or container, and ``base_layer`` after the path of each wrapped module.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

from .errors import ConfigError

#: prefix of the path of a base module in a wrapped model (`PeftModel`); models with injected adapters do not have it
WRAPPER_PREFIX = "base_model.model."
#: the attribute of a wrapper that holds the wrapped module
BASE_LAYER = "base_layer"
#: the attribute of `TokenRows` that holds the trained embedding rows
TOKEN_ADAPTER = "token_adapter"
#: parts of names that wrappers add at any position (`torch.compile`, FSDP1, torch's checkpoint wrapper); keys in files do not contain them
HIDDEN_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: prefix that DDP, `DataParallel` and training engines add to all names
PARALLEL_PREFIX = "module."
#: first part of the names of modules mounted beside the base, which belong to no module of the base (`base_model.vera_A`)
_BESIDE_BASE = ["base_model"]
#: attributes of `ModulesToSaveWrapper` under which the reference implementation saves duplicates
_SAVED_MODULE_PARTS = (".original_module.", ".modules_to_save.")
_T = TypeVar("_T")


# ---- building ---------------------------------------------------------------------------------------------------------
def join(*parts: str) -> str:
    """Return the parts with dots between them; empty parts (the path of the root module) are left out."""
    return ".".join(filter(None, parts))


def file_key(prefix: str, path: str | None, end: str) -> str:
    """Return the key of one tensor in a file.

    Args:
        prefix: the prefix of paths in the base model (`TunerSpec.base_prefix`); empty for a model without a wrapper.
        path: the path of the module in the base model; None for a module mounted beside the base model, whose key is `end`.
        end: the end of the key, as defined by the module's slots.
    """
    return end if path is None else prefix + join(path, end)


def embedding_key(prefix: str, path: str, *, wrapped: bool, in_token_adapter: bool) -> str:
    """Return the key of the whole weight of an embedding or output layer in an adapter's file.

    Args:
        prefix, path: as in `file_key`.
        wrapped: True if the module is wrapped by an adapter layer.
        in_token_adapter: True if that adapter layer is a `TokenRows`.
    """
    return file_key(prefix, path, join(TOKEN_ADAPTER if in_token_adapter else "", BASE_LAYER if wrapped else "", "weight"))


def wrapped_path(path: str, wrapped: Collection[str]) -> str:
    """Return the path of a base module in a model whose modules at the paths `wrapped` are wrapped: with ``base_layer`` after each of these paths."""
    found: list[str] = []
    parts = path.split(".") if path else []
    for count, part in enumerate(parts, start=1):
        found.append(part)
        if ".".join(parts[:count]) in wrapped:
            found.append(BASE_LAYER)
    return ".".join(found)


def parameter_rule(parameter_prefix: str, adapter: str) -> tuple[str, str]:
    """Return (regular expression, replacement) that converts a name in a file to the name in memory.

    The replacement inserts the adapter's name after each parameter name that begins with `parameter_prefix`.
    """
    return rf"({parameter_prefix}[^\.]*)", rf"\1.{adapter}"


# ---- matching files with models -----------------------------------------------------------------------------------------
def without_wrapper(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """Return tensors (or shapes) under their names without `WRAPPER_PREFIX` and without the parts that other wrappers add."""
    return {in_base(key): value for key, value in tensors.items()}


def with_expected_prefix(tensors: Mapping[str, _T], expected: Collection[str]) -> dict[str, _T]:
    """Return tensors (or shapes), renamed to the expected names where a name differs only in `WRAPPER_PREFIX` and parts that other wrappers add.

    Names without such an expected name are returned unchanged.
    """
    expected = frozenset(expected)
    return {_expected(key, expected) or key: value for key, value in tensors.items()}


def _expected(key: str, expected: Collection[str]) -> str | None:
    """Return the expected name that equals `key` except for `WRAPPER_PREFIX` and the parts that other wrappers add; None if there is none."""
    if key in expected:
        return key
    key = visible(key)
    stem = key.removeprefix(PARALLEL_PREFIX).removeprefix(WRAPPER_PREFIX).removeprefix(PARALLEL_PREFIX)
    candidates = (key, WRAPPER_PREFIX + key, key.removeprefix(WRAPPER_PREFIX), stem, WRAPPER_PREFIX + stem)
    return next((candidate for candidate in candidates if candidate in expected), None)


def key_renamer(key_mapping: Mapping[str, str] | None) -> Callable[[str], str]:
    """Return a function that renames the keys of a file; only the first pattern that matches a key is applied.

    Patterns are matched against the key without `WRAPPER_PREFIX`; a key that had this prefix gets it again after the replacement.

    Args:
        key_mapping: regular expression → replacement; None: keys are not changed.

    Raises:
        ConfigError: a pattern is not a valid regular expression.
    """
    if not key_mapping:
        return lambda key: key
    try:
        rules = [(re.compile(pattern), replacement) for pattern, replacement in key_mapping.items()]
    except re.error as error:
        raise ConfigError(f"key_mapping: {error}", hint="keys are regular expressions, values replacements") from error

    def rename(key: str) -> str:
        stem = key.removeprefix(WRAPPER_PREFIX)
        for pattern, replacement in rules:
            stem, count = pattern.subn(replacement, stem)
            if count:
                break
        return WRAPPER_PREFIX + stem if key.startswith(WRAPPER_PREFIX) else stem

    return rename


def is_duplicate_of_saved(key: str, expected: Collection[str]) -> bool:
    """Return whether `key` is a duplicate of a tensor of a saved module: the reference implementation also writes these under its wrapper's names."""
    return key not in expected and any(key.replace(part, ".") in expected for part in _SAVED_MODULE_PARTS)


# ---- cutting ------------------------------------------------------------------------------------------------------------
def has_part(name: str, part: str) -> bool:
    """Return whether `part` is one of the parts between the dots of a name."""
    return part in name.split(".")


def visible(name: str) -> str:
    """Return a name in memory without the parts that wrappers add and that keys in files do not contain (`HIDDEN_PARTS`)."""
    return ".".join(part for part in name.split(".") if part not in HIDDEN_PARTS)


def in_base(name: str) -> str:
    """Return the name that a tensor of a wrapped, compiled, parallel or sharded model has in its base."""
    name = visible(name)
    inner = name.removeprefix(PARALLEL_PREFIX)
    return inner.removeprefix(WRAPPER_PREFIX) if inner.startswith(WRAPPER_PREFIX) else name


def found_under(name: str, tensors: Mapping[str, _T]) -> _T | None:
    """Return the tensor called `name`, or `PARALLEL_PREFIX` + `name`, of a state dict without `HIDDEN_PARTS` in its names; None if there is none."""
    found = tensors.get(name)
    return tensors.get(PARALLEL_PREFIX + name) if found is None else found


def without_adapter(name: str, adapter: str, parameter_prefix: str) -> str:
    """Return the key in a file for a name in memory.

    This removes the adapter's name after a parameter name that begins with `parameter_prefix`, and `HIDDEN_PARTS`.
    """
    parts = visible(name).split(".")
    for position, (part, following) in enumerate(itertools.pairwise(parts)):
        if part.startswith(parameter_prefix) and following == adapter:
            del parts[position + 1]
            break
    return ".".join(parts)


def without_weight(key: str, expected: Collection[str]) -> str:
    """Return `key` without its final ``.weight`` if only the name without it is expected; otherwise return `key` unchanged.

    The two differ because, in memory, a vector may be stored as the ``weight`` of a separate module.
    """
    if key in expected or not key.endswith(".weight"):
        return key
    stem = key.removesuffix(".weight")
    return key if _expected(stem, expected) is None else stem


def split_at_parameter(key: str, parameter_prefix: str) -> tuple[str, str] | None:
    """Split a key before its first part that begins with `parameter_prefix` and return (path, end); None if the path is empty or no part matches."""
    parts = key.split(".")
    cut = next((i for i, part in enumerate(parts) if part.startswith(parameter_prefix)), None)
    return (".".join(parts[:cut]), ".".join(parts[cut:])) if cut else None


def adapted_module(key: str, parameter_prefix: str) -> str | None:
    """Return the path in the base model of the module that the tensor `key` adapts.

    Returns None if no part of `key` begins with `parameter_prefix`, and for tensors of modules mounted beside the base model.
    """
    parts = in_base(key).split(".")
    cut = next((i for i in reversed(range(len(parts))) if parts[i].startswith(parameter_prefix)), None)
    if not cut or parts[:cut] == _BESIDE_BASE:
        return None
    return ".".join(part for part in parts[:cut] if part != BASE_LAYER)  # nested wrappers


def is_weight_in(key: str, modules: Iterable[str]) -> bool:
    """Return whether `key` names a weight inside a module with one of these names."""
    return key.endswith(".weight") and any(has_part(key, module) for module in modules)


# ---- token rows: in memory their wrapper has the base layer under two names, files and state dicts have it under one ----
def duplicates_of_token_adapter(names: Iterable[str], prefix: str) -> list[str]:
    """Return those of `names` that begin with `prefix` and ``base_layer``: a `TokenRows` has the same tensors inside its token adapter, too."""
    return [name for name in names if name.startswith(f"{prefix}{BASE_LAYER}.")]


def restored_from_token_adapter(names: Iterable[str], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield, for each tensor of the base layer of a `TokenRows` at `prefix`, (its name inside the token adapter, its name outside of it)."""
    inside = f"{prefix}{TOKEN_ADAPTER}.{BASE_LAYER}."
    for name in names:
        if name.startswith(inside):
            yield name, f"{prefix}{BASE_LAYER}.{name.removeprefix(inside)}"
