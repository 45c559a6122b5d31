"""Compare what a script wrote in two environments: a JSON file each, or a folder each.

    python compare_runs.py one two

In JSON files, numbers may differ by 1e-5 and everything else not at all. Two folders have the same file names; `metrics.json` is compared as
above, tensors of .safetensors files may differ by 1e-6, and `adapter_config.json` is equal, apart from the order of names in its lists.
`EXCEPTIONS` has what is compared otherwise in examples/compat, and why.
"""

from __future__ import annotations

import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

NUMBERS = 1e-5
TENSORS = 1e-6
#: of `folder/file: place` (`*` is any text): how far numbers may differ, or None for what is not compared. docs/compat.md has the reasons in full
EXCEPTIONS: dict[str, float | None] = {
    # the peer's principal components come from a randomised decomposition: up to 6.5e-4 from exact ones, where those of ours are within 2e-7
    "eva_init/*.safetensors: *": 2e-3,
    # the peer's prototypes have not converged: losses are up to 3.1e-4 from those of exact ones, where those of ours are within 5e-7
    "arrow_routing/metrics.json: .arrow_losses.*": 1e-3,
    # the peer subtracts the general adapter from A and from B, ours from B·A
    "arrow_routing/metrics.json: .gks_loss": None,
    # a conversion of the peer writes the config of the start anew
    "pissa_conversion/pissa_init/adapter_config.json: .inference_mode": None,
    # with bias="all" the peer writes a saved head's bias three times
    "token_classification/*.safetensors: *.classifier.modules_to_save.bias": None,
    "token_classification/*.safetensors: *.classifier.original_module.bias": None,
}


def limit_of(where: str, otherwise: float) -> float | None:
    """Return how far two numbers may differ, or None where they are not compared."""
    return next((limit for pattern, limit in EXCEPTIONS.items() if fnmatchcase(where, pattern)), otherwise)


def differences(one: Any, two: Any, where: str = "") -> tuple[list[str], float]:
    """Return where two JSON values differ, and the largest difference of two numbers."""
    found: list[str] = []
    worst = 0.0
    if isinstance(one, dict) and isinstance(two, dict) and set(one) == set(two):
        parts = [differences(one[key], two[key], f"{where}.{key}") for key in one]
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        parts = [differences(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, two, strict=True))]
    else:
        limit = limit_of(where, NUMBERS)
        if limit is None:
            return [], 0.0
        if not (isinstance(one, float) and isinstance(two, float)):
            return ([] if one == two else [f"{where}: {one} and {two}"]), 0.0
        wrong = not abs(one - two) <= limit  # NaN, too
        return ([f"{where}: {one} and {two} differ by {abs(one - two):.2e}"] if wrong else []), abs(one - two)
    for wrong_ones, largest in parts:
        found += wrong_ones
        worst = max(worst, largest)
    return found, worst


def tensor_differences(one: Path, two: Path, where: str) -> tuple[list[str], float]:
    """Return where the tensors of two .safetensors files differ, and the largest difference of two numbers."""
    from safetensors.torch import load_file

    left, right = load_file(one), load_file(two)
    found, worst = [], 0.0
    for name in sorted({*left, *right}):
        limit = limit_of(f"{where}{name}", TENSORS)
        if limit is None:
            continue
        if name not in left or name not in right:
            found.append(f"{where}{name}: only in one of the files")
            continue
        a, b = left[name], right[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            found.append(f"{where}{name}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}")
            continue
        difference = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        if not difference <= limit:  # NaN, too
            found.append(f"{where}{name}: differ by {difference:.2e}")
        worst = max(worst, difference)
    return found, worst


def read(path: Path) -> Any:
    """Return what a JSON file holds; of an adapter's config, lists of names in order, each name once: the peer writes sets as they come."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if path.name == "adapter_config.json":
        for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
            if isinstance(found.get(key), list):
                found[key] = sorted(set(found[key]))
    return found


def names_below(folder: Path) -> set[str]:
    """Return the paths of all files in a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def folder_differences(one: Path, two: Path) -> tuple[list[str], float, float]:
    """Return where two folders differ, the largest difference of numbers in their JSON files, and that of tensors."""
    names = names_below(one), names_below(two)
    found = [f"{one.name}/{name}: only in one of the folders" for name in sorted(names[0] ^ names[1])]
    numbers = tensors = 0.0
    for name in sorted(names[0] & names[1]):
        where = f"{one.name}/{name}: "
        if name.endswith(".safetensors"):
            wrong, worst = tensor_differences(one / name, two / name, where)
            tensors = max(tensors, worst)
        elif Path(name).name in ("adapter_config.json", "metrics.json"):
            wrong, worst = differences(read(one / name), read(two / name), where)
            numbers = max(numbers, worst)
        else:
            continue
        found += wrong
    return found, numbers, tensors


def main(one: Path, two: Path) -> None:
    """Compare two files or folders, and leave with an error if they differ.

    Raises:
        SystemExit: they differ.
    """
    if one.is_dir():
        found, numbers, tensors = folder_differences(one, two)
        said = f"{one.name}: numbers differ by at most {numbers:.1e}, tensors by {tensors:.1e}"
    else:
        found, numbers = differences(read(one), read(two))
        said = f"numbers differ by at most {numbers:.1e}"
    if found:
        raise SystemExit("\n".join([*found, said]))
    print(said)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
