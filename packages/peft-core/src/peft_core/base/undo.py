"""Roll back the steps that an operation has already done, if the operation fails."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any


class Undo:
    """A stack of undo steps, which run in reverse order if the ``with`` block raises. Steps are plain tuples, since a large model adds thousands.

    Example:
        >>> with Undo() as undo:
        ...     flags.append(1)
        ...     undo.call(flags.pop)
    """

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def call(self, step: Callable[..., Any], *args: Any) -> None:
        """Add the undo step ``step(*args)`` for the change that was just made."""
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

    Each full collection visits every object of the growing model, so without this the time would grow faster than the size of the model.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
