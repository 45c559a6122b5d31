"""`peft-core doctor`: imports every plugin and reports faults, and the time that each import took."""

from __future__ import annotations

import importlib
import platform
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import Any

from .. import __version__
from ..errors import DuplicateTunerError, IncompatiblePluginError, PeftError, PluginError
from ..plugins import discovery, registry
from ..plugins.discovery import Claim
from .output import Report
from .overview import overview

#: limit for the import time in seconds; a plugin module without torch takes milliseconds, one that imports torch takes longer than this limit
SLOW = 1.0


def examine() -> Report:
    """Import every plugin and return the report, with the environment and the state of each plugin.

    The state is ``"ok"``, ``"broken"``, ``"conflict"``, ``"incompatible"``, ``"slow-import"`` or ``"off"``.
    """
    for name in ("pluggy", "packaging.requirements"):  # imported first, so that the time for core's own dependencies is not counted for a plugin
        importlib.import_module(name)
    found = [_listener(claim) for claim in discovery.claims(discovery.PLUGINS)]
    offers = [(peft_type, claim) for peft_type, claims in sorted(registry.claims().items()) for claim in claims]
    tuners = [_tuner(peft_type, claim) for peft_type, claim in offers]
    environment = _environment()
    for row in tuners:  # after all timings: this imports torch, and a plugin timed later would find it already imported
        if row["state"] in ("ok", "slow-import"):
            _import_classes(row)
    listed = overview()
    off = [{**row, "seconds": None, "message": "", "hint": None, "traceback": None} for row in (*listed["tuners"], *listed["plugins"])]
    rows = [*tuners, *found, *(row for row in off if row["state"] == "off")]
    wrong = [row for row in rows if row["state"] not in ("ok", "off")] + [row for row in environment if row["state"] != "ok"]
    return {"ok": not wrong, "faults": len(wrong), "environment": environment, "plugins": rows}


def _tuner(peft_type: str, claim: Claim) -> dict[str, Any]:
    return {"peft_type": peft_type, **_examined(claim, lambda: registry.resolve(peft_type))}


def _listener(claim: Claim) -> dict[str, Any]:
    return _examined(claim, lambda: registry.import_plugin(claim))


def _examined(claim: Claim, load: Callable[[], object]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": claim.name,
        "distribution": claim.distribution,
        "version": claim.version,
        "module": claim.module,
        "state": "ok",
        "seconds": None,
        "message": "",
        "hint": None,
        "traceback": None,
    }
    begun = time.perf_counter()
    _guarded(row, load)
    row["seconds"] = round(time.perf_counter() - begun, 3)
    if row["state"] == "ok" and row["seconds"] > SLOW:
        row["state"] = "slow-import"
        row["message"] = f"importing {claim.module} takes {row['seconds']:.1f} s"
        row["hint"] = "in the plugin's module, write classes as 'package.module:Class', and do not import torch"
    return row


def _guarded(row: dict[str, Any], step: Callable[[], object]) -> None:
    """Run one check and record any exception, including SystemExit, in `row`."""
    try:
        step()
    except PeftError as error:
        states: dict[type[PeftError], str] = {DuplicateTunerError: "conflict", IncompatiblePluginError: "incompatible"}
        row["state"], row["message"], row["hint"] = states.get(type(error), "broken"), error.message, error.hint
        row["traceback"] = "".join(traceback.format_exception(error.__cause__ or error))
    except (Exception, SystemExit) as error:  # a module that calls sys.exit() must not end the examination of the others
        row["state"], row["message"] = "broken", f"{type(error).__name__}: {error}"
        row["traceback"] = "".join(traceback.format_exception(error))


def _import_classes(row: dict[str, Any]) -> None:
    from ..config import PeftConfig

    def classes() -> None:
        if not issubclass(registry.config_class(row["peft_type"]), PeftConfig):
            raise PluginError(f"the config class of {row['peft_type']} is no subclass of PeftConfig")
        from ..tuners.tuner import TunerBase

        if not issubclass(registry.tuner_class(row["peft_type"]), TunerBase):
            raise PluginError(f"the tuner class of {row['peft_type']} is no subclass of TunerBase")

    _guarded(row, classes)


def _environment() -> list[dict[str, Any]]:
    """Return rows for Python, peft-core and each requirement of peft-core, with version and state."""
    from packaging.requirements import Requirement

    rows = [{"name": "python", "version": platform.python_version(), "requires": "", "state": "ok"}]
    rows.append({"name": "peft-core", "version": __version__, "requires": "", "state": "ok"})
    for requirement in map(Requirement, _requirements()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
            state = "ok" if requirement.specifier.contains(version, prereleases=True) else "incompatible"
        except metadata.PackageNotFoundError:
            version, state = "", "missing"
        rows.append({"name": requirement.name, "version": version, "requires": str(requirement.specifier), "state": state})
    return rows


def _requirements() -> list[str]:
    try:
        return metadata.requires("peft-core") or []
    except metadata.PackageNotFoundError:  # peft-core runs from a source tree and is not installed
        return ["torch", "transformers"]
