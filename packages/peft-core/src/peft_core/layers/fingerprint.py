"""Whether a tensor still has the values from which something was computed and kept."""

from __future__ import annotations

import ctypes

from torch import Tensor


class Watch:
    """Remembers the state of a tensor and says for less than the price of a kernel whether it is still the same.

    In-place operations count in the tensor's version. What is written through `.data` does not; on the CPU the first and the last bytes are
    looked at, so that a tensor that is written as a whole is seen to have changed, whoever wrote it. On other devices nothing but address and
    version tell; layers forget what they keep when they are switched between training and evaluation.

    Args:
        tensor: what to watch. Of tensors that were made in inference mode nothing can be known: they never hold.
        closely: look at the bytes, too.
    """

    __slots__ = ("address", "first", "first_was", "last", "last_was", "version")

    def __init__(self, tensor: Tensor, *, closely: bool = True) -> None:
        self.address = tensor.data_ptr()
        self.version = -1 if tensor.is_inference() or not self.address else tensor._version  # tensors made of others have no address
        self.first = self.last = None
        self.first_was = self.last_was = 0
        if closely and tensor.device.type == "cpu" and tensor.nbytes >= 8 and tensor.is_contiguous():
            self.first = ctypes.c_uint64.from_address(self.address)
            self.last = ctypes.c_uint64.from_address(self.address + tensor.nbytes - 8)
            self.first_was, self.last_was = self.first.value, self.last.value

    def holds(self, tensor: Tensor) -> bool:
        """Return whether `tensor` is where the watched one was, with the same values as far as can be told."""
        # the address comes first: the memory behind an old one may be gone
        if self.version < 0 or tensor.data_ptr() != self.address or tensor._version != self.version:
            return False
        return self.first is None or (self.first.value == self.first_was and self.last.value == self.last_was)  # type: ignore[union-attr]


def fingerprint(tensor: Tensor) -> tuple[int, ...]:
    """Return what a `Watch` looks at, as a key: cheaper to write, dearer to ask. Of tensors made in inference mode no two are equal."""
    watch = Watch(tensor)
    return watch.address, watch.version if watch.version >= 0 else -id(watch), watch.first_was, watch.last_was
