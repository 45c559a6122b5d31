"""The data about a suite that a report contains in addition to its results: plain data, created in the process that runs the suite."""

from __future__ import annotations

import functools
from typing import Any

from ..errors import PeftError
from ..plugins import Capability, get_tuner_spec, registry
from .conditions import explained


@functools.cache
def facts_of(suite: Any) -> dict[str, Any]:
    """Return a dict with a suite's name, its tuner, its configs, its checks (what each tests and protects from), and why checks do not apply."""
    asking, checks, configs = suite(), suite.checks(), list(suite.named_configs())
    reasons = {check: {name: reason for name in configs if (reason := asking.not_run(check, name)) is not None} for check in checks}
    return {
        "suite": f"{suite.__module__}.{suite.__qualname__}",
        "tuner": tuner_facts(suite.peft_type),
        "configs": {name: {key: str(value) for key, value in fields.items()} for name, fields in suite.named_configs().items()},
        "checks": {check: list(explained(getattr(suite, check))) for check in checks},
        "not_run": {check: found for check, found in reasons.items() if found},
    }


def tuner_facts(peft_type: str) -> dict[str, Any]:
    """Return a dict with a tuner's type, distribution, version and declared capabilities; for an unknown tuner only the type is filled in."""
    try:
        spec, owner = get_tuner_spec(peft_type), registry.owner(peft_type)
    except PeftError:
        return {"peft_type": peft_type, "distribution": "(not known when the tests were collected)", "version": "", "capabilities": []}
    return {
        "peft_type": spec.peft_type,
        "distribution": owner.distribution if owner else "(registered in the process)",
        "version": owner.version if owner else "",
        "capabilities": [kind.name for kind in Capability if kind.name and kind is not Capability.NONE and spec.can(kind)],
    }
