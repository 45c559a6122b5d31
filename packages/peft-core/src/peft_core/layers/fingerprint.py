"""Whether a tensor still has the values from which something was computed and kept."""

from __future__ import annotations

import ctypes

from torch import Tensor


def fingerprint(tensor: Tensor) -> tuple[int, ...]:
    """Return numbers that change when a tensor's values do, for less than the price of a kernel.

    In-place operations count in the tensor's version. What is written through `.data` does not; on the CPU the first and the last bytes are
    looked at, so that a tensor that is written as a whole is seen to have changed, whoever wrote it. On other devices nothing but the version
    tells; switching between training and evaluation forgets what layers keep.
    """
    address = tensor.data_ptr()
    version = 0 if tensor.is_inference() else tensor._version
    size = tensor.nbytes
    if tensor.device.type != "cpu" or size < 8 or not tensor.is_contiguous():
        return address, version
    read = ctypes.c_uint64.from_address
    return address, version, read(address).value, read(address + size - 8).value
