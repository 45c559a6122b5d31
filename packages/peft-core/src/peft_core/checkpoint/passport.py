"""Metadata of a weight file: its writer and its base. Other readers ignore it."""

from __future__ import annotations

import hashlib

from .. import __version__
from ..base.view import BaseView
from ..plugins import registry


def passport(peft_type: str, view: BaseView) -> dict[str, str]:
    """Return the metadata of a weight file: its format, the tuner's distribution, and what the base looked like."""
    owner = registry.owner(peft_type)
    return {
        "format": "pt",
        "peft_core": __version__,
        "peft_tuner": str(owner) if owner else f"{peft_type} (registered in the process)",
        "peft_base": f"{view.name} {fingerprint(view)}",
    }


def fingerprint(view: BaseView) -> str:
    """Return 16 hex digits for the names and shapes of the base's parameters; its values play no part."""
    digest = hashlib.sha256()
    for path, module in view.modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                digest.update(f"{path}.{name}:{tuple(parameter.shape)};".encode())
    return digest.hexdigest()[:16]
