"""The stage of a call that is entered only if the call has virtual tokens: assemble, run the base, cut the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..base.forward import BaseForward
from ..errors import CapabilityError
from ..selection.route import EMPTY
from ..tuners.call import Call, Output
from ..tuners.index import AdapterIndex
from ..tuners.tasks import TaskSpec
from . import reuse
from .assembly import assemble
from .caches import PREFIX


def run(index: AdapterIndex, call: Call, base: Callable[..., Output], task: TaskSpec, *, recomputing: bool) -> Output:
    """Run the base with the virtual tokens of a call; the output is that of the caller's tokens, as far as the task says.

    Args:
        index: the adapters.
        call: with the virtual tokens that tuners offered.
        base: the module to call.
        task: decides what happens to labels and outputs.
        recomputing: layers run again in the backward pass.

    Raises:
        RoutingError, CapabilityError: as `assemble`; the base reads no cache.
    """
    if recomputing or index.forward.backbone is not None:
        call = call.telling()  # a route of its own, in which prefixes wait for the layers
    call, first = reuse.shortened(index, call, base)
    with index.selection.use(call.route):  # embedding the text, too, is up to the adapters of its row
        assembled = assemble(call, index.forward, task, recomputing=recomputing)
        output = base(**assembled.inputs)
    if not index.forward.reads_cache:
        check_cache_was_read(index.forward, call, assembled.inputs)
    output = task.cut(output, assembled.lead, assembled.length)
    return output if first is EMPTY else reuse.led_by(output, first, task)


def check_cache_was_read(forward: BaseForward, call: Call, inputs: Mapping[str, Any]) -> None:
    """Check after the first call with keys and values that some layer put its own behind them: if none did, none looked at them.

    Raises:
        CapabilityError: the base's layers read no cache, though its forward takes one.
    """
    if torch.compiler.is_compiling():
        return
    length = sum(tokens.length for tokens in call.virtual if tokens.keys_values is not None)
    cache = inputs.get("past_key_values")
    cache = call.route.context.get(PREFIX) if cache is None else cache
    own: Any = getattr(cache, "self_attention_cache", cache)
    if not length or not hasattr(own, "layers"):
        return
    with_keys = [layer for layer in own.layers if getattr(layer, "keys", None) is not None]
    readers = getattr(own, "readers", None)  # under checkpointing, what layers add is not kept
    if not (any(layer.get_seq_length() > length for layer in with_keys) if readers is None else readers):
        raise CapabilityError(
            "Model does not support past key values which are required for prefix tuning: no layer read those of the prefix",
            hint=f"the layers of {forward.view.name} look at no cache; use a method with virtual embeddings",
        )
    forward.reads_cache = True
