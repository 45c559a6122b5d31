"""Run the base once for a call: choose the route, call `prepare` of tuners, run the base (with virtual tokens, if any), call `finish` of tuners."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import RoutingError
from ..selection.route import EMPTY
from ..tuners.call import Call, Output, batch_of
from ..tuners.index import AdapterIndex
from ..tuners.tasks import TaskSpec
from ..virtual_tokens import stage
from . import checkpointing
from .routing import route_for


def forward(
    index: AdapterIndex, base: Callable[..., Output], task: TaskSpec, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[Any] | None
) -> Output:
    """Implement `PeftModel.forward`: call the base with the active adapters.

    Args:
        index: the adapters.
        base: the module to call.
        task: the task of the model.
        args, kwargs: the caller's inputs.
        names: per-sample adapters, or None.
    """
    chosen = index.selection.task_route()
    if chosen is not None:
        with index.selection.use(chosen):
            return run(index, base, task, args, kwargs, names)
    if names is not None or index.call_tuners:
        return run(index, base, task, args, kwargs, names)
    if index.base.training and not torch.compiler.is_compiling():
        checkpointing.prepare(index)  # adapters may be switched before the backward pass
    if index.call_arguments:
        kwargs = {name: value for name, value in kwargs.items() if name not in index.call_arguments}
    return base(*args, **kwargs)


def run(
    index: AdapterIndex, base: Callable[..., Output], task: TaskSpec, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[Any] | None
) -> Output:
    """Run the base with everything that tuners add to the call. The arguments are the same as those of `forward`."""
    inputs = _by_name(index, args, kwargs)
    arguments: Mapping[str, Any] = {name: inputs.pop(name) for name in index.call_arguments if name in inputs} or EMPTY
    known = batch_of(inputs)
    if known is None:
        raise RoutingError("the call has no tensor from which the number of samples could be read", hint="pass input_ids or inputs_embeds")
    batch, device = known
    route = route_for(index, names, batch)
    call = prepared(index, Call(task.name or None, inputs, route, batch, device, arguments=arguments))
    recomputing = checkpointing.prepare(index)
    if call.virtual:
        output = stage.run(index, call, base, task, recomputing=recomputing)
    else:
        with index.selection.use(call.route):
            output = base(**call.inputs)
    for tuner in reversed(index.call_tuners):
        output = tuner.finish(call, output)
    return output


def prepared(index: AdapterIndex, call: Call) -> Call:
    """Return the call after `prepare` of each tuner that takes part in calls; tuners add virtual tokens, and context for their layers."""
    for tuner in index.call_tuners:
        call = tuner.prepare(call)
    return call


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
