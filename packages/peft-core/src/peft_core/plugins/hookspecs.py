"""The hooks a plugin can implement. Each returns plain data or a frozen dataclass; each is called through `hooks.py`.

pluggy's two markers only set an attribute. They are written out here, because importing pluggy costs more than all of core's
plugin code and is not needed until a hook is called. What may change here in which version stands in docs/plugins.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ..errors import PluginError, listed

if TYPE_CHECKING:
    from .spec import TunerSpec

PROJECT = "peft"
#: attribute of an implementation that holds what it was marked with
IMPLEMENTATION = f"{PROJECT}_impl"
#: attribute of a specification that holds its `Deprecation`, if it has one
DEPRECATION = f"{PROJECT}_deprecation"
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Deprecation:
    """What of a hook is on its way out. Whoever implements it is warned, by the name of the distribution.

    pluggy's own `warn_on_impl` is not used: it can't say whose the implementation is.

    Args:
        hook: since when, and what to use instead; None: the hook stays.
        arguments: argument → the same of it.
    """

    hook: str | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)


@overload
def hookspec(function: _F) -> _F: ...
@overload
def hookspec(
    *, firstresult: bool = False, deprecated: str | None = None, deprecated_arguments: Mapping[str, str] | None = None
) -> Callable[[_F], _F]: ...
def hookspec(
    function: _F | None = None, *, firstresult: bool = False, deprecated: str | None = None, deprecated_arguments: Mapping[str, str] | None = None
) -> _F | Callable[[_F], _F]:
    """Mark a function as the specification of a hook (`pluggy.HookspecMarker("peft")`).

    Args:
        function: the specification.
        firstresult: the first answer that is not None counts, and nobody is asked after it.
        deprecated: the hook is on its way out: since when, and what to use instead.
        deprecated_arguments: argument → the same of it.

    Raises:
        PluginError: `deprecated_arguments` names what the function does not take.

    Example:
        >>> from peft_core import hookspec
        >>> @hookspec(deprecated_arguments={"path": "since 0.3: take `folder`"})
        ... def peft_zip_packed(folder, path):
        ...     "A zip file was written."
    """
    mark = _marked("spec", {"firstresult": firstresult, "historic": False, "warn_on_impl": None, "warn_on_impl_args": None})
    if deprecated is None and not deprecated_arguments:
        return mark if function is None else mark(function)
    deprecation = Deprecation(deprecated, dict(deprecated_arguments or {}))

    def mark_deprecated(target: _F) -> _F:
        takes = target.__code__.co_varnames[: target.__code__.co_argcount]
        unknown = [name for name in deprecation.arguments if name not in takes]
        if unknown:
            raise PluginError(f"deprecated_arguments of {target.__name__} names {listed(unknown)}", hint=f"it takes {listed(takes)}")
        setattr(target, DEPRECATION, deprecation)
        return mark(target)

    return mark_deprecated if function is None else mark_deprecated(function)


@overload
def hookimpl(function: _F) -> _F: ...
@overload
def hookimpl(*, tryfirst: bool = False, trylast: bool = False, optionalhook: bool = False) -> Callable[[_F], _F]: ...
def hookimpl(function: _F | None = None, *, tryfirst: bool = False, trylast: bool = False, optionalhook: bool = False) -> _F | Callable[[_F], _F]:
    """Mark a function of a plugin as the implementation of a hook (`pluggy.HookimplMarker("peft")`).

    Args:
        function: the implementation; it takes those arguments of the hook that it needs, by their names.
        tryfirst: it is asked before others.
        trylast: it is asked after others.
        optionalhook: no error if nobody specifies such a hook (one of another plugin, or of newer versions of core).
    """
    options = {"wrapper": False, "hookwrapper": False, "optionalhook": optionalhook, "tryfirst": tryfirst, "trylast": trylast, "specname": None}
    mark = _marked("impl", options)
    return mark if function is None else mark(function)


def _marked(kind: str, options: dict[str, Any]) -> Callable[[_F], _F]:
    def mark(target: _F) -> _F:
        setattr(target, f"{PROJECT}_{kind}", options)
        return target

    return mark


# ---- questions ----------------------------------------------------------------------------------------------------------


@hookspec
def peft_tuners() -> Iterable[TunerSpec]:  # type: ignore[empty-body]
    """Offer tuners. Called once, when a type of this distribution is first asked for.

    Example:
        >>> from peft_core import TunerSpec, hookimpl
        >>> @hookimpl
        ... def peft_tuners():
        ...     yield TunerSpec("LOHA", "peft_loha.config:LoHaConfig", "peft_loha.tuner:LoHaTuner", "hada_")
        >>> [spec.peft_type for spec in peft_tuners()]
        ['LOHA']
    """


@hookspec(firstresult=True)
def peft_default_targets(peft_type: str, model_type: str) -> list[str] | str | None:
    """Say which modules of an architecture are adapted when the user names none. The first answer counts.

    Args:
        peft_type: as in `adapter_config.json`: ``"LORA"``.
        model_type: as in the base's config: ``"llama"``.

    Example:
        >>> from peft_core import hookimpl
        >>> @hookimpl
        ... def peft_default_targets(peft_type, model_type):
        ...     return ["wq", "wv"] if model_type == "my_llm" else None
        >>> peft_default_targets("LORA", "my_llm")
        ['wq', 'wv']
    """


@hookspec(firstresult=True)
def peft_make_layer(peft_type: str, base_layer: Any, selection: Any) -> Any | None:
    """Give a tuner the adapter layer for a base layer that it does not know itself (a quantised one, say). First answer counts.

    Not asked for torch's own Linear, Embedding and convolutions with weights of plain numbers.

    Args:
        peft_type: as in `adapter_config.json`: ``"LORA"``.
        base_layer: the module to wrap.
        selection: to be handed to the layer.

    Example:
        >>> from torch import nn
        >>> from peft_core import AdapterSelection, AdapterLayer, hookimpl
        >>> class Int4Linear(nn.Linear):
        ...     "A layer of somebody's library."
        >>> class ScaleInt4(AdapterLayer):
        ...     "What the method SCALE puts around it: `add`, `delta_weight` and so on."
        >>> @hookimpl
        ... def peft_make_layer(peft_type, base_layer, selection):
        ...     if peft_type == "SCALE" and isinstance(base_layer, Int4Linear):
        ...         return ScaleInt4(base_layer, selection)
        >>> type(peft_make_layer("SCALE", Int4Linear(2, 2), AdapterSelection())).__name__
        'ScaleInt4'
    """


@hookspec(firstresult=True)
def peft_convert_state_dict(peft_type: str, state_dict: dict[str, Any], config: Any) -> dict[str, Any] | None:
    """Rename or reshape the tensors of a file before they are compared with the model. The first answer counts.

    Args:
        peft_type: as in `adapter_config.json`: ``"LORA"``.
        state_dict: key of the file → tensor.
        config: the adapter's config.

    Example:
        >>> from peft_core import hookimpl
        >>> @hookimpl
        ... def peft_convert_state_dict(peft_type, state_dict, config):
        ...     return {key.replace("lora_down", "lora_A"): value for key, value in state_dict.items()}
        >>> list(peft_convert_state_dict("LORA", {"q.lora_down.weight": None}, None))
        ['q.lora_A.weight']
    """


# ---- events: called once per operation of a model, after it succeeded; `model` is the base ----------------------------------


@hookspec
def peft_adapter_added(model: Any, adapter_name: str, config: Any) -> None:
    """Called after an adapter was added to a model.

    Args:
        model: the base.
        adapter_name: its name.
        config: its config, including what the model decided (targets).

    Example:
        >>> from peft_core import PeftConfig, hookimpl
        >>> @hookimpl
        ... def peft_adapter_added(model, adapter_name, config):
        ...     print("added", adapter_name, config.peft_type)
        >>> peft_adapter_added(None, "french", PeftConfig(peft_type="LORA"))
        added french LORA
    """


@hookspec
def peft_adapter_loaded(model: Any, adapter_name: str, path: str, source: str) -> None:
    """Called after the weights of an adapter were read from files.

    Args:
        model: the base.
        adapter_name: its name.
        path: the folder in which the files lie, absolute and without links; of the Hub, the snapshot in the local cache.
        source: what the caller named: a folder, or an id on the Hub.

    Example:
        >>> from peft_core import hookimpl
        >>> @hookimpl
        ... def peft_adapter_loaded(model, adapter_name, path, source):
        ...     print("loaded", adapter_name, "from", path, "for", source)
        >>> peft_adapter_loaded(None, "french", "/cache/models--org--french/snapshots/1f0c", "org/french")
        loaded french from /cache/models--org--french/snapshots/1f0c for org/french
    """


@hookspec
def peft_adapter_saved(model: Any, adapter_name: str, path: str) -> None:
    """Called after an adapter was written.

    Args:
        model: the base.
        adapter_name: its name.
        path: the folder, as the caller named it.

    Example:
        >>> from peft_core import hookimpl
        >>> @hookimpl
        ... def peft_adapter_saved(model, adapter_name, path):
        ...     print("saved", adapter_name, "to", path)
        >>> peft_adapter_saved(None, "french", "out/french")
        saved french to out/french
    """


@hookspec
def peft_adapter_activated(model: Any, adapter_names: tuple[str, ...]) -> None:
    """Called when the adapters that a model uses were chosen.

    Args:
        model: the base.
        adapter_names: all of them, in the order given.

    Example:
        >>> from peft_core import hookimpl
        >>> @hookimpl
        ... def peft_adapter_activated(model, adapter_names):
        ...     print("active", adapter_names)
        >>> peft_adapter_activated(None, ("french", "legal"))
        active ('french', 'legal')
    """


@hookspec
def peft_adapter_merged(model: Any, adapter_names: tuple[str, ...]) -> None:
    """Called after adapters were folded into the base weights; not if all of them were already.

    Args:
        model: the base.
        adapter_names: those newly folded in, in the order of folding.

    Example:
        >>> from peft_core import hookimpl
        >>> @hookimpl
        ... def peft_adapter_merged(model, adapter_names):
        ...     print("merged", adapter_names)
        >>> peft_adapter_merged(None, ("french",))
        merged ('french',)
    """


@hookspec
def peft_adapter_unmerged(model: Any, adapter_names: tuple[str, ...]) -> None:
    """Called after adapters were taken out of the base weights, by whichever operation; not if none was in them.

    Args:
        model: the base; its weights are what they were before the merge.
        adapter_names: those taken out, in load order.

    Example:
        >>> from peft_core import hookimpl
        >>> @hookimpl
        ... def peft_adapter_unmerged(model, adapter_names):
        ...     print("unmerged", adapter_names)
        >>> peft_adapter_unmerged(None, ("french",))
        unmerged ('french',)
    """


@hookspec
def peft_adapter_unloaded(model: Any, adapter_names: tuple[str, ...], merged: tuple[str, ...]) -> None:
    """Called after all adapters were taken off a model, which is the plain base again.

    Args:
        model: the base, no longer wrapped.
        adapter_names: those that it had, in load order.
        merged: those whose effect stays in its weights, in load order; empty after `unload`.

    Example:
        >>> from peft_core import hookimpl
        >>> @hookimpl
        ... def peft_adapter_unloaded(model, adapter_names, merged):
        ...     print("unloaded", adapter_names, "of which stay", merged)
        >>> peft_adapter_unloaded(None, ("french", "legal"), ("french",))
        unloaded ('french', 'legal') of which stay ('french',)
    """


@hookspec
def peft_adapter_deleted(model: Any, adapter_name: str) -> None:
    """Called after an adapter was deleted.

    Args:
        model: the base.
        adapter_name: the name that it had.

    Example:
        >>> from peft_core import hookimpl
        >>> @hookimpl
        ... def peft_adapter_deleted(model, adapter_name):
        ...     print("deleted", adapter_name)
        >>> peft_adapter_deleted(None, "french")
        deleted french
    """
