"""Whether a cache scope may hold DoRA's factors."""

from __future__ import annotations

from contextvars import ContextVar, Token

#: whether DoRA's f = m / ‖W + s·B·A‖ is computed once in a cache scope
_CACHING: ContextVar[bool] = ContextVar("dora_caching", default=True)


class DoraCaching:
    """Inside the block, an open cache scope (`peft_core.cached`, `generate`) holds DoRA's factors, or, with ``enabled=False``, does not.

    It does anyway; outside of a scope they are computed in each call. Holds for the current thread. Calling the object, ``caching(enabled=False)``,
    switches from there on, without a block.

    Args:
        enabled: keep them.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = bool(enabled)
        self._tokens: list[Token[bool]] = []

    def __call__(self, enabled: bool = True) -> None:
        """Keep factors in cache scopes from now on, or, with ``enabled=False``, do not: until the next call, or the end of a block around it."""
        _CACHING.set(bool(enabled))

    def __enter__(self) -> DoraCaching:
        self._tokens.append(_CACHING.set(self.enabled))
        return self

    def __exit__(self, *error: object) -> None:
        _CACHING.reset(self._tokens.pop())


def caches_dora() -> bool:
    """Return whether a cache scope may hold DoRA's factors."""
    return _CACHING.get()
