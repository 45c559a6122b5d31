"""Plugin that provides LoRA's layers for quantised bases.

It imports neither torch nor a quantisation library: if the base has a layer of a library, the user has imported this library already.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from peft_core.plugins import hookimpl

#: name of a quantisation library → the module of this package that supports it
BACKENDS = {"bitsandbytes": "peft_lora.backends.bitsandbytes", "torchao": "peft_lora.backends.torchao"}
_SHARED = "peft_lora.backends.base"


@hookimpl(trylast=True)  # a plugin may replace one of ours
def peft_make_layer(peft_type: str, base_layer: Any, selection: Any) -> Any | None:
    """Return LoRA's layer for a quantised Linear; None for everything else."""
    if peft_type != "LORA":
        return None
    for library, place in BACKENDS.items():
        if library in sys.modules:
            made = importlib.import_module(place).make(base_layer, selection)
            if made is not None:
                return made
    return importlib.import_module("peft_lora.backends.unknown").make(base_layer, selection)


@hookimpl
def peft_adapter_merged(model: Any) -> None:
    """Warn, once per merge, about the errors from quantising the merged weights again."""
    if _SHARED in sys.modules:
        sys.modules[_SHARED].tell_errors(model)
