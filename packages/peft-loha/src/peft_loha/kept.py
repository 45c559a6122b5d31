"""A matrix that was computed from others and holds until one of them changes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Kept:
    """What was computed from `sources` and a number; nothing in copies and pickles.

    What `peft_core.fingerprint` looks at, asked in a tenth of the time: place and version of each source, and on the CPU its first and last
    eight bytes, which tell that it was written through `.data`.

    Attributes:
        matrix: the result; None until it is worth its memory.
    """

    def __init__(self, sources: Sequence[Tensor] = (), number: float = 0.0) -> None:
        self.matrix: Tensor | None = None
        self.number = number
        usable = not any(source.is_inference() for source in sources)  # no versions
        self.marks = [(source.data_ptr(), source._version, _words(source)) for source in sources] if usable else []

    def holds(self, sources: Sequence[Tensor], number: float) -> bool:
        """Return whether the same sources still have the values that they had."""
        if number != self.number or len(sources) != len(self.marks):
            return False
        try:
            for source, (address, version, words) in zip(sources, self.marks, strict=True):
                if source.data_ptr() != address or source._version != version:
                    return False
                for word, value in words:
                    if word.value != value:
                        return False
        except RuntimeError:  # a source has become an inference tensor
            return False
        return True

    def __reduce__(self) -> Any:
        return (Kept, ())


def _words(source: Tensor) -> tuple[tuple[ctypes.c_uint64, int], ...]:
    if source.device.type != "cpu" or source.nbytes < 8 or not source.is_contiguous():
        return ()
    start = source.data_ptr()
    words = [ctypes.c_uint64.from_address(address) for address in (start, start + source.nbytes - 8)]
    return tuple((word, word.value) for word in words)
