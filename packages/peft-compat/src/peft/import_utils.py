"""Names of `peft.import_utils`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft._libraries: is_bnb_4bit_available is_bnb_available
    """,
)
