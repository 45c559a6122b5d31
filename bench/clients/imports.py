"""What released packages import from `peft`, read from their files, and whether ours has it.

    python bench/clients/imports.py                     # everything in packages.txt, as a table in Markdown
    python bench/clients/imports.py --absent            # only what ours lacks
    python bench/clients/imports.py --peer FOLDER       # with a column for upstream's package, installed in that folder
    python bench/clients/imports.py --only trl diffusers

Archives are downloaded one after the other with pip, without dependencies, and deleted; the files that mention `peft` are kept in the cache.
`absent.txt` gives the reason for each name that ours has not. A name without one makes the exit status 1.

What can't be seen this way: attributes of instances (`model.base_model.x`), methods that a subclass overrides, keywords of calls, and names that a
package imports from a module of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

from fetch import SkippedError, sources
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from reading import Use, uses

HERE = Path(__file__).resolve().parent
OURS = os.pathsep.join(str(path) for path in sorted((HERE.parents[1] / "packages").glob("peft-*/src")))
#: runs in a process of its own, with one or the other `peft`: reads [module, attributes] pairs and writes what became of each
LOOK_UP = """
import importlib, json, sys, types, warnings
warnings.simplefilter("ignore")

def look_up(module, attributes):
    try:
        found = importlib.import_module(module)
    except ImportError:
        return "absent"
    path, stands_in = module, False
    for part in filter(None, attributes.split(".")):
        path = f"{path}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(path) if isinstance(found, types.ModuleType) else None
            except ImportError:
                found = None
            if found is None:
                return "absent (of a stand-in)" if stands_in else "absent"
        stands_in = stands_in or isinstance(found, type) and (found.__doc__ or "").startswith("Stands for ")
    return "stand-in" if stands_in else "yes"

wanted, answers = json.load(sys.stdin), []
for pair in wanted:
    try:
        answers.append(look_up(*pair))
    except Exception as problem:
        answers.append(f"absent ({type(problem).__name__})")
json.dump(answers, sys.stdout)
"""

#: what a string that starts with `peft.` has to go on with
MODULES = [
    "auto",
    "config",
    "functional",
    "helpers",
    "import_utils",
    "mapping",
    "mapping_func",
    "mixed_model",
    "optimizers",
    "peft_model",
    "tuners",
    "utils",
]

Pair = tuple[str, str]
Release = tuple[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "peft-clients", help="where files that were read are kept")
    parser.add_argument("--limit", type=float, default=150, help="the largest download, in MB (default 150)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PACKAGE", help="not all of packages.txt")
    parser.add_argument("--absent", action="store_true", help="leave out names that ours has")
    parser.add_argument("--every-line", action="store_true", help="a row for each line of a package that uses a name, not for the first one")
    parser.add_argument("--peer", type=Path, help="a folder with upstream's package, to show which names it has")
    options = parser.parse_args()

    found, skipped = gather(releases(options.only), options.cache, options.limit)
    pairs = sorted({(use.module, use.attributes) for of_release in found.values() for use in of_release})
    ours = look_up(pairs, OURS)
    found = {release: [use for use in of_release if not _only_looks_like_one(use, ours)] for release, of_release in found.items()}
    peer = look_up(pairs, str(options.peer.resolve())) if options.peer else {}

    print(f"What {len({name for name, _ in found})} packages ({len(found)} releases) ask of `peft`.\n")
    print(table(found, ours, peer, absent_only=options.absent, every_line=options.every_line))
    for (name, version), reason in sorted(skipped.items()):
        print(f"\nNot read: {name} {version}: {reason}.")
    idle = sorted(" ".join(release) for release, of_release in found.items() if not of_release)
    if idle:
        print(f"\nRead, and nothing of `peft` in it: {', '.join(idle)}.")
    reasons = given_reasons()
    print("\n" + summary(found, ours, peer, reasons))
    names = {use.name for of_release in found.values() for use in of_release if _lacks(ours, use)}
    missing = [name for name in names if not reason_of(name, reasons)]
    if missing:
        print(f"\n{len(missing)} of {len(names)} absent names have no reason in {HERE.name}/absent.txt.")
    return 1 if missing else 0


def releases(only: Iterable[str] = ()) -> list[Release]:
    """Return names and versions of `packages.txt`, in its order; those that were asked for."""
    wanted = {canonicalize_name(name) for name in only}
    found = []
    for line in (HERE / "packages.txt").read_text().splitlines():
        if text := line.partition("#")[0].strip():
            requirement = Requirement(text)
            (pin,) = requirement.specifier
            if not wanted or canonicalize_name(requirement.name) in wanted:
                found.append((requirement.name, pin.version))
    return found


def given_reasons() -> dict[str, str]:
    """Return the lines ``name  reason`` of `absent.txt`; a name may have stars, as in a shell."""
    lines = [line.split(maxsplit=1) for line in (HERE / "absent.txt").read_text().splitlines() if line.strip() and not line.startswith("#")]
    return {parts[0]: parts[1] for parts in lines}


def reason_of(name: str, reasons: Mapping[str, str]) -> str:
    """Return the reason for a name; empty: there is none."""
    return next((reason for pattern, reason in reasons.items() if fnmatchcase(name, pattern)), "")


def gather(wanted: Iterable[Release], cache: Path, limit: float) -> tuple[dict[Release, list[Use]], dict[Release, str]]:
    """Return what each release asks of `peft`, and which were not read and why."""
    found: dict[Release, list[Use]] = {}
    skipped: dict[Release, str] = {}

    def one(release: Release) -> None:
        try:
            found[release] = uses(sources(*release, cache, limit))
        except SkippedError as reason:
            skipped[release] = str(reason)
        print(f"{' '.join(release)}: {skipped.get(release) or len(found[release])}", file=sys.stderr)

    order = list(wanted)
    with ThreadPoolExecutor(max_workers=2) as workers:  # pip waits for the index for most of its time
        list(workers.map(one, order))
    return {release: found[release] for release in order if release in found}, skipped


def look_up(pairs: list[Pair], path: str) -> dict[Pair, str]:
    """Return for each (module, attributes) what there is with this PYTHONPATH: yes, stand-in, or absent."""
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOOK_UP]
    ran = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True, env=environment, check=True)
    return dict(zip(pairs, json.loads(ran.stdout.splitlines()[-1]), strict=True))


def table(found: Mapping[Release, list[Use]], ours: Mapping[Pair, str], peer: Mapping[Pair, str], absent_only: bool, every_line: bool) -> str:
    """Return one row for each name that a release uses, with the first line that does."""
    rows: list[tuple[str, ...]] = [("package", "file:line", "name", "how", "guard", "ours", "peer")]
    for (package, version), of_release in found.items():
        by_name: dict[tuple[str, str], list[Use]] = defaultdict(list)
        for use in of_release:
            if not absent_only or _lacks(ours, use):
                by_name[use.name, f"{use.file}:{use.line}" if every_line else ""].append(use)
        for (name, _), where in sorted(by_name.items()):
            first = min(where, key=lambda use: (bool(use.guard), use))  # the one that would fail first
            pair, more = (first.module, first.attributes), f" and {len(where) - 1} more" if len(where) > 1 else ""
            how = f"{first.how}, in a function" if first.function else first.how
            place = f"`{first.file}:{first.line}`{more}"
            rows.append((f"{package} {version}", place, f"`{name}`", how, _code(first.guard), ours[pair], peer.get(pair, "")))
    return _markdown(rows, columns=7 if peer else 6)


def summary(found: Mapping[Release, list[Use]], ours: Mapping[Pair, str], peer: Mapping[Pair, str], reasons: Mapping[str, str]) -> str:
    """Return the absent names, those first that most packages use."""
    users: dict[str, set[str]] = defaultdict(set)
    loose: dict[str, set[str]] = defaultdict(set)
    at_peer: dict[str, str] = {}
    for (package, _), of_release in found.items():
        for use in of_release:
            if _lacks(ours, use):
                users[use.name].add(package)
                at_peer[use.name] = peer.get((use.module, use.attributes), "")
                if not use.guard and use.how in ("import", "attribute", "super"):
                    loose[use.name].add(package)
    rows: list[tuple[str, ...]] = [("absent name", "packages", "without a guard in", "which", "reason", "peer")]
    for name in sorted(users, key=lambda name: (-len(users[name]), name)):
        numbers = (str(len(users[name])), str(len(loose[name])))
        rows.append((f"`{name}`", *numbers, ", ".join(sorted(users[name])), reason_of(name, reasons), at_peer[name]))
    return _markdown(rows, columns=6 if peer else 5)


def _only_looks_like_one(use: Use, ours: Mapping[Pair, str]) -> bool:
    """Return whether a string like ``"peft.quantization"`` names a setting of the client: nothing of that name is in `peft` at all."""
    first = use.attributes.partition(".")[0]
    return use.how == "string" and ours[use.module, use.attributes] == "absent" and first not in MODULES


def _lacks(ours: Mapping[Pair, str], use: Use) -> bool:
    return ours[use.module, use.attributes].startswith("absent")


def _code(text: str) -> str:
    short = text if len(text) <= 80 else f"{text[:77]}..."
    return f"`{short.replace('|', chr(92) + '|')}`" if text else ""


def _markdown(rows: list[tuple[str, ...]], columns: int) -> str:
    head, *body = [f"| {' | '.join(row[:columns])} |" for row in rows]
    return "\n".join([head, f"|{'---|' * columns}", *body])


if __name__ == "__main__":
    sys.exit(main())
