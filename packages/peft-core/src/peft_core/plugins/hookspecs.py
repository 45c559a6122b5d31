"""The hooks a plugin can implement. Each returns plain data or a frozen dataclass; each is called through `hooks.py`.

pluggy's two markers only set an attribute. They are implemented here again, because importing pluggy takes longer than all of core's plugin code
and is not needed until a hook is called. docs/plugins.md says which changes to hooks are possible in which version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ..errors import PluginError, listed

if TYPE_CHECKING:
    from .spec import TunerSpec

PROJECT = "peft"
#: name of the attribute of a hook implementation that holds the options of `hookimpl`
IMPLEMENTATION = f"{PROJECT}_impl"
#: name of the attribute of a hook specification that holds its `Deprecation`, if it has one
DEPRECATION = f"{PROJECT}_deprecation"
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Deprecation:
    """The deprecation of a hook or of some of its arguments. Implementing them gives a warning that names the plugin's distribution.

    pluggy's `warn_on_impl` is not used, because its warning can't name the distribution of the implementation.

    Args:
        hook: since which version the hook is deprecated, and what to use instead; None: the hook is not deprecated.
        arguments: deprecated argument → since which version, and what to use instead.
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
        firstresult: the result is the first return value that is not None; the remaining plugins are not called.
        deprecated: since which version the hook is deprecated, and what to use instead; None: it is not deprecated.
        deprecated_arguments: deprecated argument → since which version, and what to use instead.

    Raises:
        PluginError: `deprecated_arguments` names an argument that the function does not take.

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
        function: the implementation; it takes the arguments of the hook that it needs, under the same names.
        tryfirst: call this implementation before the others.
        trylast: call this implementation after the others.
        optionalhook: no error if the hook is not specified (a hook of another plugin, or of a newer version of peft-core).
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
    """Return the tuners of this plugin. Called once, when a `peft_type` of this distribution is first needed.

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
    """Return which modules of an architecture are adapted if the user names none. The first result that is not None is used.

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
    """Return the adapter layer for a base layer that the tuner does not support itself (for example a quantised one).

    The first result that is not None is used. The hook is not called for torch's Linear, Embedding and convolutions with ordinary,
    unquantised weights.

    Args:
        peft_type: as in `adapter_config.json`: ``"LORA"``.
        base_layer: the module to wrap.
        selection: the `AdapterSelection` to pass to the adapter layer.

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
    """Rename or reshape the tensors of a file before they are compared with the model. The first result that is not None is used.

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
        adapter_name: the name of the added adapter.
        config: the config of the adapter, including values that were chosen for this model (targets).

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
        adapter_name: the name of the adapter.
        path: the absolute path, without links, of the folder with the files; for the Hub, the snapshot folder in the local cache.
        source: the folder or the Hub id that the caller passed.

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
    """Called after an adapter was saved.

    Args:
        model: the base.
        adapter_name: the name of the adapter.
        path: the folder, as the caller passed it.

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
    """Called after the active adapters of a model were set.

    Args:
        model: the base.
        adapter_names: the names of all active adapters, in the order given.

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
    """Called after adapters were merged into the base weights; not called if all of them were merged already.

    Args:
        model: the base.
        adapter_names: the names of the newly merged adapters, in the order of merging.

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
    """Called after adapters were unmerged from the base weights, by any operation; not called if no adapter was merged.

    Args:
        model: the base; its weights have the values from before the merge.
        adapter_names: the names of the unmerged adapters, in load order.

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
    """Called after all adapters were removed from a model, which is the unwrapped base again.

    Args:
        model: the base, no longer wrapped.
        adapter_names: the names of the adapters that the model had, in load order.
        merged: the names of the adapters that stay merged in its weights, in load order; empty after `unload`.

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
        adapter_name: the name of the deleted adapter.

    Example:
        >>> from peft_core import hookimpl
        >>> @hookimpl
        ... def peft_adapter_deleted(model, adapter_name):
        ...     print("deleted", adapter_name)
        >>> peft_adapter_deleted(None, "french")
        deleted french
    """
