"""Prints reports as text or JSON, prints warnings and errors, and determines exit codes."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import PeftError

OK, FAULTS, REFUSED, CRASHED = 0, 1, 2, 3

#: plain data that `--json` prints; with ``"ok": False`` the exit code is `FAULTS`
Report = dict[str, Any]
#: output width in columns if stdout is not a terminal: tables wrapped at 80 columns would be hard to search with grep
PIPE_WIDTH = 160


def run(work: Callable[[], Report], render: Callable[[Report], Iterable[Any]], *, as_json: bool) -> int:
    """Call `work`, print its report, and return the exit code.

    Args:
        work: returns the report; everything that it or a plugin prints is redirected to stderr.
        render: converts a report to objects that rich can print.
        as_json: print the report as JSON, and nothing else, to stdout.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                report = work()
            finally:
                for text in dict.fromkeys(str(warning.message) for warning in caught):
                    print(f"warning: {text}", file=sys.stderr)
    except PeftError as error:
        return _refuse(error.message, error.hint, error.code, as_json)
    except OSError as error:
        return _refuse(f"{type(error).__name__}: {error}", None, "os", as_json)
    except Exception:
        traceback.print_exc()
        print("this is a fault of peft-core or of a plugin, not of what you typed", file=sys.stderr)
        return CRASHED
    if as_json:
        _print_json(report)
    else:
        _print(render(report))
    return OK if report.get("ok", True) else FAULTS


def progress_wanted(as_json: bool) -> bool:
    """Return whether to show progress: only if stderr is a terminal and the output is not JSON."""
    return not as_json and sys.stderr.isatty()


def _refuse(message: str, hint: str | None, code: str, as_json: bool) -> int:
    if as_json:
        _print_json({"ok": False, "error": {"code": code, "message": message, "hint": hint}})
    else:
        print(f"error: {message}", file=sys.stderr)
        if hint:
            print(f"hint: {hint}", file=sys.stderr)
    return REFUSED


def _print_json(report: Report) -> None:
    sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n")


def _print(parts: Iterable[Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        for part in parts:
            console.print(part)
        return
    console = Console(width=PIPE_WIDTH, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    for line in captured.get().splitlines():  # rich pads lines with spaces
        print(line.rstrip())
