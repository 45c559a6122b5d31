"""All architectures × all methods: `python tests/architectures/run.py 1/4` for a quarter of them, `--table` to write docs/architectures.md.

Each part writes its results to `.architectures/<transformers>-<part>.json`; the table is made of all that are there.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
FOLDER = ROOT / ".architectures"

import transformers  # noqa: E402

from architectures import building, checking  # noqa: E402


def results(part: int, parts: int, only: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Return architecture → method → what came out; `wrong: …` is a fault."""
    transformers.logging.set_verbosity(logging.CRITICAL)
    found: dict[str, dict[str, str]] = {}
    for number, architecture in enumerate(building.architectures()):
        if (only and architecture.model_type not in only) or (not only and number % parts != part - 1):
            continue
        try:
            make = building.maker(architecture)
        except building.CanNotBuild as error:
            found[str(architecture)] = {"": f"not built: {error}"}
            continue
        row = found[str(architecture)] = {}
        for method in checking.methods_for(architecture):
            try:
                row[method] = checking.check(architecture, make, method)
            except checking.Wrong as error:
                row[method] = f"wrong: {error}"
        print(architecture, {method: what[:160] for method, what in row.items() if what != "right"} or "right", flush=True)
    return found


def table(found: dict[str, dict[str, str]]) -> str:
    """Return the page for the docs."""
    methods = checking.METHODS
    built = {name: row for name, row in found.items() if "" not in row}
    reasons: dict[str, int] = {}
    lines = [f"| class | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"]
    for name in sorted(built):
        lines.append(f"| {name} | {' | '.join(_cell(built[name].get(method), reasons) for method in methods)} |")
    missing = [f"- `{name}`: {row['']}" for name, row in sorted(found.items()) if "" in row]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(
        [
            "# Architectures",
            "",
            f"Each class of transformers {transformers.__version__} of which a tiny model can be made, and each method: forward, a training step,",
            "`generate`, saving, loading and merging, compared with the formula on the bare base. **ok**: right; a number: refused with a typed",
            "error, whose text is below; empty: not for this kind of model. Written by `nox -s architectures -- --table` after its parts.",
            "",
            *lines,
            "",
            "## Why refused",
            "",
            *notes,
            "",
            "## Not built",
            "",
            *missing,
            "",
        ]
    )


def _cell(what: str | None, reasons: dict[str, int]) -> str:
    if what is None or what == "right":
        return "" if what is None else "ok"
    kind, _, reason = what.partition(": ")
    number = reasons.setdefault(reason, len(reasons) + 1)
    return str(number) if kind == "refused" else f"**wrong** {number}"


def main(arguments: Sequence[str]) -> int:
    """Run a part, or write the table; returns the exit status: 1 if a method is wrong somewhere."""
    FOLDER.mkdir(exist_ok=True)
    if "--table" in arguments:
        found: dict[str, Any] = {}
        for path in sorted(FOLDER.glob(f"{transformers.__version__}-*.json")):
            found |= json.loads(path.read_text(encoding="utf-8"))
        (ROOT / "docs" / "architectures.md").write_text(table(found), encoding="utf-8")
        return 0
    part, parts = (int(number) for number in (arguments[0] if arguments else "1/1").split("/"))
    found = results(part, parts, arguments[1:])
    if not arguments[1:]:
        (FOLDER / f"{transformers.__version__}-{part}of{parts}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    wrong = [f"{name}: {method}: {what}" for name, row in found.items() for method, what in row.items() if what.startswith("wrong")]
    print("\n".join([f"{len(found)} classes", *wrong]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
