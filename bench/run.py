"""Our packages against the bare base model and the peer (`peft`), in one process.

usage: python bench/run.py [--only CASE[,CASE]] [--quick] [--threads N] [--json FILE] [--markdown]

All timings are interleaved and reported as medians of the ratios within a round, so that a machine that is busy with other things, or
drifts, matters little. Milliseconds are shown for orientation; compare ratios. The peer's adapters are read by us from the file that it
writes, so both compute the same: `max_diff` is the largest difference of the logits.
"""

from __future__ import annotations

import argparse
import os
import platform
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path


def arguments(names: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="CASE[,CASE]", help=f"some of: {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and no model of 2,240 modules")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 is steadiest (default)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rows here")
    parser.add_argument("--markdown", action="store_true", help="print tables at the end")
    given = parser.parse_args()
    given.cases = [name for name in given.only.split(",") if name] or names
    unknown = [name for name in given.cases if name not in names]
    if unknown:
        parser.error(f"--only: there is no case {unknown[0]!r}; there are {', '.join(names)}")
    return given


def main() -> None:
    """Run the cases that were asked for."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")

    import calls
    import structure
    import torch
    from models import PROMPTS, VARIANTS
    from timing import Report

    cases: dict[str, Callable[[Report, bool], None]] = {
        "import": structure.imports,
        "structure": structure.structure,
        "many-adapters": structure.hundredth,
        **{name: partial(calls.layers, name) for name in VARIANTS},
        "mixed-batch": calls.mixed,
        **{name: partial(calls.prompts, name) for name in PROMPTS},
    }
    given = arguments(list(cases))
    torch.set_num_threads(given.threads)
    report = Report(given.json)
    print(f"{platform.platform()}, {os.cpu_count()} cores, {given.threads} thread(s), Python {platform.python_version()}, torch {torch.__version__}")
    for name in given.cases:
        cases[name](report, given.quick)
    if given.markdown:
        print("\n" + report.markdown())


if __name__ == "__main__":
    main()
