"""Functions that validate single values, used by the `check` methods of configs."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError


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


def require_names_or_expression(name: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` is None, a set of names or one regular expression."""
    hint = "give a list of names or one regular expression"
    if isinstance(value, (set, frozenset)):
        if not all(isinstance(each, str) for each in value):
            raise ConfigError(f"{name}={value!r} has members that are no names", hint=hint)
    elif value is not None and not isinstance(value, str):
        raise ConfigError(f"{name}={value!r} is a {type(value).__name__}", hint=hint)


def require_list_of_names(name: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` is None or a collection of names."""
    if isinstance(value, str):
        raise ConfigError(f"{name}={value!r} is a str", hint=f"write [{value!r}]")
    if value is not None and not isinstance(value, (list, tuple, set, frozenset)):
        raise ConfigError(f"{name}={value!r} is a {type(value).__name__}", hint="give a list of names")


def require_pattern(name: str, value: Any, require: Callable[[str, Any], None]) -> None:
    """Raise `ConfigError` unless `value` is a dict whose values pass the check `require`."""
    if not isinstance(value, dict):
        raise ConfigError(f"{name}={value!r} is a {type(value).__name__}", hint="give a dict: expression → value")
    for key, each in value.items():
        require(f"{name}[{key!r}]", each)
