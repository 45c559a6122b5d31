"""`peft-core plugins`: lists installed plugins, using only their package metadata; imports neither plugins nor torch."""

from __future__ import annotations

import os
from typing import Any

from .. import __version__
from ..plugins import discovery, list_tuners, registry
from ..plugins.discovery import Claim
from .output import Report

WRONG = ("broken", "conflict", "incompatible")


def overview() -> Report:
    """Return every tuner and general plugin with its state, including plugins that are switched off.

    The states are those of `TunerInfo`, and ``"incompatible"`` (requires another peft-core) and ``"off"`` (excluded by `PEFT_CORE_PLUGINS`).
    """
    tuners = _tuners()
    plugins = [_row(claim, *_state(claim)) for claim in discovery.claims(discovery.PLUGINS)]
    tuners += [{"peft_type": c.name.upper(), **_row(c, "off")} for c in discovery.claims(discovery.TUNERS, switched_off=True)]
    plugins += [_row(claim, "off") for claim in discovery.claims(discovery.PLUGINS, switched_off=True)]
    return {
        "ok": not any(row["state"] in WRONG for row in (*tuners, *plugins)),
        "peft_core": __version__,
        "switch": os.environ.get(discovery.SWITCH),
        "tuners": tuners,
        "plugins": plugins,
    }


def _tuners() -> list[dict[str, Any]]:
    found = []
    for info in list_tuners():
        claims = registry.claims().get(info.peft_type, [])
        claim = next((c for c in claims if c.distribution == info.distribution), None)
        if claim is None:  # registered in this process
            claim = Claim(info.peft_type.lower(), info.module, info.distribution, info.version, ())
        state, detail = info.state, str(info.error or "")
        if state == "conflict":
            detail = f"also offered by {', '.join(str(other) for other in claims if other is not claim)}"
        elif state == "available":
            state, detail = _state(claim)
        found.append({"peft_type": info.peft_type, **_row(claim, state, detail)})
    return found


def _state(claim: Claim) -> tuple[str, str]:
    wanted = discovery.unmet_requirement(claim)
    return ("available", "") if wanted is None else ("incompatible", f"requires {wanted!r}, but peft-core {__version__} is running")


def _row(claim: Claim, state: str, detail: str = "") -> dict[str, Any]:
    return {
        "name": claim.name,
        "distribution": claim.distribution,
        "version": claim.version,
        "module": claim.module,
        "state": state,
        "detail": detail,
    }
