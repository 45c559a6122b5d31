"""The name of the KV cache among the parameters and outputs of a forward: `past_key_values`; `cache` since transformers 5.24."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

OLDER = "past_key_values"
NEWER = "cache"
NAMES = (NEWER, OLDER)


def parameter_of(module: nn.Module) -> str | None:
    """Return the name of the parameter with which a module's `forward` takes a KV cache; None if it takes none."""
    found = inspect.signature(type(module).forward).parameters
    if OLDER in found:
        return OLDER
    # the `cache` of Flaubert and XLM is a dict of theirs
    return NEWER if NEWER in found and "dict" not in str(found[NEWER].annotation) else None


def given_in(arguments: Mapping[str, Any]) -> Any:
    """Return the KV cache among the arguments of a transformers model, which since 5.24 takes it under either name; None if there is none."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def returned_in(output: Any) -> Any:
    """Return the KV cache in the output of a model; None if there is none."""
    return getattr(output, NEWER) if hasattr(output, NEWER) else getattr(output, OLDER, None)
