"""Running the base once for a call: route, prepare, assemble, base, finish. What `PeftModel.forward` and `generate` share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..base.forward import BaseForward
from ..errors import CapabilityError, RoutingError
from ..selection.route import EMPTY
from ..tuners.call import Call, Output, batch_of
from ..tuners.index import AdapterIndex
from ..tuners.tasks import TaskSpec
from ..virtual_tokens import reuse
from ..virtual_tokens.assembly import assemble
from ..virtual_tokens.caches import PREFIX
from . import checkpointing
from .routing import route_for


def run(
    index: AdapterIndex, base: Callable[..., Output], task: TaskSpec, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[Any] | None
) -> Output:
    """Run the base with everything that tuners add to the call.

    Args:
        index: the adapters.
        base: the module to call.
        task: what the model is for.
        args, kwargs: the caller's inputs.
        names: per-sample adapters, or None.
    """
    inputs = _by_name(index, args, kwargs)
    arguments: Mapping[str, Any] = {name: inputs.pop(name) for name in index.call_arguments if name in inputs} or EMPTY
    known = batch_of(inputs)
    if known is None:
        raise RoutingError("the call has no tensor from which the number of samples could be read", hint="pass input_ids or inputs_embeds")
    batch, device = known
    route = route_for(index, names, batch)
    call = Call(task.name or None, inputs, route, batch, device, arguments=arguments)
    call = prepared(index, call)
    recomputing = checkpointing.prepare(index)
    if call.virtual and (recomputing or index.forward.backbone is not None):
        call = call.telling()  # a route of its own, in which prefixes wait for the layers
    call, first = reuse.shortened(index, call, base)
    with index.selection.use(call.route):  # embedding the text, too, is up to the adapters of its row
        assembled = assemble(call, index.forward, task, recomputing=recomputing)
        output = base(**assembled.inputs)
    if not index.forward.reads_cache:
        check_cache_was_read(index.forward, call, assembled.inputs)
    output = task.cut(output, assembled.lead, assembled.length)
    if first is not EMPTY:
        output = reuse.led_by(output, first, task)
    for tuner in reversed(index.call_tuners):
        output = tuner.finish(call, output)
    return output


def prepared(index: AdapterIndex, call: Call) -> Call:
    """Return the call with what the tuners add that take part in calls: virtual tokens, and context for their layers."""
    for tuner in index.call_tuners:
        call = tuner.prepare(call)
    return call


@contextlib.contextmanager
def generating(index: AdapterIndex, task: TaskSpec, names: Sequence[Any] | None, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Let the hook see this thread's steps of `generate` as ours, until the block ends."""
    local = index.selection.local
    before = getattr(local, "generating", None), getattr(local, "task", None)
    route = route_for(index, names)
    local.generating, local.task = arguments, task.name or None
    try:
        with index.selection.use(route):
            yield
    finally:
        local.generating, local.task = before


def _by_name(index: AdapterIndex, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return dict(kwargs)
    names = index.forward.parameters
    if len(args) > len(names):
        raise TypeError(f"{index.view.name}.forward takes {len(names)} positional arguments, but {len(args)} were given")
    twice = [name for name in names[: len(args)] if name in kwargs]
    if twice:
        raise TypeError(f"{index.view.name}.forward got {twice[0]!r} both by position and by name")
    return {**dict(zip(names, args, strict=False)), **kwargs}


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
    readers = getattr(own, "readers", None)  # under checkpointing, what layers add is not kept
    if not (any(layer.get_seq_length() > length for layer in own.layers) if readers is None else readers):
        raise CapabilityError(
            "Model does not support past key values which are required for prefix tuning: no layer read those of the prefix",
            hint=f"the layers of {forward.view.name} look at no cache; use a method with virtual embeddings",
        )
    forward.reads_cache = True
