"""The command line of peft-core. Imports neither torch nor a tuner."""

from __future__ import annotations

import importlib
import sys

NEEDED = ("typer", "rich")


def main() -> int:
    """Run the command `peft-core`; the exit status."""
    try:
        for name in NEEDED:
            importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in NEEDED:
            raise
        print(f'the command peft-core needs {error.name}: pip install "peft-core[cli]"', file=sys.stderr)
        return 2
    from .app import app

    app()
    return 0
