"""A switch for caching DoRA's factors f = m / ‖W + s·B·A‖ in cache scopes."""

from __future__ import annotations

from contextvars import ContextVar, Token

#: whether a cache scope computes DoRA's f = m / ‖W + s·B·A‖ only once
_CACHING: ContextVar[bool] = ContextVar("dora_caching", default=True)


class DoraCaching:
    """Context manager: inside it, open cache scopes (`peft_core.cached`, `generate`) cache DoRA's factors, or, with ``enabled=False``, do not.

    By default they are cached. Outside of a cache scope the factors are computed in each call. The switch applies to the current thread. Calling the
    object, ``caching(enabled=False)``, sets the switch from that point on, without a ``with`` block.

    Args:
        enabled: whether to cache the factors.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = bool(enabled)
        self._tokens: list[Token[bool]] = []

    def __call__(self, enabled: bool = True) -> None:
        """Cache factors in cache scopes from now on, or not (``enabled=False``), until the next call or the end of a surrounding ``with`` block."""
        _CACHING.set(bool(enabled))

    def __enter__(self) -> DoraCaching:
        self._tokens.append(_CACHING.set(self.enabled))
        return self

    def __exit__(self, *error: object) -> None:
        _CACHING.reset(self._tokens.pop())


def caches_dora() -> bool:
    """Return whether cache scopes cache DoRA's factors."""
    return _CACHING.get()
