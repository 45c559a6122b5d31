"""Resolves the targets of a config to modules of the base; there is a separate error message for each reason why nothing matches."""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, TypeVar

from torch import nn

from ..base.ops import is_conv1d, is_linear_map
from ..base.view import BaseView
from ..config import LayerConfig
from ..errors import ConfigError, NoMatchingPeftModuleError, PeftWarning, UnsupportedModuleError, did_you_mean, listed
from .passed_by import without_passed_by

Targets = Collection[str] | str
ALL_LINEAR = "all-linear"
DUMMY = "dummy-target-modules"
#: if a config has at least this many explicit targets, they are shortened to suffixes that select the same modules
SHORTEN_FROM = 20
_V = TypeVar("_V")


@dataclass(frozen=True)
class Selection:
    """The names of the modules that a config targets, in the model's order, and the `target_modules` to write back to the config."""

    names: tuple[str, ...]
    targets: Targets | None


def select(base: BaseView, config: LayerConfig, default: Targets | None = None) -> Selection:
    """Return the modules that a config targets. Changes nothing.

    Args:
        base: the model.
        config: the config; the fields `target_modules`, `exclude_modules`, `layers_to_transform`, `layers_pattern` and `modules_to_save` are used.
        default: the targets if `target_modules` is None.

    Raises:
        NoMatchingPeftModuleError: nothing matches.
        ConfigError: no targets and no default; a malformed expression.
        UnsupportedModuleError: a target is a subclass of Linear that does not compute x @ W.T + b.
    """
    targets: Targets = _default(base, default) if config.target_modules is None else config.target_modules
    every_linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    if every_linear:
        targets = all_linear(base, config)
    if targets == DUMMY or (not isinstance(targets, str) and set(targets) == {DUMMY}):
        return Selection((), targets)
    if base.chosen is not None:
        return Selection(tuple(name for name in base.modules if name in base.chosen), targets)
    matching = frozenset(targets).__contains__ if every_linear else target_matcher(targets, "target_modules")
    matches = _matches(base, config, matching)
    if not matches.found:
        raise _no_match(base, config, targets, matches)
    matches.found = without_passed_by(base, matches.found, named=not every_linear, trains=not config.inference_mode)
    _refuse_other_maps(base, matches.found)
    # "all-linear" may also cover parameters of modules (LoRA's layout of experts), which `exclude_modules` may have left out already
    parts = target_matcher(config.exclude_modules if every_linear else None, "exclude_modules")
    _warn_unused(base, config, targets, matches.excluded or list(filter(parts, base.modules)))
    if not isinstance(targets, str):
        targets = shortest_suffixes(matches.found, base.modules) if len(targets) >= SHORTEN_FROM else set(targets)
    return Selection(tuple(matches.found), targets)


@dataclass
class _Matches:
    """The names of modules that match the targets: `found` will be adapted; the other lists hold the names that are left out, by reason."""

    found: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    in_other_layers: list[str] = field(default_factory=list)
    saved_whole: list[str] = field(default_factory=list)


def _matches(base: BaseView, config: LayerConfig, matching: Callable[[str], bool]) -> _Matches:
    saved = frozenset((*config.shared_options().modules_to_save, *base.heads))
    in_layers = layer_filter(config)
    excluded = target_matcher(config.exclude_modules, "exclude_modules")
    matches = _Matches()
    for name in base.modules:
        if not name or not matching(name):
            continue
        if excluded(name):
            matches.excluded.append(name)
        elif not in_layers(name):
            matches.in_other_layers.append(name)
        elif _inside(name, saved):
            matches.saved_whole.append(name)
        else:
            matches.found.append(name)
    return matches


def _refuse_other_maps(base: BaseView, found: Sequence[str]) -> None:
    other = next((name for name in found if not is_linear_map(base.modules[name])), None)
    if other is not None:
        raise UnsupportedModuleError(
            f"target module {other!r}: a {type(base.modules[other]).__name__} is a Linear that computes something else than x @ W.T + b",
            hint=f"leave it out, or adapt its parameter by target_parameters=[{f'{other}.weight'!r}], where the method has them",
        )


def target_matcher(patterns: Targets | None, field: str) -> Callable[[str], bool]:
    """Return a test for module names: a list matches whole names and suffixes after a dot, a string is a regular expression for the whole name.

    Args:
        patterns: the list or the string; empty or None: no name matches.
        field: the config field that `patterns` come from, for messages.

    Raises:
        ConfigError: the regular expression is malformed.
    """
    if not patterns:
        return lambda name: False
    if isinstance(patterns, str):
        try:
            expression = re.compile(patterns)
        except re.error as error:
            raise ConfigError(f"{field}={patterns!r} is no regular expression: {error}", hint="give a list to match names") from error
        return lambda name: expression.fullmatch(name) is not None
    names = frozenset(patterns)
    return lambda name: _matching_suffix(name, names) is not None


def _matching_suffix(name: str, names: Collection[str]) -> str | None:
    """Return the member of `names` that is `name` or a suffix of it after a dot; None if there is none."""
    start = 0
    while True:
        if name[start:] in names:
            return name[start:]
        dot = name.find(".", start)
        if dot < 0:
            return None
        start = dot + 1


def _inside(name: str, saved: Collection[str]) -> bool:
    """Return whether a module is one of the saved modules or lies inside one."""
    if not saved:
        return False
    parts = name.split(".")
    return any(_matching_suffix(".".join(parts[: i + 1]), saved) is not None for i in range(len(parts)))


def layer_filter(config: LayerConfig) -> Callable[[str], bool]:
    """Return a test for module names: whether they are in one of the config's `layers_to_transform`.

    Raises:
        ConfigError: `layers_pattern` is malformed.
    """
    if config.layers_to_transform is None:
        return lambda name: True
    wanted = {config.layers_to_transform} if isinstance(config.layers_to_transform, int) else set(config.layers_to_transform)
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else list(config.layers_pattern or ())
    if patterns:
        try:
            expressions = [re.compile(rf"(?:^|.*\.){pattern}\.(\d+)\.") for pattern in patterns]
        except re.error as error:
            raise ConfigError(f"layers_pattern={config.layers_pattern!r} is no regular expression: {error}") from error
    else:
        expressions = [re.compile(r"(?:^|.*?\.)(\d+)\.")]

    def accepts(name: str) -> bool:
        for expression in expressions:
            match = expression.match(name)
            if match is not None:
                return int(match.group(1)) in wanted
        return False

    return accepts


def _default(base: BaseView, default: Targets | None) -> Targets:
    if default is None:
        known = did_you_mean(base.model_type or "", default_targets_by_model_type())
        raise ConfigError(
            f"Please specify `target_modules` in `peft_config`: there is no default for {base.name}"
            + (f" (model_type {base.model_type!r})" if base.model_type else ""),
            hint=f'for example target_modules={_linear_leaf_names(base)[:3]} or "{ALL_LINEAR}"{"; " + known if known else ""}',
            code="no-default-targets",
        )
    return default if isinstance(default, str) else set(default)


def _linear_leaf_names(base: BaseView) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name, module in base.modules.items() if name and _is_linear(module)))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def all_linear(base: BaseView, config: LayerConfig) -> set[str]:
    """Return the names of a model's linear layers, without heads and modules in `modules_to_save`.

    In transformers models, the output embeddings are left out as well.

    Raises:
        NoMatchingPeftModuleError: the model has no such layers.
    """
    output = base.output_embeddings if base.is_transformers_model else None
    saved = frozenset((*config.shared_options().modules_to_save, *base.heads))
    names = {name for name, module in base.modules.items() if name and _is_linear(module) and module is not output and not _inside(name, saved)}
    names = {name for name in names if is_linear_map(base.modules[name])}
    if not names:
        raise NoMatchingPeftModuleError(f"{base.name} has no linear layers to adapt")
    return names


def shortest_suffixes(found: Sequence[str], every: Iterable[str]) -> set[str]:
    """Return a small set of suffixes that together match exactly the names `found` among the names `every`.

    For each name in `found`, the result contains the name's shortest suffix that no name outside of `found` has; several names may share a suffix.
    """
    wanted = set(found)
    forbidden: set[str] = set()  # suffixes of names that must not match
    for name in every:
        if name and name not in wanted:
            forbidden.update(_suffixes(name))
    return {next((suffix for suffix in _suffixes(name) if suffix not in forbidden), name) for name in found}


def _suffixes(name: str) -> list[str]:
    """Return the suffixes of a name at its dots, shortest first: ``["c", "b.c", "a.b.c"]``."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def _no_match(base: BaseView, config: LayerConfig, targets: Targets, matches: _Matches) -> NoMatchingPeftModuleError:
    given = repr(targets) if isinstance(targets, str) else repr(sorted(targets))
    if not targets:
        return NoMatchingPeftModuleError(
            f"target_modules={given} names nothing", hint=f'write for example {_linear_leaf_names(base)[:2]}, "{ALL_LINEAR}" or "{DUMMY}"'
        )
    if matches.excluded and not matches.in_other_layers:
        return NoMatchingPeftModuleError(
            f"All modules of {base.name} that target_modules={given} matches were excluded by exclude_modules={config.exclude_modules!r}",
            hint="exclude fewer",
            code="all-excluded",
        )
    if matches.in_other_layers:
        return NoMatchingPeftModuleError(
            f"target_modules={given} matches modules of {base.name} (for example {matches.in_other_layers[0]!r}), but none in "
            f"layers_to_transform={config.layers_to_transform!r} with layers_pattern={config.layers_pattern!r}",
            hint="check the layer numbers and the pattern",
            code="no-such-layers",
        )
    if matches.saved_whole:
        return NoMatchingPeftModuleError(
            f"all modules of {base.name} that target_modules={given} matches are saved whole ({listed(matches.saved_whole)}): by modules_to_save, "
            "or by the task",
            hint="a module is either saved whole or adapted",
            code="all-saved",
        )
    words = [targets] if isinstance(targets, str) else sorted(targets)
    near = [hint for hint in (did_you_mean(word.rpartition(".")[2], base.leaf_names) for word in words[:3]) if hint]
    return NoMatchingPeftModuleError(
        f"Target modules {given} not found in the base model {base.name}. Please check the target modules and try again",
        hint=near[0] if near else f"its linear layers are called {listed(_linear_leaf_names(base))}",
    )


def _warn_unused(base: BaseView, config: LayerConfig, targets: Targets, excluded: list[str]) -> None:
    if config.exclude_modules and not excluded:
        warnings.warn(f"exclude_modules={config.exclude_modules!r} excluded nothing", PeftWarning, stacklevel=5)
    if isinstance(targets, str):
        return
    used = {suffix for name in base.modules if name and (suffix := _matching_suffix(name, targets))}
    # one name may have two of the targets as suffixes ("q_proj" and "attn.q_proj"): check each unused target separately
    unused = sorted(each for each in set(targets) - used if not any(name == each or name.endswith(f".{each}") for name in base.modules))
    if unused:
        near = did_you_mean(unused[0].rpartition(".")[2], base.leaf_names)
        warnings.warn(f"target_modules {unused} matched nothing in {base.name}{'; ' + near if near else ''}", PeftWarning, stacklevel=5)


class Patterns(Mapping[str, _V]):
    """`rank_pattern` or `alpha_pattern`: regular expression for the end of a module's name → value; the first match is used.

    Keys that consist only of word characters and dots are found by dict lookups instead of one regular expression per key, so that a thousand such
    keys are fast for a thousand modules. A dot in such a key still matches any character.

    Args:
        patterns: regular expression → value.
        field: the config field that `patterns` come from, for messages.

    Raises:
        ConfigError: a regular expression is malformed; raised by the constructor.
    """

    def __init__(self, patterns: Mapping[str, _V], field: str) -> None:
        self._patterns = dict(patterns)
        self._values = list(self._patterns.values())
        self._used: set[int] = set()
        #: (length of the key, positions of its dots, whether it matches whole names only) → key → its position in `patterns`
        self._simple: dict[tuple[int, tuple[int, ...], bool], dict[str, int]] = {}
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        for position, key in enumerate(self._patterns):
            if re.fullmatch(r"\^?[\w.]+\$?", key):
                plain = key.strip("^$")
                dots = tuple(i for i, character in enumerate(plain) if character == ".")
                self._simple.setdefault((len(plain), dots, key.startswith("^")), {}).setdefault(plain, position)
                continue
            try:
                self._expressions.append((position, re.compile(rf"(?:^|.*\.)(?:{key})$")))
            except re.error as error:
                raise ConfigError(f"the key {key!r} of {field} is no regular expression: {error}") from error

    def value(self, name: str, default: _V) -> _V:
        """Return the value of the first pattern that matches the module's name, or `default`."""
        first = min(self._simple_matches(name), default=len(self._values))
        for position, expression in self._expressions:
            if position >= first:
                break
            if expression.match(name):
                first = position
                break
        if first == len(self._values):
            return default
        self._used.add(first)
        return self._values[first]

    def _simple_matches(self, name: str) -> Iterator[int]:
        """Yield the positions of the simple keys (word characters and dots) that match the module's name."""
        for (length, dots, whole), keys in self._simple.items():
            start = len(name) - length
            if start < 0 or (start and (whole or name[start - 1] != ".")):
                continue
            suffix = list(name[start:])
            for dot in dots:  # any character of the name may stand where the key has a dot
                suffix[dot] = "."
            position = keys.get("".join(suffix))
            if position is not None:
                yield position

    @property
    def unused(self) -> list[str]:
        """The patterns that `value` has not used for any module so far."""
        return [key for position, key in enumerate(self._patterns) if position not in self._used]

    def __getitem__(self, key: str) -> _V:
        return self._patterns[key]

    def __iter__(self) -> Any:
        return iter(self._patterns)

    def __len__(self) -> int:
        return len(self._patterns)


@functools.cache
def default_targets_by_model_type() -> dict[str, list[str] | str]:
    """Return `model_type` → the default targets of this architecture: a list of names, or one regular expression."""
    text = resources.files(__package__).joinpath("default_targets.json").read_text(encoding="utf-8")
    table: dict[str, list[str] | str] = json.loads(text)
    return table
