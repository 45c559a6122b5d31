"""What versions of transformers get wrong before they call this package."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from peft_core.errors import PeftWarning
from peft_lora.experts.fused import GATE_UP, widened


def keep_scale_of_experts(config: Any) -> None:
    """Set `alpha_pattern` of a config, in place, where transformers 5.0 to 5.3 doubled the rank of a joint projection of experts and not its alpha.

    They do so when `load_adapter` of a model reads an adapter whose base had one module for each expert. The adapter would act half as much.
    """
    key = rf".*\.{GATE_UP}"
    if not _is_concerned() or (getattr(config, "rank_pattern", None) or {}).get(key) != 2 * getattr(config, "r", 0) or key in config.alpha_pattern:
        return
    config.alpha_pattern = widened(config)["alpha_pattern"]
    warnings.warn(f"alpha_pattern has got {key!r}: this version of transformers doubles the rank there and not alpha", PeftWarning, stacklevel=4)


def _is_concerned() -> bool:
    return str(getattr(sys.modules.get("transformers"), "__version__", "")).startswith(("5.0.", "5.1.", "5.2.", "5.3."))
