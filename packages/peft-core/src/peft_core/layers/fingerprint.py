"""Whether tensors still have the values from which something was computed and kept."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import attrgetter, methodcaller
from typing import Any

from torch import Tensor

_PLACE, _VERSION, _VALUE = methodcaller("data_ptr"), attrgetter("_version"), attrgetter("value")


class Watch:
    """Remembers the state of some tensors and says for less than the price of a kernel whether all are still the same.

    In-place operations count in a tensor's version. What is written through `.data` does not; on the CPU the first and the last bytes of each are
    looked at, so that a tensor that is written as a whole is seen to have changed, whoever wrote it. On other devices nothing but address and
    version tell; layers forget what they keep when they are switched between training and evaluation. All are asked in one go: a decode
    step visits each layer with cold caches, and every object on the way costs.

    Args:
        tensors: what to watch, of whatever shapes. Of tensors that were made in inference mode nothing can be known: they never hold.
    """

    __slots__ = ("places", "versions", "was", "words")

    def __init__(self, *tensors: Tensor) -> None:
        self.places = sum(tensor.data_ptr() for tensor in tensors)
        # tensors made of others have no address
        unknown = any(tensor.is_inference() or (not tensor.data_ptr() and tensor.numel()) for tensor in tensors)
        self.versions = -1 if unknown else sum(tensor._version for tensor in tensors)
        ends = [end for tensor in tensors if tensor.device.type == "cpu" for end in _ends(tensor)]
        self.words = [ctypes.c_uint32.from_address(end) for end in ends]
        self.was = sum(word.value for word in self.words)

    def __reduce__(self) -> Any:
        return _never, ()  # addresses mean nothing to a copy

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether `tensors`, of whatever shapes, are where the watched ones were, with the same values as far as can be told."""
        if self.versions < 0:
            return False
        # the address comes first: the memory behind an old one may be gone
        same: bool = (
            sum(map(_PLACE, tensors)) == self.places and sum(map(_VERSION, tensors)) == self.versions and sum(map(_VALUE, self.words)) == self.was
        )
        return same


def _never() -> Watch:
    """Return one that never holds."""
    watch = Watch()
    watch.versions = -1
    return watch


def _ends(tensor: Tensor) -> list[int]:
    """Return the addresses of the first and the last four bytes, of dense tensors only."""
    first = tensor.data_ptr()
    if not first or tensor.nbytes < 4:
        return []
    dense = tensor.is_contiguous() and tensor.nbytes >= 8
    return [first, first + tensor.nbytes - 4] if dense else [first]


def fingerprint(tensor: Tensor) -> tuple[int, ...]:
    """Return what a `Watch` of `tensor`, of any shape, looks at, as a key: cheaper to write, dearer to ask.

    Keys of tensors made in inference mode are never equal.
    """
    watch = Watch(tensor)
    return watch.places, watch.versions if watch.versions >= 0 else -id(watch), watch.was
