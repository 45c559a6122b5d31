"""Checks of single values, for the `check` of configs."""

from __future__ import annotations

import math
import numbers
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
