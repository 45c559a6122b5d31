"""Copy the signatures of the base's methods to a wrapped model, and check whether a folder contains an adapter."""

from __future__ import annotations

import functools
import inspect
import os
import types
from typing import Any, Literal

from peft_core.config import PeftConfig
from peft_core.errors import ConfigError, PeftError


def update_forward_signature(model: Any) -> None:
    """Give `model.forward` the signature and docstring of the base's `forward`, if its own signature is only ``*args, **kwargs``.

    Args:
        model: a `PeftModel`.
    """
    _update(model, "forward")


def update_generate_signature(model: Any) -> None:
    """Give `model.generate` the signature and docstring of the base's `generate`, if its own signature is only ``*args, **kwargs``.

    Args:
        model: a `PeftModel`.
    """
    _update(model, "generate")


def update_signature(model: Any, method: Literal["all", "forward", "generate"] = "all") -> None:
    """Give `forward`, `generate` or both the signatures and docstrings of the base's methods.

    Args:
        model: a `PeftModel`.
        method: ``"forward"``, ``"generate"`` or ``"all"``.

    Raises:
        ConfigError: `method` is none of these.
    """
    if method not in ("all", "forward", "generate"):
        raise ConfigError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    for name in ("forward", "generate") if method == "all" else (method,):
        _update(model, name)


def _update(model: Any, name: str) -> None:
    original = getattr(type(model.get_base_model()), name, None)
    wrapper = getattr(type(model), name)
    if original is None or any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY) for p in _parameters(wrapper)[1:]):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(self, *args, **kwargs)

    method.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    model.__dict__[name] = types.MethodType(method, model)


def _parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Return whether `model_name_or_path`, a folder or a Hub repository, contains an adapter config."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (PeftError, OSError, ValueError):
        return False
    return True
