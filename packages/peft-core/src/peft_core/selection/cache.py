"""The cache scope: the only object that stores values computed from weights for longer than one call; they are dropped when the scope ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch

from ..base.plain import is_transformed

T = TypeVar("T")


class CacheScope:
    """A cache of values computed from weights, valid while the scope is open and no peft-core operation has changed a weight.

    A key is a tuple of the objects themselves: (kind, module, adapter or route, dtype, device). The cache keeps references to these objects, so that
    a new object can't take the identity of a freed one.
    """

    __slots__ = ("__weakref__", "_epoch", "_lock", "_values", "closed")

    def __init__(self) -> None:
        self._values: dict[Hashable, Any] = {}
        self._epoch = 0
        self._lock = threading.Lock()
        self.closed = False

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return the value cached under `key`; if there is none, call `compute` without gradients, cache its result and return it."""
        try:
            return cast(T, self._values[key])
        except KeyError:
            pass
        epoch = self._epoch
        # create no inference tensors: the cached value may also be used outside of inference mode
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        with self._lock:
            if epoch == self._epoch and not self.closed:  # else a weight has changed while this was computed
                self._values[key] = value
        return value

    def clear(self) -> None:
        """Drop all values; a value that another thread is computing at this moment will not be cached either."""
        with self._lock:
            self._epoch += 1
            self._values = {}

    def close(self) -> None:
        """Drop all values and cache no further ones."""
        self.closed = True
        self.clear()


def may_cache() -> bool:
    """Return whether values computed now may be cached: False if gradients are enabled, or under compilation, tracing, fake tensors or transforms."""
    return not (torch.is_grad_enabled() or is_transformed())
