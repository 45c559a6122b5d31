"""The hooks a plugin can implement. Each returns plain data or a frozen dataclass; each is called through `hooks.py`.

pluggy's two markers only set an attribute. They are written out here, because importing pluggy costs more than all of core's
plugin code and is not needed until a hook is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    from .spec import TunerSpec

PROJECT = "peft"
_F = TypeVar("_F", bound=Callable[..., Any])


@overload
def hookspec(function: _F) -> _F: ...
@overload
def hookspec(*, firstresult: bool = False) -> Callable[[_F], _F]: ...
def hookspec(function: _F | None = None, *, firstresult: bool = False) -> _F | Callable[[_F], _F]:
    """Mark a function as the specification of a hook (`pluggy.HookspecMarker("peft")`)."""
    return _marked(function, "spec", {"firstresult": firstresult, "historic": False, "warn_on_impl": None, "warn_on_impl_args": None})


@overload
def hookimpl(function: _F) -> _F: ...
@overload
def hookimpl(*, tryfirst: bool = False, trylast: bool = False, optionalhook: bool = False) -> Callable[[_F], _F]: ...
def hookimpl(function: _F | None = None, *, tryfirst: bool = False, trylast: bool = False, optionalhook: bool = False) -> _F | Callable[[_F], _F]:
    """Mark a function of a plugin as the implementation of a hook (`pluggy.HookimplMarker("peft")`)."""
    options = {"wrapper": False, "hookwrapper": False, "optionalhook": optionalhook, "tryfirst": tryfirst, "trylast": trylast, "specname": None}
    return _marked(function, "impl", options)


def _marked(function: _F | None, kind: str, options: dict[str, Any]) -> _F | Callable[[_F], _F]:
    def mark(target: _F) -> _F:
        setattr(target, f"{PROJECT}_{kind}", options)
        return target

    return mark if function is None else mark(function)


@hookspec
def peft_tuners() -> Iterable[TunerSpec]:  # type: ignore[empty-body]
    """Offer tuners. Called once, when a type of this distribution is first asked for.

    Example:
        >>> @hookimpl
        ... def peft_tuners():
        ...     yield TunerSpec("LOHA", "peft_loha.config:LoHaConfig", "peft_loha.tuner:LoHaTuner", "hada_")
    """


@hookspec(firstresult=True)
def peft_default_targets(peft_type: str, model_type: str) -> list[str] | str | None:
    """Say which modules of an architecture are adapted when the user names none. The first answer counts.

    Example:
        >>> @hookimpl
        ... def peft_default_targets(peft_type, model_type):
        ...     return ["wq", "wv"] if model_type == "my_llm" else None
    """


@hookspec(firstresult=True)
def peft_make_layer(peft_type: str, base_layer: Any, activation: Any) -> Any | None:
    """Give a tuner the adapter layer for a base layer that it does not know itself (a quantised one, say). First answer counts.

    Example:
        >>> @hookimpl
        ... def peft_make_layer(peft_type, base_layer, activation):
        ...     if peft_type == "LORA" and isinstance(base_layer, MyInt4Linear):
        ...         return LoraMyInt4Linear(base_layer, activation)
    """


@hookspec(firstresult=True)
def peft_convert_state_dict(peft_type: str, state_dict: dict[str, Any], config: Any) -> dict[str, Any] | None:
    """Rename or reshape the tensors of a file before they are compared with the model. The first answer counts.

    Example:
        >>> @hookimpl
        ... def peft_convert_state_dict(peft_type, state_dict, config):
        ...     return {key.replace("lora_down", "lora_A"): value for key, value in state_dict.items()}
    """


@hookspec
def peft_adapter_added(model: Any, adapter_name: str, config: Any) -> None:
    """Be told that a new adapter was added to a model.

    Example:
        >>> @hookimpl
        ... def peft_adapter_added(model, adapter_name, config):
        ...     print("added", adapter_name, config.peft_type)
    """


@hookspec
def peft_adapter_loaded(model: Any, adapter_name: str, path: str) -> None:
    """Be told that the weights of an adapter were read from files.

    Example:
        >>> @hookimpl
        ... def peft_adapter_loaded(model, adapter_name, path):
        ...     print("loaded", adapter_name, "from", path)
    """


@hookspec
def peft_adapter_saved(model: Any, adapter_name: str, path: str) -> None:
    """Be told that an adapter was written.

    Example:
        >>> @hookimpl
        ... def peft_adapter_saved(model, adapter_name, path):
        ...     print("saved", adapter_name, "to", path)
    """


@hookspec
def peft_adapter_activated(model: Any, adapter_names: tuple[str, ...]) -> None:
    """Be told which adapters a model uses from now on.

    Example:
        >>> @hookimpl
        ... def peft_adapter_activated(model, adapter_names):
        ...     print("active", adapter_names)
    """


@hookspec
def peft_adapter_deleted(model: Any, adapter_name: str) -> None:
    """Be told that an adapter is gone.

    Example:
        >>> @hookimpl
        ... def peft_adapter_deleted(model, adapter_name):
        ...     print("deleted", adapter_name)
    """
