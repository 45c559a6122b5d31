"""Names of `peft.tuners.lokr.layer`."""

from __future__ import annotations

from peft._names import names

_find, __dir__, __all__ = names(__name__, "", absent="LoKrLayer")
__all__ += ["factorization"]


def __getattr__(name: str) -> object:
    return _find(name)


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Return two numbers whose product is `dimension`, as LoKr splits the sides of a weight.

    Args:
        dimension: what to split.
        factor: where it divides `dimension`, the first of the two. Otherwise the answer is the pair (m, n), m <= n, that is nearest to a square
            among those with m <= factor; not positive: without that limit.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = factor if factor > 0 else dimension
    m = next(m for m in range(min(limit, int(dimension**0.5)), 0, -1) if dimension % m == 0)
    return m, dimension // m
