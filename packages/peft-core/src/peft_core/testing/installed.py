"""Suites for installed tuners, without a test file: what `pytest --peft-tuner` collects. The plugin puts the classes into this module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .suite import TunerSuite


def suite_for(peft_type: str, configs: Mapping[str, Mapping[str, Any]] | None = None) -> type[TunerSuite]:
    """Return the conformance suite of an installed or registered tuner.

    Args:
        peft_type: the tuner.
        configs: name → fields, as `TunerSuite.configs`; None: the examples of its spec.
    """
    name = "Test_" + re.sub(r"\W", "_", peft_type)
    doc = f"The conformance suite on {peft_type}."
    # `__test__`: collected whatever names a project's `python_classes` allows
    body = {"peft_type": peft_type, "configs": dict(configs or {}), "__module__": __name__, "__doc__": doc, "__test__": True}
    return type(name, (TunerSuite,), body)
