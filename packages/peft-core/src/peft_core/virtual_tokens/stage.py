"""The stage of a call that runs only if the call has virtual tokens: assemble the base's inputs, run the base, cut the output."""

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
    """Run the base with the virtual tokens of a call, and cut the output to the caller's tokens as the task defines.

    Args:
        index: the adapters.
        call: the call, after tuners have added their virtual tokens.
        base: runs the base model.
        task: decides what happens to labels and outputs.
        recomputing: layers run again in the backward pass (activation checkpointing).

    Raises:
        RoutingError: as in `assemble`.
        CapabilityError: as in `assemble`, or the base reads no cache.
    """
    if recomputing or index.forward.backbone is not None:
        call = call.telling()  # copies the route: the prefix is stored in the route's context for the layers, and must be visible in this call only
    call, reused_outputs = reuse.with_reused_keys_values(index, call, base)
    with index.selection.use(call.route):  # includes `assemble`, which embeds the text: adapters may change the embedding layer
        assembled = assemble(call, index.forward, task, recomputing=recomputing)
        output = base(**assembled.inputs)
    if not index.forward.reads_cache:
        check_cache_was_read(index.forward, call, assembled.inputs)
    output = task.cut(output, assembled.lead, assembled.length)
    return output if reused_outputs is EMPTY else reuse.prepend_outputs(output, reused_outputs, task)


def check_cache_was_read(forward: BaseForward, call: Call, inputs: Mapping[str, Any]) -> None:
    """Check, after the first call with a prefix, that a layer of the base used the cache, and set `forward.reads_cache` if so.

    A layer that reads the prefix appends its own keys and values to the cache; if no layer has done this, no layer has read the prefix.

    Raises:
        CapabilityError: the base's layers read no cache, though its forward takes one.
    """
    if torch.compiler.is_compiling():
        return
    length = sum(tokens.length for tokens in call.virtual if tokens.keys_values is not None)
    cache = forward.cache_in(inputs)
    cache = call.route.context.get(PREFIX) if cache is None else cache
    decoder_cache: Any = getattr(cache, "self_attention_cache", cache)
    if not length or not hasattr(decoder_cache, "layers"):
        return
    with_keys = [layer for layer in decoder_cache.layers if getattr(layer, "keys", None) is not None]
    readers = getattr(decoder_cache, "readers", None)  # with checkpointing, the cache does not store appended keys, but records the layers
    if not (any(layer.get_seq_length() > length for layer in with_keys) if readers is None else readers):
        raise CapabilityError(
            "Model does not support past key values which are required for prefix tuning: no layer read those of the prefix",
            hint=f"the layers of {forward.view.name} do not use the cache; use a method with virtual embeddings",
        )
    forward.reads_cache = True
