"""The conformance suite that every tuner must pass, which an author subclasses in five lines, and tiny models for tests.

Importing this package imports neither torch nor pytest: names are loaded when they are first used (PEP 562), because pytest imports this package,
which contains the pytest plugin (`peft_core.testing.plugin`), at each start.

Example:
    >>> class TestLoHa(TunerSuite):
    ...     peft_type = "LOHA"
    ...     configs = {"linear": {"r": 4, "target_modules": ["q_proj"]}}
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_MODULE_OF = {
    "BASES": "models",
    "NotApplicable": "conditions",
    "Result": "runner",
    "TunerSuite": "suite",
    "run_suite": "runner",
    "suite_for": "installed",
    "tiny": "models",
}
__all__ = sorted(_MODULE_OF)  # computed, so that it can't differ from what is loaded

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .conditions import NotApplicable as NotApplicable
    from .installed import suite_for as suite_for
    from .models import BASES as BASES
    from .models import tiny as tiny
    from .runner import Result as Result
    from .runner import run_suite as run_suite
    from .suite import TunerSuite as TunerSuite


def __getattr__(name: str) -> Any:
    home = _MODULE_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
