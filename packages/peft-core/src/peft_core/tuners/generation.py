"""The one door into `generate`: an object in the place of the base's `prepare_inputs_for_generation`, from wrapping on.

Outside a `generate` of ours it defers to what it replaced; nothing is swapped per call, so that threads don't meet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from .assemble import assemble
from .call import Call
from .tasks import task_of

if TYPE_CHECKING:
    from .index import AdapterIndex
    from .perform import Undo

METHOD = "prepare_inputs_for_generation"
#: what the base's own preparation says that assembling says anew
_OURS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "past_key_values")


class GenerationDoor:
    """Stands in for the base's method: same signature, holds no closure, so that copies and pickles of the model keep working."""

    def __init__(self, index: AdapterIndex, replaced: Callable[..., Any] | None) -> None:
        self.index = index
        self.replaced = replaced

    @property
    def original(self) -> Callable[..., dict[str, Any]]:
        """The base's own method."""
        if self.replaced is not None:
            return self.replaced
        method: Callable[..., dict[str, Any]] = getattr(type(self.index.base), METHOD).__get__(self.index.base)
        return method

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)  # generate() checks its keywords against it

    def __call__(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        arguments = getattr(self.index.activation.local, "generating", None)
        prepared = self.original(input_ids, *args, **kwargs)
        if arguments is None:
            return prepared
        local = self.index.activation.local
        task = getattr(local, "task", None)
        route = self.index.activation.current()
        call = Call(task, {"input_ids": input_ids}, route, input_ids.shape[0], input_ids.device, arguments=arguments, generating=True)
        for tuner in self.index.speakers:
            call = tuner.prepare(call)
        if call.route is not route:  # facts: for the layers in this step, and for the tuner in the next
            route = local.route = call.route
        if not call.virtual:
            return prepared
        text = {name: prepared[name] for name in ("input_ids", "inputs_embeds", "past_key_values") if prepared.get(name) is not None}
        if prepared.get("use_cache") is False:
            text.pop("past_key_values", None)  # what the last step left: every step starts anew with its own prefix
        # the base may have made a 4-D mask of it already; what we extend is the caller's
        mask = kwargs.get("attention_mask")
        call = Call(task, {**text, "attention_mask": mask}, route, call.batch, call.device, call.virtual, arguments, True)
        inputs = assemble(call, self.index.forward, task_of(task)).inputs
        return {**{name: value for name, value in prepared.items() if name not in _OURS}, **{k: v for k, v in inputs.items() if v is not None}}


def install(index: AdapterIndex, undo: Undo) -> None:
    """Put the door in place if some tuner takes part in calls and the base can generate."""
    base = index.base
    if not index.speakers or not hasattr(type(base), METHOD) or isinstance(base.__dict__.get(METHOD), GenerationDoor):
        return
    before = base.__dict__.get(METHOD)
    base.__dict__[METHOD] = GenerationDoor(index, before)
    undo.call(uninstall, base)


def uninstall(base: nn.Module) -> None:
    """Put back what the door replaced."""
    door = base.__dict__.get(METHOD)
    if isinstance(door, GenerationDoor):
        del base.__dict__[METHOD]
        if door.replaced is not None:
            base.__dict__[METHOD] = door.replaced
