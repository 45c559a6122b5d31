"""Names of `peft.tuners.adaption_prompt.config`."""

from __future__ import annotations

from typing import Any

from peft._names import names

#: model type → what the method needs to know of it: nothing, since the method is not installed
TRANSFORMERS_MODEL_CONFIG: dict[str, Any] = {}

__getattr__, __dir__, __all__ = names(__name__, "", absent="AdaptionPromptConfig")
