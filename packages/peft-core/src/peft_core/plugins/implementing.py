"""Checks a plugin's hook implementations against the specifications before pluggy registers it; errors and warnings name the plugin's owner."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

from ..errors import PeftWarning, PluginError, did_you_mean, listed
from .hookspecs import DEPRECATION, IMPLEMENTATION, Deprecation


def register(manager: Any, plugin: object, *, owner: str, name: str | None = None) -> None:
    """Register a plugin. An invalid plugin is refused before any of its functions is called.

    Args:
        manager: the `pluggy.PluginManager`.
        plugin: a module or object with implementations.
        owner: the distribution of the plugin with its version, for messages.
        name: the name under which the manager registers the plugin; None: pluggy chooses one.

    Raises:
        PluginError: the plugin implements a hook that is not specified, takes an argument that the hook does not pass, or marks an object that is
            not a function with `@hookimpl`.

    Warns:
        PeftWarning: the plugin implements a deprecated hook or takes a deprecated argument.
    """
    import pluggy

    specs = {hook: caller.spec for hook, caller in vars(manager.hook).items() if caller.has_spec()}
    notices: list[str] = []
    for hook, implementation, optional in _implementations(manager, plugin, owner):
        spec = specs.get(hook)
        if spec is not None:
            notices += _compare(hook, implementation, spec, owner)
        elif not optional:
            raise PluginError(
                f"the plugin {owner} implements {hook!r}, which is no hook of peft-core {_core()}",
                hint=f"{did_you_mean(hook, specs) or f'hooks are {listed(specs, 20)};'} if only other versions of peft-core or another "
                "plugin have it, mark it @hookimpl(optionalhook=True)",
            )
    for notice in notices:
        warnings.warn(notice, PeftWarning, stacklevel=4)
    try:
        manager.register(plugin, name=name)
    except pluggy.PluginValidationError as error:
        raise PluginError(f"the plugin {owner} can't be registered: {error}", hint="see docs/plugins.md for what a hook takes") from error


def _implementations(manager: Any, plugin: object, owner: str) -> Iterator[tuple[str, Any, bool]]:
    """Yield (hook name, `pluggy.HookImpl`, whether the hook may be unknown) for every function of a plugin that is marked with `@hookimpl`.

    Raises:
        PluginError: an object that is not a function is marked; pluggy would ignore it silently.
    """
    import pluggy

    for attribute in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is not None:
            implementation = pluggy.HookImpl(plugin, attribute, getattr(plugin, attribute), options)
            yield options.get("specname") or attribute, implementation, bool(options.get("optionalhook"))
            continue
        value = inspect.getattr_static(plugin, attribute, None)  # unlike getattr, this does not execute properties
        if isinstance(getattr(value, "__dict__", {}).get(IMPLEMENTATION), dict):
            raise PluginError(
                f"the plugin {owner} decorates {attribute!r} with @hookimpl, but it is a {type(value).__name__}, not a function",
                hint="decorate a function or a method",
            )


def _compare(hook: str, implementation: Any, spec: Any, owner: str) -> list[str]:
    """Compare a hook implementation with the specification, and return the texts of the deprecation warnings to give.

    Raises:
        PluginError: the implementation takes an argument that the hook does not pass, or takes one as keyword-only.
    """
    gives = tuple(spec.argnames)
    unknown = [name for name in (*implementation.argnames, *_by_keyword_only(implementation.function)) if name not in gives]
    if unknown:
        raise PluginError(
            f"the plugin {owner} implements {hook} with the argument {unknown[0]!r}, which the hook of peft-core {_core()} does not give",
            hint=f"{did_you_mean(unknown[0], gives, '')} it gives {listed(gives) or 'none'}".strip(),
        )
    keyword_only = _by_keyword_only(implementation.function)
    if keyword_only:
        raise PluginError(
            f"the plugin {owner} implements {hook} with {keyword_only[0]!r} behind a `*`, where hooks can't give it",
            hint="take it as an ordinary argument",
        )
    deprecation: Deprecation | None = getattr(spec.function, DEPRECATION, None)
    if deprecation is None:
        return []
    whole = [] if deprecation.hook is None else [f"the plugin {owner} implements {hook}, which is deprecated {deprecation.hook}"]
    parts = [
        f"the plugin {owner} takes the argument {name!r} of {hook}, which is deprecated {text}"
        for name, text in deprecation.arguments.items()
        if name in implementation.argnames
    ]
    return whole + parts


def _by_keyword_only(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty]


def _core() -> str:
    from .. import __version__

    return __version__
