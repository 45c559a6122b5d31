"""Run the scripts `run_*.py` twice each, with our `peft` and with the peer, and compare the numbers: `nox -s clients`.

    python bench/clients/compare.py --overlays FOLDER --peer FOLDER            # all clients, as a table in Markdown
    python bench/clients/compare.py --overlays FOLDER --peer FOLDER gliner trl
    python bench/clients/compare.py --overlays FOLDER --peer FOLDER --write    # also puts the rows into docs/clients.md

The environment that runs it has our packages installed in the place of `peft`. `--overlays` holds a folder for each client, with what its
file in `requirements/` lists; `--peer` is a folder with upstream's package, which goes before everything else.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "clients.md"
sys.path.insert(0, str(ROOT / "scripts"))

from compare_runs import differences, largest

#: seconds for one run of a script
PATIENCE = 600
HEAD = ["| client | what was run | numbers compared | largest difference | result |", "|---|---|---|---|---|"]


@dataclass(frozen=True)
class Row:
    """What became of one client."""

    client: str
    text: str
    same: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help="not all of requirements/")
    parser.add_argument("--overlays", type=Path, required=True, help="a folder with a folder for each client")
    parser.add_argument("--peer", type=Path, required=True, help="a folder with upstream's package")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/clients.md")
    options = parser.parse_args()
    known = clients()
    if unknown := set(options.clients) - set(known):
        parser.error(f"no such client: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    rows = [compared(client, options.overlays / client, options.peer) for client in options.clients or known]
    print("\n".join([*HEAD, *(row.text for row in rows)]))
    if options.write:
        PAGE.write_text(with_rows(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return 0 if all(row.same for row in rows) else 1


def clients() -> list[str]:
    """Return the names of all clients."""
    return sorted(file.stem for file in (HERE / "requirements").glob("*.txt"))


def version(client: str) -> str:
    """Return the version of a client that its requirements pin."""
    lines = (HERE / "requirements" / f"{client}.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if not line.startswith("#")).partition("==")[2]


def script(client: str) -> Path:
    """Return the script that drives a client."""
    return HERE / f"run_{client.replace('-', '_')}.py"


def compared(client: str, overlay: Path, peer: Path) -> Row:
    """Run a client with both modules and return its row of the table."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as room:
        ours, theirs = (ran(client, Path(room), which, [*first, overlay]) for which, first in (("ours", []), ("peer", [peer])))
    what = (ast.get_docstring(ast.parse(script(client).read_text(encoding="utf-8"))) or "").partition(": ")[2].rstrip(".")
    result, same, count, difference = verdict(ours, theirs)
    print(f"{client}: {result}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return Row(client, f"| {client} {version(client)} | {what} | {count} | {difference} | {result} |", same)


def ran(client: str, room: Path, which: str, path: list[Path]) -> dict[str, Any]:
    """Return the numbers that a client's script writes with one module, or ``{"error": ...}``."""
    out = room / f"{which}.json"
    # the order of a set of words is a part of what some clients compute
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(folder.resolve()) for folder in path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
    }
    command = [sys.executable, str(script(client)), str(out)]
    try:
        subprocess.run(command, cwd=room, env=environment, check=True, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.CalledProcessError as problem:
        print(f"{client} with {which}:\n{problem.stderr[-4000:]}", file=sys.stderr)
        return {"error": problem.stderr.strip().splitlines()[-1]}
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {PATIENCE} s"}
    written: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if written["peft"] != which:
        raise SystemExit(f"{client} was to run with {which} and ran with {written['peft']}")
    return {"numbers": written["numbers"]}


def verdict(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, bool, int, str]:
    """Return the result in words, whether both are the same, how many numbers were compared, and the largest difference."""
    if "error" in ours or "error" in theirs:
        failed = " and ".join(name for name, one in (("ours", ours), ("the peer", theirs)) if "error" in one)
        return f"**fails with {failed}**: {ours.get('error') or theirs['error']}", False, 0, ""
    found = differences(ours["numbers"], theirs["numbers"])
    if found:
        return f"**differs** in {len(found)} places, first {found[0]}", False, count_of(ours["numbers"]), ""
    return "same", True, count_of(ours["numbers"]), f"{largest(ours['numbers'], theirs['numbers']):.0e}"


def count_of(found: Any) -> int:
    """Return how many values there are in dictionaries and lists inside one another."""
    if isinstance(found, dict | list):
        return sum(count_of(value) for value in (found.values() if isinstance(found, dict) else found))
    return 1


def with_rows(page: str, rows: list[Row]) -> str:
    """Return the page with these rows in its table, in the place of older ones of the same clients."""
    before, _, rest = page.partition("\n".join(HEAD) + "\n")
    lines = rest.splitlines()
    count = next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))
    kept = {line.split()[1]: line for line in lines[:count]}
    kept.update({row.client: row.text for row in rows})
    return before + "\n".join([*HEAD, *(kept[client] for client in sorted(kept)), *lines[count:]]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
