"""The registry of tuners: finds the spec, config class and tuner class of a `peft_type`, and imports a plugin when it is first needed."""

from __future__ import annotations

import importlib
import threading
import types
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import DuplicateTunerError, IncompatiblePluginError, PeftWarning, PluginError, UnknownTunerError, did_you_mean, listed
from . import discovery, implementing
from .discovery import Claim
from .spec import TunerSpec


@dataclass(frozen=True)
class TunerInfo:
    """The information about a tuner that is available without importing it.

    Args:
        peft_type: the name of the tuner's method.
        distribution, version: the package that offers the tuner, and the package's version.
        module: the module that the package's entry point names.
        state: ``"available"`` (not imported yet), ``"loaded"``, ``"registered"`` (by `register_tuner`), ``"broken"`` (see `error`) or
            ``"conflict"`` (offered by more than one distribution).
        error: the error because of which the tuner can't be used; None if no error is known.
    """

    peft_type: str
    distribution: str
    version: str
    module: str
    state: str
    error: PluginError | None = None


class Registry:
    """The tuners by `peft_type`. It is safe to use from several threads, and while a plugin is being imported."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._claims: dict[str, list[Claim]] | None = None
        self._registered: dict[str, TunerSpec] = {}
        self._loaded: dict[str, TunerSpec] = {}
        self._broken: dict[str, PluginError] = {}
        self._loading: set[str] = set()
        self._manager: Any = None
        self._offers: dict[str, tuple[Any, ...]] = {}
        self._general_loaded = False

    # ---- listing -------------------------------------------------------------------------------------------------
    def claims(self) -> dict[str, list[Claim]]:
        """Return the installed entry points by `peft_type`; they are read once and cached (see `refresh`)."""
        with self._lock:
            if self._claims is None:
                self._claims = {}
                for claim in discovery.claims(discovery.TUNERS):
                    self._claims.setdefault(claim.name.upper(), []).append(claim)
            return self._claims

    def refresh(self) -> None:
        """Make the next query read the installed distributions again (after `pip install` in a running notebook). Loaded tuners remain loaded."""
        with self._lock:
            self._claims = None
            self._broken.clear()

    def names(self) -> list[str]:
        """Return every known `peft_type`, sorted."""
        return sorted({*self._registered, *self.claims()})

    def info(self) -> list[TunerInfo]:
        """Return a `TunerInfo` for each tuner and distribution that offers it, sorted by `peft_type`; imports no tuner."""
        found = [TunerInfo(name, "(this process)", "", "", "registered") for name in self._registered]
        for name, claims in self.claims().items():
            if name in self._registered:
                continue
            for claim in claims:
                state = "conflict" if len(claims) > 1 else "loaded" if name in self._loaded else "available"
                error = self._broken.get(name)
                found.append(TunerInfo(name, claim.distribution, claim.version, claim.module, "broken" if error else state, error))
        return sorted(found, key=lambda info: (info.peft_type, info.distribution))

    # ---- resolving -----------------------------------------------------------------------------------------------
    def resolve(self, peft_type: str) -> TunerSpec:
        """Return the spec of a tuner, importing its plugin if that has not happened yet.

        Raises:
            UnknownTunerError: no installed or registered tuner has this name.
            DuplicateTunerError: several distributions offer this tuner.
            IncompatiblePluginError: the tuner's distribution requires another version of peft-core.
            PluginError: the plugin fails to import, or does not offer the tuner that its entry point names.
        """
        name = str(peft_type).upper()
        spec = self._registered.get(name) or self._loaded.get(name)
        if spec is not None:
            return spec
        with self._lock:
            spec = self._registered.get(name) or self._loaded.get(name)
            if spec is not None:  # another thread has loaded it in the meantime
                return spec
            claims = self.claims().get(name, [])
            if not claims:
                raise self._unknown(peft_type, name)
            if len(claims) > 1:
                owners = " and ".join(map(str, claims))
                raise DuplicateTunerError(
                    f"peft_type {name!r} is offered by two distributions: {owners}",
                    hint=f"uninstall one, or choose with {discovery.SWITCH}=-{claims[1].distribution} (keeps {claims[0].distribution})",
                )
            if name in self._broken:
                raise self._broken[name]
            try:
                self._load(claims[0])
            except PluginError as error:
                if claims[0].module not in self._loading:  # an error while the plugin is being imported may not be final
                    self._broken[name] = error
                raise
            return self._loaded[name]

    def config_class(self, peft_type: str) -> type:
        """Return the config class of a tuner; this imports the module of the config class, which does not need torch."""
        return self._class_of(self.resolve(peft_type), "config")

    def tuner_class(self, peft_type: str) -> type:
        """Return the tuner class of a tuner; this imports the module of the class."""
        return self._class_of(self.resolve(peft_type), "tuner")

    def owner(self, peft_type: str) -> Claim | None:
        """Return the entry point of the distribution that offers a tuner; None if the tuner was registered in this process or is not installed."""
        claims = self.claims().get(str(peft_type).upper(), [])
        return None if str(peft_type).upper() in self._registered or not claims else claims[0]

    # ---- registering without packaging ---------------------------------------------------------------------------
    def register(self, spec: TunerSpec, *, replace: bool = False) -> None:
        """Add a tuner to the registry of this process.

        Raises:
            DuplicateTunerError: another registered tuner or an installed distribution already uses the name, and `replace` is False.
        """
        with self._lock:
            taken = spec.peft_type in self._registered or spec.peft_type in self.claims()
            if taken and not replace and self._registered.get(spec.peft_type) != spec:
                owner = self.owner(spec.peft_type)
                raise DuplicateTunerError(
                    f"peft_type {spec.peft_type!r} is taken by {owner or 'a tuner registered in this process'}",
                    hint="choose another name, or pass replace=True",
                )
            self._registered[spec.peft_type] = spec

    def unregister(self, peft_type: str) -> None:
        """Remove a tuner that was added with `register`; installed tuners can't be removed.

        Raises:
            UnknownTunerError: no tuner of this name was registered in this process.
        """
        with self._lock:
            if self._registered.pop(str(peft_type).upper(), None) is None:
                raise UnknownTunerError(f"{peft_type!r} was not registered in this process")

    # ---- hooks ---------------------------------------------------------------------------------------------------
    def manager(self) -> Any:
        """Return the pluggy manager with the general plugins loaded; it is created on the first call."""
        with self._lock:
            manager = self._bare_manager()
            if not self._general_loaded:
                self._general_loaded = True
                for claim in discovery.claims(discovery.PLUGINS):
                    try:
                        self.import_plugin(claim)
                    except PluginError as error:
                        warnings.warn(f"{error}; peft-core goes on without it", PeftWarning, stacklevel=3)
            return manager

    def register_plugin(self, plugin: object, name: str | None = None) -> None:
        """Register an object or module with hook implementations in this process, as an entry point does for a package.

        Raises:
            PluginError: the plugin implements a hook that does not exist, or an implementation takes an argument that its hook does not have.
        """
        with self._lock:
            implementing.register(self.manager(), plugin, owner=f"{name or type(plugin).__name__} (registered in this process)", name=name)
            self._offers.clear()

    def unregister_plugin(self, plugin: object) -> None:
        """Remove a plugin that was added with `register_plugin`."""
        with self._lock:
            self.manager().unregister(plugin)
            self._offers.clear()

    def offers(self, hook: str, peft_type: str) -> tuple[Any, ...]:
        """Return all specs that plugins offer through a hook without arguments. The result is cached until a plugin is added or removed.

        Args:
            hook: the name of the hook.
            peft_type: the tuner whose package defines the hook; its plugin is imported first.

        Raises:
            PluginError: as in `resolve`.
        """
        found = self._offers.get(hook)
        if found is None:
            self.resolve(peft_type)
            with self._lock:
                offered = getattr(self.manager().hook, hook)()
                found = self._offers[hook] = tuple(spec for specs in offered for spec in specs)
        return found

    # ---- inside --------------------------------------------------------------------------------------------------
    def _bare_manager(self) -> Any:
        if self._manager is None:
            import pluggy

            from . import hookspecs

            self._manager = pluggy.PluginManager(hookspecs.PROJECT)
            self._manager.add_hookspecs(hookspecs)
            for claim in discovery.claims(discovery.HOOKSPECS):  # hooks that a tuner package defines; their modules are cheap to import
                if discovery.unmet_requirement(claim) is not None:
                    continue  # resolving the package's tuner raises the error
                try:
                    self._manager.add_hookspecs(importlib.import_module(claim.module))
                except Exception as error:
                    warnings.warn(f"the hooks of {claim} can't be read: {type(error).__name__}: {error}", PeftWarning, stacklevel=3)
        return self._manager

    def import_plugin(self, claim: Claim) -> types.ModuleType:
        """Import a plugin's module and register its hooks.

        Raises:
            IncompatiblePluginError, PluginError: as in `resolve`.
        """
        wanted = discovery.unmet_requirement(claim)
        if wanted is not None:
            from .. import __version__

            raise IncompatiblePluginError(
                f"the plugin {claim} requires {wanted!r}, but peft-core {__version__} is running",
                hint=f"pip install -U {claim.distribution} peft-core",
            )
        try:
            module = importlib.import_module(claim.module)
        except Exception as error:
            raise PluginError(
                f"the plugin {claim} (module {claim.module}) can't be imported: {type(error).__name__}: {error}",
                hint=f"reinstall it, or switch it off with PEFT_CORE_PLUGINS=-{claim.distribution}; other tuners are not affected",
            ) from error
        manager = self._bare_manager()
        if not manager.is_registered(module):
            implementing.register(manager, module, owner=str(claim), name=f"{claim.distribution}:{claim.module}")
            self._offers.clear()
        return module

    def _load(self, claim: Claim) -> None:
        if claim.module in self._loading:
            raise PluginError(f"the plugin {claim} asks for its own tuner while it is being imported")
        self._loading.add(claim.module)
        try:
            module = self.import_plugin(claim)
            try:
                offer = getattr(module, "peft_tuners", tuple)
                specs = list(offer())
            except Exception as error:
                raise PluginError(f"peft_tuners() of {claim} failed: {type(error).__name__}: {error}") from error
        finally:
            self._loading.discard(claim.module)
        self._accept(claim, specs)

    def _accept(self, claim: Claim, specs: Iterable[TunerSpec]) -> None:
        specs = list(specs)
        for spec in specs:
            if not isinstance(spec, TunerSpec):
                raise PluginError(f"peft_tuners() of {claim} offers {spec!r}, which is no TunerSpec")
        offered = {spec.peft_type: spec for spec in specs}
        name = claim.name.upper()
        if name not in offered:
            raise PluginError(
                f"the entry point {claim.name!r} of {claim} promises the tuner {name}, but its module {claim.module} offers "
                f"{listed(offered) or 'none'}",
                hint="the entry point's name is the peft_type in lower case",
            )
        # other tuners of the same module are only loaded through their own entry point, so that the package's metadata lists every tuner
        self._loaded[name] = offered[name]

    def _class_of(self, spec: TunerSpec, field: str) -> type:
        given = getattr(spec, field)
        if isinstance(given, type):
            return given
        module, _, attribute = given.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except Exception as error:
            owner = self.owner(spec.peft_type) or "registered in this process"
            raise PluginError(
                f"the {field} class {given!r} of the tuner {spec.peft_type} ({owner}) can't be imported: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(found, type):
            raise PluginError(f"{given!r}, the {field} of the tuner {spec.peft_type}, is no class")
        return found

    def _unknown(self, given: str, name: str) -> UnknownTunerError:
        known = self.names()
        hidden = [claim for claim in discovery.claims(discovery.TUNERS, switched_off=True) if claim.name.upper() == name]
        if hidden:
            return UnknownTunerError(
                f"peft_type={given!r} is offered by {hidden[0]}, which {discovery.SWITCH} switches off",
                hint=f"unset {discovery.SWITCH}, or let it in",
            )
        near = did_you_mean(name, known)
        package = f"peft-{name.lower().replace('_', '-')}"
        install = f"install the package that offers it (by convention `pip install {PACKAGES.get(name, package)}`; check who publishes it)"
        return UnknownTunerError(
            f"no tuner is installed for peft_type={given!r} (known: {listed(known, 20) or 'none'})",
            hint=f"{near} Otherwise {install}" if near else install,
        )


#: used in hints only: peft_type → package of a well-known tuner, if the package is not called `peft-<type>`
PACKAGES = {
    "PROMPT_TUNING": "peft-prompt",
    "PREFIX_TUNING": "peft-prompt",
    "P_TUNING": "peft-prompt",
    "MULTITASK_PROMPT_TUNING": "peft-prompt",
    "CPT": "peft-prompt",
}

registry = Registry()


def list_tuners() -> list[TunerInfo]:
    """Return every tuner that is installed or registered, without importing any of them."""
    return registry.info()


def get_tuner_spec(peft_type: str) -> TunerSpec:
    """Return the spec of a tuner, importing its plugin if that has not happened yet.

    Args:
        peft_type: the name of the method, in upper or lower case.

    Raises:
        UnknownTunerError: no installed or registered tuner has this name.
        DuplicateTunerError, IncompatiblePluginError, PluginError: the tuner can't be used; the message names its distribution.
    """
    return registry.resolve(peft_type)


def register_tuner(spec: TunerSpec, *, replace: bool = False) -> None:
    """Register a tuner in this process without packaging it, for example in a notebook.

    Args:
        spec: the declaration of the tuner.
        replace: replace an existing tuner of the same name.

    Raises:
        DuplicateTunerError: another tuner already has this name, and `replace` is False.
    """
    registry.register(spec, replace=replace)


def unregister_tuner(peft_type: str) -> None:
    """Remove the tuner `peft_type` that was added with `register_tuner`.

    Raises:
        UnknownTunerError: no tuner of this name was registered in this process.
    """
    registry.unregister(peft_type)
