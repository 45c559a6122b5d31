"""Conditions under which a check does not apply: functions that are called before the check is generated, and an exception for use while it runs.

This module imports no torch.
"""

from __future__ import annotations

import functools
import inspect
import unittest
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .base import SuiteBase

Condition = Callable[[Any, str], "str | None"]
Suite = TypeVar("Suite", bound="SuiteBase")


class NotApplicable(unittest.SkipTest):
    """Raised by a check that does not apply to the config; the message is the reason. pytest reports it as a skip, `run_suite` as "not run"."""


def only(condition: Condition) -> Callable[[Callable[[Suite, str], None]], Callable[[Suite, str], None]]:
    """Return a decorator that adds a condition to a check: the condition returns the reason why the check does not apply to a config, or None.

    If the condition can be evaluated when pytest collects tests, pytest gets no item for this config, so that no test is reported as skipped.
    """

    def decorate(check: Callable[[Suite, str], None]) -> Callable[[Suite, str], None]:
        @functools.wraps(check)
        def guarded(self: Suite, name: str) -> None:
            reason = condition(self, name)
            if reason is not None:
                raise NotApplicable(reason)
            check(self, name)

        guarded.condition = condition  # type: ignore[attr-defined]
        return guarded

    return decorate


def wraps_layers(suite: SuiteBase, name: str) -> str | None:
    """Let a check apply only to tuners that wrap layers of the base model."""
    return None if suite.wraps_layers else f"{suite.peft_type} wraps no layers"


def refuses_quantised(suite: SuiteBase, name: str) -> str | None:
    """Let a check apply only to tuners that wrap layers but do not declare QUANTISED."""
    from ..plugins import Capability

    declared = f"{suite.peft_type} declares QUANTISED: the layers come from plugins, and have their tests there"
    return wraps_layers(suite, name) or (declared if suite.spec.can(Capability.QUANTISED) else None)


def offers_tokens(suite: SuiteBase, name: str) -> str | None:
    """Let a check apply only to methods with virtual tokens, on base models that take `input_ids`."""
    if not suite.config(name).is_prompt_learning:
        return f"{suite.peft_type} has no virtual tokens"
    return None if "input_ids" in suite.inputs(name) else "the base takes no input_ids"


def merges(suite: SuiteBase, name: str) -> str | None:
    """Let a check apply only to tuners that declare MERGE."""
    from ..plugins import Capability

    return None if suite.spec.can(Capability.MERGE) else f"{suite.peft_type} does not declare MERGE"


def routes(suite: SuiteBase, name: str) -> str | None:
    """Let a check apply only to tuners that declare PER_SAMPLE."""
    from ..plugins import Capability

    return None if suite.spec.can(Capability.PER_SAMPLE) else f"{suite.peft_type} does not declare PER_SAMPLE"


def generates(suite: SuiteBase, name: str) -> str | None:
    """Let a check apply only to configs whose task supports `generate`."""
    from ..tuners.tasks import task_of

    task = suite.config(name).task_type
    return None if task_of(task).generates else f"the task {task or '(none)'} does not generate"


def explained(check: Callable[..., Any]) -> tuple[str, str]:
    """Return what a check tests and what it protects users from: the two paragraphs of its docstring, each on one line.

    If the docstring of a check lacks one of them, an empty string is returned for it.
    """
    paragraphs = [" ".join(part.split()) for part in (inspect.getdoc(check) or "").split("\n\n")]
    harm = next((part for part in paragraphs if part.startswith(PROTECTS)), "")
    return paragraphs[0] if paragraphs[0] != harm else "", harm.removeprefix(PROTECTS).strip()


#: the first words of the docstring paragraph that says what a check protects users from
PROTECTS = "Protects from"
