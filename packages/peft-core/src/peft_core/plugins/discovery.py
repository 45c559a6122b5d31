"""Reads the entry points of the installed distributions from their package metadata. Does not import any plugin."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import importlib_metadata as metadata

TUNERS = "peft_core.tuners"
PLUGINS = "peft_core.plugins"
HOOKSPECS = "peft_core.hookspecs"
SWITCH = "PEFT_CORE_PLUGINS"


@dataclass(frozen=True)
class Claim:
    """One entry point: its name, the module that it refers to, and the distribution that declares it."""

    name: str
    module: str
    distribution: str
    version: str
    requires_core: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


def claims(group: str, *, switched_off: bool = False) -> Iterator[Claim]:
    """Yield the entry points of `group`, each once, in the order of the import path.

    Yields the entry points of those distributions that `allowed` permits; with `switched_off`, those of all other distributions.
    """
    seen: set[tuple[str, str]] = set()
    for point in metadata.entry_points(group=group):
        dist = point.dist
        about = _metadata(dist)
        distribution = about.get("Name") or "unknown"
        # an editable install and an outdated copy on the import path can declare the same entry point twice
        if (point.name, _normal(distribution)) in seen or allowed(distribution) is switched_off:
            continue
        seen.add((point.name, _normal(distribution)))
        requires = tuple(r for r in (dist.requires or ()) if _normal(r).startswith("peft-core")) if about else ()
        yield Claim(point.name, point.value, distribution, about.get("Version") or "?", requires)


def _metadata(dist: Any) -> Mapping[str, str]:
    """Return the metadata fields of a distribution (`Name`, `Version`, …); empty if an incomplete uninstall left entry points without metadata."""
    try:
        return {} if dist is None or dist.metadata is None else dict(dist.metadata.items())
    except FileNotFoundError:
        return {}


def allowed(distribution: str) -> bool:
    """Return whether the environment variable `PEFT_CORE_PLUGINS` allows plugins of this distribution.

    Unset: all are allowed. ``none``: no plugin. ``a,b``: only these distributions. ``-a``: all except this one.
    """
    words = [_normal(word) for word in os.environ.get(SWITCH, "").replace(",", " ").split()]
    if "none" in words:
        return False
    name = _normal(distribution)
    wanted = {word for word in words if not word.startswith("-")}
    return f"-{name}" not in words and (not wanted or name in wanted)


def unmet_requirement(claim: Claim) -> str | None:
    """Return the requirement on peft-core that the plugin declares, if the running version does not satisfy it; otherwise None."""
    if not claim.requires_core:
        return None
    from packaging.requirements import InvalidRequirement, Requirement

    from .. import __version__

    for text in claim.requires_core:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if _normal(requirement.name) != "peft-core" or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        if not requirement.specifier.contains(__version__, prereleases=True):
            return text
    return None


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")
