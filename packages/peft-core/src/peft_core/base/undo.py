"""Undo of what an operation has done so far, when it fails."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any


class Undo:
    """A stack of undo steps, run in reverse when the block fails. Plain tuples: a large model pushes thousands of them.

    Example:
        >>> with Undo() as undo:
        ...     flags.append(1)
        ...     undo.call(flags.pop)
    """

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def call(self, step: Callable[..., Any], *args: Any) -> None:
        """Remember how to undo what was just done."""
        self._steps.append((step, args))

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            for step, args in reversed(self._steps):
                step(*args)
        self._steps.clear()


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the cyclic garbage collector from running inside the block.

    Each of its full runs visits every object of the growing model, so that a model twice as large would take more than twice as long.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
