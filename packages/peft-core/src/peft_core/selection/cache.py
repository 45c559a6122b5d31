"""The cache scope: the only object in which values computed from weights outlive a call, and only until the scope ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch

from ..base.plain import is_transformed

T = TypeVar("T")


class CacheScope:
    """Values computed from weights, by key; valid while the scope is open and no operation of ours has changed a weight.

    Keys are written out: (kind, module, adapter or route, dtype, device). A key holds its objects alive, so that none can be mistaken for another.
    """

    __slots__ = ("__weakref__", "_epoch", "_lock", "_values", "closed")

    def __init__(self) -> None:
        self._values: dict[Hashable, Any] = {}
        self._epoch = 0
        self._lock = threading.Lock()
        self.closed = False

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return the value under `key`; if there is none, what `compute` returns, called without gradients."""
        try:
            return cast(T, self._values[key])
        except KeyError:
            pass
        epoch = self._epoch
        # no inference tensors: a scope may be entered again outside of inference mode
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        with self._lock:
            if epoch == self._epoch and not self.closed:  # else a weight has changed while this was computed
                self._values[key] = value
        return value

    def clear(self) -> None:
        """Drop all values; what another thread is computing right now is not put in."""
        with self._lock:
            self._epoch += 1
            self._values = {}

    def close(self) -> None:
        """Drop all values and take no more."""
        self.closed = True
        self.clear()


def may_cache() -> bool:
    """Return whether values computed now are real and need no gradient: not under gradients, compilation, tracing, fake tensors or transforms."""
    return not (torch.is_grad_enabled() or is_transformed())
