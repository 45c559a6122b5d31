"""What tensors are called in files and in memory. No other module of core builds or cuts such a name; strings only, no torch.

In a file, a tensor of a wrapped module is ``<prefix><path of the module in the base>.<end>``, where the module's slots say the end. In
memory the name also contains the adapter, after the parameter or container, and ``base_layer`` after each wrapper around the module.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

from .errors import ConfigError

#: what wrapped models put before the path of a base module; absent in models with injected adapters
WRAPPER_PREFIX = "base_model.model."
#: the attribute of a wrapper that holds the wrapped module
BASE_LAYER = "base_layer"
#: the attribute of `TokenRows` that holds the rows
TOKEN_ADAPTER = "token_adapter"
#: parts of names that wrappers add wherever they stand: `torch.compile`, FSDP1, torch's checkpoint wrapper; no file has them
HIDDEN_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: what DDP, `DataParallel` and engines put before all names
PARALLEL_PREFIX = "module."
#: first part of the names of modules beside the base, which belong to no module of it (`base_model.vera_A`)
_BESIDE_BASE = ["base_model"]
#: attributes of `ModulesToSaveWrapper` under which the reference implementation saves duplicates
_SAVED_MODULE_PARTS = (".original_module.", ".modules_to_save.")
_T = TypeVar("_T")


# ---- building ---------------------------------------------------------------------------------------------------------
def join(*parts: str) -> str:
    """Return the parts with dots between them; empty parts (the path of the root module) are left out."""
    return ".".join(part for part in parts if part)


def file_key(prefix: str, path: str | None, end: str) -> str:
    """Return the key of one tensor in a file.

    Args:
        prefix: what stands before paths in the base (`TunerSpec.base_prefix`); empty without a wrapper.
        path: of the module in the base; None for what is mounted beside it.
        end: the end of the key, as the module's slots name it.
    """
    return end if path is None else prefix + join(path, end)


def embedding_key(prefix: str, path: str, *, wrapped: bool, in_token_adapter: bool) -> str:
    """Return the key of the whole weight of an embedding or output layer in an adapter's file.

    Args:
        prefix, path: as `file_key`.
        wrapped: an adapter layer is around the module.
        in_token_adapter: that layer is a `TokenRows`.
    """
    return file_key(prefix, path, join(TOKEN_ADAPTER if in_token_adapter else "", BASE_LAYER if wrapped else "", "weight"))


def wrapped_path(path: str, wrapped: Collection[str]) -> str:
    """Return the path of a base module in a model in which the modules `wrapped` (paths) have a wrapper around them."""
    found: list[str] = []
    parts = path.split(".") if path else []
    for count, part in enumerate(parts, start=1):
        found.append(part)
        if ".".join(parts[:count]) in wrapped:
            found.append(BASE_LAYER)
    return ".".join(found)


def parameter_rule(parameter_prefix: str, adapter: str) -> tuple[str, str]:
    """Return (regular expression, replacement) that puts an adapter's name after parameters with this prefix: names in files → in memory."""
    return rf"({parameter_prefix}[^\.]*)", rf"\1.{adapter}"


# ---- matching files with models -----------------------------------------------------------------------------------------
def without_wrapper(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """Return tensors (or shapes) under their names without `WRAPPER_PREFIX`, and without what other wrappers add."""
    return {in_base(key): value for key, value in tensors.items()}


def with_expected_prefix(tensors: Mapping[str, _T], expected: Collection[str]) -> dict[str, _T]:
    """Return tensors (or shapes) under the names that are expected, where they differ only in `WRAPPER_PREFIX` and what other wrappers add."""
    expected = frozenset(expected)
    return {_expected(key, expected) or key: value for key, value in tensors.items()}


def _expected(key: str, expected: Collection[str]) -> str | None:
    """Return the expected name that is `key`, with or without `WRAPPER_PREFIX` and what other wrappers add."""
    if key in expected:
        return key
    key = visible(key)
    stem = key.removeprefix(PARALLEL_PREFIX).removeprefix(WRAPPER_PREFIX).removeprefix(PARALLEL_PREFIX)
    candidates = (key, WRAPPER_PREFIX + key, key.removeprefix(WRAPPER_PREFIX), stem, WRAPPER_PREFIX + stem)
    return next((candidate for candidate in candidates if candidate in expected), None)


def key_renamer(key_mapping: Mapping[str, str] | None) -> Callable[[str], str]:
    """Return the function that renames the keys of a file: patterns see a key without `WRAPPER_PREFIX`, which is put back; the first match counts.

    Raises:
        ConfigError: a pattern is no regular expression.
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
    """Return whether `key` is one of the duplicates of saved modules that the reference implementation writes under the names of its wrapper."""
    return key not in expected and any(key.replace(part, ".") in expected for part in _SAVED_MODULE_PARTS)


# ---- cutting ------------------------------------------------------------------------------------------------------------
def has_part(name: str, part: str) -> bool:
    """Return whether `part` is one of the parts between the dots of a name."""
    return part in name.split(".")


def visible(name: str) -> str:
    """Return a name in memory without the parts that are left out of files (`HIDDEN_PARTS`)."""
    return ".".join(part for part in name.split(".") if part not in HIDDEN_PARTS)


def in_base(name: str) -> str:
    """Return the name that a tensor of a wrapped, compiled, parallel or sharded model has in its base."""
    name = visible(name)
    inner = name.removeprefix(PARALLEL_PREFIX)
    return inner.removeprefix(WRAPPER_PREFIX) if inner.startswith(WRAPPER_PREFIX) else name


def found_under(name: str, tensors: Mapping[str, _T]) -> _T | None:
    """Return the tensor called `name` of a state dict whose names are visible; also one of a parallel wrapper. None if there is none."""
    found = tensors.get(name)
    return tensors.get(PARALLEL_PREFIX + name) if found is None else found


def without_adapter(name: str, adapter: str, parameter_prefix: str) -> str:
    """Return the key in a file for a name in memory: without the adapter after a parameter with this prefix, and without `HIDDEN_PARTS`."""
    parts = visible(name).split(".")
    for position, (part, following) in enumerate(itertools.pairwise(parts)):
        if part.startswith(parameter_prefix) and following == adapter:
            del parts[position + 1]
            break
    return ".".join(parts)


def without_weight(key: str, expected: Collection[str]) -> str:
    """Return `key` without a final ``.weight`` where only that is expected: in memory, a vector may be the weight of a module of its own."""
    if key in expected or not key.endswith(".weight"):
        return key
    stem = key.removesuffix(".weight")
    return key if _expected(stem, expected) is None else stem


def split_at_parameter(key: str, parameter_prefix: str) -> tuple[str, str] | None:
    """Return (path, end) of a key, cut before the first part with a method's parameter prefix; None where there is no path or no such part."""
    parts = key.split(".")
    cut = next((i for i, part in enumerate(parts) if part.startswith(parameter_prefix)), None)
    return (".".join(parts[:cut]), ".".join(parts[cut:])) if cut else None


def adapted_module(key: str, parameter_prefix: str) -> str | None:
    """Return the path in the base of the module that a parameter with this prefix adapts; None for other tensors, and for modules beside the base."""
    parts = in_base(key).split(".")
    cut = next((i for i in reversed(range(len(parts))) if parts[i].startswith(parameter_prefix)), None)
    if not cut or parts[:cut] == _BESIDE_BASE:
        return None
    return ".".join(part for part in parts[:cut] if part != BASE_LAYER)  # wrappers inside others


def is_weight_in(key: str, modules: Iterable[str]) -> bool:
    """Return whether `key` names a weight inside a module with one of these names."""
    return key.endswith(".weight") and any(has_part(key, module) for module in modules)


# ---- token rows: their wrapper names the base twice in memory, files and state dicts once ------------------------------
def duplicates_of_token_adapter(names: Iterable[str], prefix: str) -> list[str]:
    """Return the names, after `prefix`, of the base layer that a `TokenRows` also has inside its token adapter."""
    return [name for name in names if name.startswith(f"{prefix}{BASE_LAYER}.")]


def restored_from_token_adapter(names: Iterable[str], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (name inside the token adapter, name beside it) of the tensors of a base layer, after `prefix`."""
    inside = f"{prefix}{TOKEN_ADAPTER}.{BASE_LAYER}."
    for name in names:
        if name.startswith(inside):
            yield name, f"{prefix}{BASE_LAYER}.{name.removeprefix(inside)}"
