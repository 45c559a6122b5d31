"""Names of `peft.tuners.adaption_prompt`."""

from __future__ import annotations

from peft._names import names

__getattr__, __dir__, __all__ = names(
    __name__,
    """
    peft.tuners.adaption_prompt.config: config=*
    peft.tuners.adaption_prompt.utils: utils=*
    """,
    absent="AdaptionPromptConfig AdaptionPromptModel",
)
