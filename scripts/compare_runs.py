"""Compare what a script wrote in two environments: numbers may differ by 1e-5, everything else not at all.

python compare_runs.py one.json two.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LIMIT = 1e-5


def differences(one: Any, two: Any, where: str = "") -> list[str]:
    """Return where two results differ."""
    if isinstance(one, dict) and isinstance(two, dict) and set(one) == set(two):
        return [found for key in one for found in differences(one[key], two[key], f"{where}.{key}")]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [found for i, (a, b) in enumerate(zip(one, two, strict=True)) for found in differences(a, b, f"{where}[{i}]")]
    if isinstance(one, float) and isinstance(two, float):
        return [] if abs(one - two) <= LIMIT else [f"{where}: {one} and {two} differ by {abs(one - two):.2e}"]
    return [] if one == two else [f"{where}: {one} and {two}"]


def largest(one: Any, two: Any) -> float:
    """Return the largest difference of two numbers in the same place."""
    if isinstance(one, dict):
        return max((largest(one[key], two[key]) for key in one), default=0.0)
    if isinstance(one, list):
        return max((largest(a, b) for a, b in zip(one, two, strict=True)), default=0.0)
    return abs(one - two) if isinstance(one, float) else 0.0


if __name__ == "__main__":
    left, right = (json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:3])
    found = differences(left, right)
    if found:
        raise SystemExit("\n".join(found))
    print(f"equal; numbers differ by at most {largest(left, right):.1e}")
