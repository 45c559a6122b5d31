"""Whether upstream peft is installed, too: both provide the module `peft`, and files of one would lie among those of the other."""

from __future__ import annotations

import importlib.metadata


def check() -> None:
    """Raise `ImportError` if a distribution called peft is installed that is not ours."""
    for found in importlib.metadata.distributions(name="peft"):
        if (found.read_text("INSTALLER") or "").strip() == "peft-compat" and not found.read_text("RECORD"):
            continue
        raise ImportError(
            f"peft {found.version} and peft-compat are both installed, and both provide the module `peft`. Keep one: "
            "`pip uninstall -y peft peft-compat`, then `pip install peft-compat` (or `pip install peft`)."
        )
