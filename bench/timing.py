"""How things are timed: interleaved, in rounds, as medians of the ratios within a round."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Figures = dict[str, Any]


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds that one call takes; what it returns is thrown away after the clock has stopped."""
    start = time.perf_counter()
    kept = call()
    seconds = time.perf_counter() - start
    del kept
    return seconds


def best_of(call: Callable[[], Any], batch_s: float) -> float:
    """Return the shortest of as many calls as fit in `batch_s` seconds, at least one: what the machine does else only adds."""
    best, end = float("inf"), time.perf_counter() + batch_s
    while True:
        best = min(best, timed(call))
        if time.perf_counter() >= end:
            return best


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, batch_s: float = 0.03) -> dict[str, list[float]]:
    """Return for each call its best time in each round.

    Args:
        calls: name → what to time. Each is warmed up by two calls.
        rounds: in each, every call has its turn; who begins changes from round to round.
        batch_s: how long a turn lasts at least.
    """
    names = list(calls)
    for call in calls.values():
        call()
        call()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(best_of(calls[name], batch_s))
    return seconds


def ratio(above: Iterable[float], below: Iterable[float]) -> float:
    """Return the median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def compare(calls: dict[str, Callable[[], Any]], rounds: int, batch_s: float = 0.03) -> Figures:
    """Time `ours`, `cached` (ours in a cache scope), `peer` and `base`, those that are given, against one another; return milliseconds and ratios."""
    seconds = interleaved(calls, rounds, batch_s)
    figures: Figures = {f"{name}_ms": statistics.median(values) * 1e3 for name, values in seconds.items()}
    for above, below in (("ours", "base"), ("cached", "base"), ("peer", "base"), ("ours", "peer")):
        if above in seconds and below in seconds:
            figures[f"{above}/{below}"] = ratio(seconds[above], seconds[below])
    return figures


def saved_mib(call: Callable[[], Any], model: nn.Module) -> float:
    """Return how many MiB autograd keeps for the backward pass of `call`, besides the model's own tensors."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []  # alive until the end, so that no address is used twice
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output
    return total / 2**20


class Report:
    """Prints each row as it comes and writes all of them after each, so that a run cut short keeps what it has.

    Args:
        path: a JSON file, or None.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[Figures] = []

    def row(self, case: str, figures: Figures) -> None:
        """Add one row."""
        self.rows.append({"case": case, **figures})
        print(f"{case:46s} " + "  ".join(f"{key}={_text(value)}" for key, value in figures.items()), flush=True)
        if self.path is not None:
            self.path.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")

    def markdown(self) -> str:
        """Return a table for each family of cases: the rows whose figures have the same names."""
        tables: dict[tuple[str, ...], list[str]] = {}
        for row in self.rows:
            names = tuple(row)
            if names not in tables:
                tables[names] = [f"| {' | '.join(names)} |", f"|---{'|---:' * (len(names) - 1)}|"]
            tables[names].append(f"| {' | '.join(_text(value) for value in row.values())} |")
        return "\n\n".join("\n".join(lines) for lines in tables.values())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
