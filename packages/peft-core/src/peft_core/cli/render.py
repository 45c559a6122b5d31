"""Converts reports to terminal output. There is one function per command; it uses the same data that `--json` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from .output import Report

_COLOURS = {"ok": "green", "loaded": "green", "available": "green", "registered": "green", "note": "yellow", "skipped": "dim", "off": "dim"}


def _table(*columns: str, rows: Iterable[Sequence[Any]]) -> Table:
    """Return a table without border lines, so that programs can split it into columns."""
    found = [[cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in row] for row in rows]  # Text: no markup
    if not columns[-1] and not any(row[-1].plain for row in found):  # the last column is for remarks: leave it out if it is empty
        columns, found = columns[:-1], [row[:-1] for row in found]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        right = column in ("bytes", "numbers", "count", "seconds", "modules")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in found:
        table.add_row(*row)
    return table


def _state(state: str) -> Text:
    return Text(state, style=_COLOURS.get(state, "bold red"))


def _heading(text: str) -> Text:
    return Text(text, style="bold")


def size(count: int) -> str:
    """Return a number of bytes as text with a unit: ``"12.3 MB"``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def plugins(report: Report) -> Iterator[Any]:
    """Yield the output for a report of `overview.overview`."""
    tuners, others = report["tuners"], report["plugins"]
    if tuners:
        rows = [(t["peft_type"], t["distribution"], t["version"], t["module"], _state(t["state"]), t["detail"]) for t in tuners]
        yield _table("tuner", "distribution", "version", "module", "state", "", rows=rows)
    else:
        yield Text("no tuner is installed")
    if others:
        yield Text()
        rows = [(p["name"], p["distribution"], p["version"], p["module"], _state(p["state"]), p["detail"]) for p in others]
        yield _table("plugin", "distribution", "version", "module", "state", "", rows=rows)
    if report["switch"]:
        yield Text(f"\nPEFT_CORE_PLUGINS={report['switch']}")


def doctor(report: Report, verbose: bool = False) -> Iterator[Any]:
    """Yield the output for a report of `doctor.examine`; `verbose`: with tracebacks."""
    yield _table(
        "environment",
        "version",
        "requires",
        "state",
        rows=[(e["name"], e["version"], e["requires"], _state(e["state"])) for e in report["environment"]],
    )
    yield Text()
    rows = []
    for row in report["plugins"]:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
        rows.append((row.get("peft_type", row["name"]), row["distribution"], row["version"], row["module"], seconds, _state(row["state"])))
    yield _table("plugin", "distribution", "version", "module", "seconds", "state", rows=rows)
    for row in report["plugins"]:
        if row["message"]:
            yield Text(f"\n{row.get('peft_type', row['name'])}: {row['message']}")
            if row["hint"]:
                yield Text(f"  hint: {row['hint']}")
            if verbose and row["traceback"]:
                yield Text(textwrap.indent(row["traceback"].rstrip(), "  "), style="dim")
    faults = report["faults"]
    yield Text(f"\n{'nothing is wrong' if not faults else f'{faults} fault' + ('s' if faults > 1 else '')}")


def inspect(report: Report) -> Iterator[Any]:
    """Yield the output for a report of `inspecting.inspect`."""
    for position, adapter in enumerate(report["adapters"]):
        if position:
            yield Text()
        yield _heading(f"{adapter['name']}: {adapter['peft_type']}, {adapter['installed'] or 'its tuner is not installed'}")
        config = adapter["config"]
        yield Text("\nconfig, where it differs from the defaults" if config["compared"] else "\nconfig (defaults are not known)")
        yield _table("field", "value", rows=[(key, value) for key, value in config["changed"].items()])
        if config["unknown"]:
            yield Text(f"fields that this release does not know: {', '.join(config['unknown'])}")
        yield Text(f"\n{adapter['file']}, {size(adapter['file_bytes'])}")
        rows = [(t["name"], t["dtype"], list(t["shape"]), size(t["bytes"])) for t in adapter["tensors"]]
        yield _table("tensor", "dtype", "shape", "bytes", rows=rows)
        total = adapter["total"]
        yield Text(f"total: {total['tensors']} tensors, {total['numbers']:,} numbers, {size(total['bytes'])}")
        if adapter["writer"]:
            yield Text(f"written by: {adapter['writer']['tuner']}, peft-core {adapter['writer']['core']}")
        if adapter["base"]:
            yield Text(f"base: {adapter['base']['class']}, fingerprint {adapter['base']['fingerprint']}")


def verify(report: Report) -> Iterator[Any]:
    """Yield the output for a report of `verifying.verify`."""
    for adapter in report["adapters"]:
        rows = [(check["check"], _state(check["state"]), check["detail"]) for check in adapter["checks"]]
        yield _heading(adapter["name"])
        yield _table("check", "state", "", rows=rows)


def targets(report: Report) -> Iterator[Any]:
    """Yield the output for a report of `targets.targets`."""
    yield _heading(f"{report['model']}, model_type {report['model_type']}")
    yield Text()
    kinds = [(m["name"], m["kind"], m["count"], ", ".join("x".join(map(str, s)) for s in m["shapes"]), m["example"]) for m in report["modules"]]
    yield _table("name", "kind", "count", "shapes (out x in)", "for example", rows=kinds)
    yield Text(f'\n"all-linear" adapts {report["all_linear"]} modules\n')
    rows = [(t["peft_type"], _names(t["targets"]), t["modules"], t["note"]) for t in report["tuners"]]
    yield _table("tuner", "default targets", "modules", "", rows=rows)


def _names(found: list[str] | str | None) -> str:
    return found if isinstance(found, str) else ", ".join(found or ())


def merge(report: Report) -> Iterator[Any]:
    """Yield the output for a report of `merging.merge`."""
    yield Text(f"{report['model']} with {', '.join(report['merged'])} merged: {report['out']}, {size(report['bytes'])}")
    for name in report["files"]:
        yield Text(f"  {name}")


def convert(report: Report) -> Iterator[Any]:
    """Yield the output for a report of `converting.convert`."""
    for adapter in report["adapters"]:
        renamed = f", {adapter['renamed']} renamed" if adapter["renamed"] else ""
        yield Text(f"{adapter['name']}: {adapter['tensors']} tensors{renamed}, {size(adapter['bytes'])}")
    for name in report["files"]:
        yield Text(f"  {name}")


def new_tuner(report: Report) -> Iterator[Any]:
    """Yield the folder of the new package, and the next command to type."""
    yield Text(report["folder"])
    yield Text(f'next: cd {report["folder"]} && pip install -e ".[test]" && pytest')
