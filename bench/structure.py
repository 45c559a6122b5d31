"""Import times, and what changes the structure of a model: adding, saving, loading, switching, deleting, merging."""

from __future__ import annotations

import copy
import gc
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from models import TARGETS, Size, libraries
from timing import Report, ratio, timed

IMPORTS = {
    "nothing": "pass",
    "ours": "import peft_core; peft_core.list_tuners()",
    "our config": "from peft_lora import LoraConfig; LoraConfig(r=8)",
    "our model classes": "from peft_core import PeftModel, get_peft_model; import peft_lora",
    "torch": "import torch",
    "peer": "import peft",
}
STEPS = ("inject", "save", "load", "load_low_cpu", "switch", "status", "delete", "merge_unload")


def imports(report: Report, quick: bool) -> None:
    """Time imports, each in a process of its own; the first round only warms the disk cache."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(4 if quick else 7):
        for name, code in IMPORTS.items():
            seconds[name].append(timed(partial(subprocess.run, [sys.executable, "-c", code], check=True, capture_output=True)))
    for name, values in seconds.items():
        report.row(f"import/{name}", {"s": statistics.median(values[1:]), "over the peer": ratio(values[1:], seconds["peer"][1:])})


def structure(report: Report, quick: bool) -> None:
    """Time each step on models of 140, 560 and 2,240 adapted modules of width 16: the work that does not depend on the width."""
    for layers in (20, 80) if quick else (20, 80, 320):
        modules, base = layers * len(TARGETS), Size(16, layers, 16, 2).make()
        seconds: dict[tuple[str, str], list[float]] = {}
        _steps(libraries()[0], copy.deepcopy(base))  # warms up what is imported on first use
        _steps(libraries()[1], copy.deepcopy(base))
        for number in range(3 if quick or layers > 100 else 7):
            who = list(zip(("ours", "peer"), libraries(), strict=True))
            for name, library in who if number % 2 else reversed(who):
                for step, taken in _steps(library, copy.deepcopy(base)).items():
                    seconds.setdefault((name, step), []).append(taken)
        for step in STEPS:
            ours, peer = seconds["ours", step], seconds["peer", step]
            figures = {f"{name}_us_per_module": statistics.median(values) / modules * 1e6 for name, values in (("ours", ours), ("peer", peer))}
            report.row(f"structure/{step}/{modules} modules", {**figures, "ours/peer": ratio(ours, peer)})


def _steps(library: Any, base: Any) -> dict[str, float]:
    """Return the seconds of each step in the life of adapters on a fresh base."""
    made: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        config = library.LoraConfig(target_modules=TARGETS)
        steps: dict[str, Callable[[], Any]] = {
            "inject": lambda: made.append(library.get_peft_model(base, config)),
            "save": lambda: made[0].save_pretrained(folder),
            "load": lambda: made[0].load_adapter(folder, "second"),
            "load_low_cpu": lambda: made[0].load_adapter(folder, "third", low_cpu_mem_usage=True),
            "switch": lambda: made[0].set_adapter("second"),
            "status": lambda: made[0].get_model_status(),
            "delete": lambda: made[0].delete_adapter("default"),
            "merge_unload": lambda: made[0].merge_and_unload(),
        }
        taken = {}
        for step in STEPS:
            gc.collect()  # nobody pays for the garbage of the step before
            taken[step] = timed(steps[step])
    return taken


def hundredth(report: Report, quick: bool) -> None:
    """Compare adding the 96th to 100th adapter with adding the 2nd to 6th, on 140 modules."""
    count = 40 if quick else 100
    for name, library in zip(("ours", "peer"), libraries(), strict=True):
        model = library.get_peft_model(Size(16, 20, 16, 2).make(), library.LoraConfig(target_modules=TARGETS))
        model.add_adapter("warm", library.LoraConfig(target_modules=TARGETS))  # what is imported on first use
        model.delete_adapter("warm")
        seconds = []
        for number in range(1, count):
            gc.collect()
            seconds.append(timed(partial(model.add_adapter, f"a{number}", library.LoraConfig(target_modules=TARGETS))))
        first, last = statistics.median(seconds[:5]), statistics.median(seconds[-5:])
        report.row(f"many adapters/add/{name}", {"first_ms": first * 1e3, f"{count}th_ms": last * 1e3, "last/first": last / first})
