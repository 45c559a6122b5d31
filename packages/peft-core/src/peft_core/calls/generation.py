"""`PeftModel.generate`, and the hook that adds virtual tokens to its steps.

The hook is an object that replaces the base's `prepare_inputs_for_generation` when the model is wrapped. Outside `PeftModel.generate`, the hook calls
the method that it replaced. Nothing is replaced per call, so that threads do not interfere with each other.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..base import cache_name
from ..base.undo import Undo
from ..errors import CapabilityError, MissingMethodError, PeftWarning, RoutingError
from ..tuners.call import Call, Site, batch_of
from ..tuners.index import AdapterIndex
from ..tuners.tasks import TaskSpec, task_of
from ..virtual_tokens import reuse
from ..virtual_tokens.assembly import assemble
from ..virtual_tokens.caches import decoder_config, has_begun, newer
from ..virtual_tokens.encoder_decoder import encoder_inputs
from .routing import route_for
from .run import prepared

METHOD = "prepare_inputs_for_generation"
#: inputs that the base's `prepare_inputs_for_generation` returns and that the assembly of virtual tokens computes again
_OURS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", *cache_name.NAMES)
_OURS_OF_TWO = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "cache_position", *cache_name.NAMES)


def generate(index: AdapterIndex, task: TaskSpec, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[Any] | None) -> Any:
    """Implement `PeftModel.generate`: run the base's `generate` with the active adapters, in a cache scope of this thread.

    Args:
        index: the adapters.
        task: the task of the model.
        args, kwargs: arguments of the base's `generate`; `kwargs` may also contain the arguments that tuners take from a call.
        names: per-sample adapters, or None.

    Raises:
        AdapterNotFoundError, CapabilityError, RoutingError: the adapters in `names` can't be used for this call.
        MissingMethodError: the base has no method `generate`.
    """
    base: Any = index.base
    if not hasattr(base, "generate"):
        raise MissingMethodError(f"{type(base).__name__} can't generate", hint="use a model with a language-modelling head")
    chosen = index.selection.task_route()
    with contextlib.nullcontext() if chosen is None else index.selection.use(chosen), index.selection.cached(thread=True):
        arguments = {name: kwargs.pop(name) for name in index.call_arguments if name in kwargs}
        if names is None and not index.call_tuners:
            return base.generate(*args, **kwargs)
        if names is not None:
            given = (*args[:1], *(kwargs[name] for name in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(name) is not None))
            if given and isinstance(given[0], Tensor):
                route_for(index, names, given[0].shape[0])  # checks the length
        with generating(index, task, names, arguments):
            check_assisted(index, task, arguments, kwargs)
            check_chunks(index, task, arguments, kwargs)
            if index.forward.encoder_decoder:
                args, kwargs = encoder_arguments(index, task, arguments, args, kwargs)
            try:
                return base.generate(*args, **kwargs)
            finally:
                base.__dict__.pop("_cache", None)  # older transformers versions reuse a static cache, which virtual tokens made larger


@contextlib.contextmanager
def generating(index: AdapterIndex, task: TaskSpec, names: Sequence[Any] | None, arguments: Mapping[str, Any]) -> Iterator[None]:
    """For the duration of the block, let the hook add virtual tokens to the steps of `generate` in this thread, with the adapters `names`."""
    local = index.selection.local
    before = getattr(local, "generating", None), getattr(local, "task", None)
    route = route_for(index, names)
    local.generating, local.task = arguments, task.name or None
    try:
        with index.selection.use(route):
            yield
    finally:
        local.generating, local.task = before


class GenerationHook:
    """Replaces the base's `prepare_inputs_for_generation`. It has the same signature, and no closure, so that the model can be copied and pickled."""

    def __init__(self, index: AdapterIndex, replaced: Callable[..., Any] | None) -> None:
        self.index = index
        self.replaced = replaced

    @property
    def original(self) -> Callable[..., dict[str, Any]]:
        """The method `prepare_inputs_for_generation` that this object replaces."""
        if self.replaced is not None:
            return self.replaced
        method: Callable[..., dict[str, Any]] = getattr(type(self.index.base), METHOD).__get__(self.index.base)
        return method

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)  # generate() checks its keyword arguments against this signature

    def __call__(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        index, local = self.index, self.index.selection.local
        arguments = getattr(local, "generating", None)
        if arguments is None:  # the base's `generate` was called directly, not `PeftModel.generate`
            return self.original(input_ids, *args, **kwargs)
        route, task = index.selection.current(), getattr(local, "task", None)
        call = Call(task, {"input_ids": input_ids}, route, input_ids.shape[0], input_ids.device, arguments=arguments, generating=True)
        call = prepared(index, call)
        if call.route is not route:  # the new route carries context for the layers in this step, and for the tuner in the next step
            local.route = call.route
        two = index.forward.encoder_decoder
        virtual = sum(tokens.length for tokens in call.virtual if not two or tokens.site is Site.DECODER)
        if not virtual:  # virtual tokens before the encoder's text were added before the first step
            return self.original(input_ids, *args, **kwargs)
        given = self.original(input_ids, *args, **_continuing(input_ids, kwargs, virtual))
        return _step(index, call, given, kwargs.get("decoder_attention_mask" if two else "attention_mask"))


def _continuing(input_ids: Tensor, kwargs: dict[str, Any], virtual: int) -> dict[str, Any]:
    """Return the arguments of a step, corrected such that virtual tokens in the caller's cache do not count as tokens of the text.

    A cache that an earlier call of `generate` returned also contains virtual tokens, and transformers counts them as tokens of the text. It would
    therefore pass too few of the new tokens to the model.

    Args:
        input_ids: token ids of the whole text so far (batch, tokens).
        kwargs: keyword arguments of the base's `prepare_inputs_for_generation`.
        virtual: number of virtual tokens at the beginning of a cache.
    """
    cache = cache_name.given_in(kwargs)
    cached = 0 if cache is None else int(cache.get_seq_length())
    if cached < virtual or kwargs.get("use_cache") is False:
        return kwargs
    embedded = kwargs.get("inputs_embeds") if kwargs.get("is_first_iteration") or not input_ids.shape[1] else None
    length = input_ids.shape[1] if embedded is None else embedded.shape[1]
    changed = dict(kwargs)
    if kwargs.get("next_sequence_length") == length - cached:  # transformers 5
        changed["next_sequence_length"] = length - cached + virtual
    at = kwargs.get("cache_position")
    if at is not None and cached - virtual < length and _counts_virtual(at, cache, cached, length):
        changed["cache_position"] = torch.arange(cached - virtual, length, device=input_ids.device)
    return changed


def _counts_virtual(at: Tensor, cache: Any, cached: int, length: int) -> bool:
    """Return whether transformers 4 numbered the tokens of a step from the length of the cache, which contains virtual tokens.

    It does so in the first step of a `generate`, and in later ones if none were left in the first. All other steps go on from the text.

    Args:
        at: the `cache_position` of the step, (tokens,).
        cache: the cache.
        cached: number of tokens in the cache, including virtual tokens. In a static cache it is the number of non-zero keys, which can be too small.
        length: number of tokens of the text.
    """
    if not at.shape[0]:
        return True
    later = getattr(cache, "is_compileable", False) and at.shape[0] == 1
    return int(at[0]) == cached and int(at[-1]) == length - 1 and not later


def _step(index: AdapterIndex, call: Call, given: dict[str, Any], mask: Any) -> dict[str, Any]:
    """Return the inputs of one step of `generate` with virtual tokens.

    Args:
        index: the adapters.
        call: the call, which contains the virtual tokens.
        given: inputs that the base's `prepare_inputs_for_generation` returned; they may contain a 4-D attention mask already.
        mask: the caller's attention mask (batch, tokens), or None.
    """
    two = index.forward.encoder_decoder
    ours = _OURS_OF_TWO if two else _OURS
    names = ("decoder_input_ids", "decoder_inputs_embeds") if two else ("input_ids", "inputs_embeds")
    text = {name: given[name] for name in names if given.get(name) is not None}
    # without `use_cache`, every step starts with a new prefix, and not with the cache of the previous step
    cache = None if given.get("use_cache") is False else index.forward.cache_in(given)
    if cache is not None:
        text = index.forward.with_cache(text, cache)
    call = replace(call, inputs={**text, "decoder_attention_mask" if two else "attention_mask": mask})
    at = given.get("cache_position")
    if at is not None and int(at[0]):  # transformers 4: the length of a static cache is its number of non-zero keys
        call = replace(call, cached=int(_places(at, call, two)[0]))
    _make_room(cache, sum(tokens.length for tokens in call.virtual if not two or tokens.site is Site.DECODER), index)
    call, _ = reuse.with_reused_keys_values(index, call, index.base)
    inputs = assemble(call, index.forward, task_of(call.task)).inputs
    if at is not None:  # transformers 4: `cache_position` says where a static cache writes, but it counts the caller's tokens only
        inputs["cache_position"] = _places(at, call, two)
    return {**{name: value for name, value in given.items() if name not in ours}, **{k: v for k, v in inputs.items() if v is not None}}


def _places(at: Tensor, call: Call, two: bool) -> Tensor:
    """Return the positions in the cache, (tokens,), at which the tokens of a step are written.

    `at` contains the positions without virtual tokens.
    """
    parts = [tokens for tokens in call.virtual if not two or tokens.site is Site.DECODER]
    before = sum(tokens.length for tokens in parts if tokens.keys_values is not None)
    embeds = sum(tokens.length for tokens in parts if tokens.embeds is not None)
    if int(at[0]):  # a later step: all virtual tokens are in the cache
        return at + before + embeds
    return torch.arange(at.shape[0] + embeds, device=at.device) + before


def _make_room(cache: Any, count: int, index: AdapterIndex) -> None:
    """Enlarge a static cache that is still empty by `count` tokens, because transformers sizes it without the virtual tokens."""
    own = getattr(cache, "self_attention_cache", cache)
    window = getattr(decoder_config(index.view), "sliding_window", None)
    for layer in getattr(own, "layers", ()):
        size = getattr(layer, "max_cache_len", None)
        if size and not has_begun(layer):
            layer.max_cache_len = min(size + count, window) if layer.is_sliding and window else size + count


def check_assisted(index: AdapterIndex, task: TaskSpec, arguments: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    """Check that assisted generation, which removes rejected candidate tokens from the cache, does not remove virtual tokens.

    Raises:
        CapabilityError: this version of transformers crops caches to a length that does not count virtual tokens.
    """
    if newer() or not any(kwargs.get(name) for name in ("assistant_model", "prompt_lookup_num_tokens")):
        return
    if _has_virtual_tokens(index, task, arguments):
        raise CapabilityError("assisted generation with virtual tokens needs transformers 5", hint="generate without an assistant or prompt lookup")


def check_chunks(index: AdapterIndex, task: TaskSpec, arguments: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    """Check that `prefill_chunk_size` is not used together with a cache that contains virtual tokens.

    transformers splits the text into chunks before it calls the hook, so the hook can't correct the lengths.

    Raises:
        CapabilityError: both are used.
    """
    cache, config = cache_name.given_in(kwargs), kwargs.get("generation_config") or getattr(index.base, "generation_config", None)
    chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if chunk is not None and cache is not None and int(cache.get_seq_length()) and _has_virtual_tokens(index, task, arguments):
        raise CapabilityError(
            "prefill_chunk_size does not go together with a cache that holds virtual tokens", hint="leave one of them out of this call"
        )


def _has_virtual_tokens(index: AdapterIndex, task: TaskSpec, arguments: Mapping[str, Any]) -> bool:
    if not index.call_tuners:
        return False
    call = Call(task.name or None, {}, index.selection.current(), 1, torch.device("cpu"), arguments=arguments)
    return bool(prepared(index, call).virtual)


def encoder_arguments(index: AdapterIndex, task: TaskSpec, arguments: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the arguments (args, kwargs) of `generate` for an encoder-decoder model, with virtual tokens before the encoder's text.

    The encoder runs once, before the first step, so its inputs have to contain the virtual tokens then.

    Args:
        index: the adapters.
        task: the model's task.
        arguments: the arguments that tuners take from the call.
        args, kwargs: arguments of `generate`.

    Raises:
        RoutingError: there are virtual tokens, but neither token ids nor embeddings before which they can be placed.
    """
    if not index.call_tuners:
        return args, kwargs
    names = ("inputs", "input_ids", "inputs_embeds", "attention_mask")
    given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    if args:
        given["input_ids"] = args[0]
    if "inputs" in given:
        given["input_ids"] = given.pop("inputs")
    text = given.get("input_ids", given.get("inputs_embeds"))
    batch, device = batch_of({**kwargs, **given}) or (1, torch.device("cpu"))
    call = Call(task.name or None, given, index.selection.current(), batch, device, arguments=arguments)
    call = prepared(index, call)
    tokens = [part for part in call.virtual if part.site is Site.INPUT]
    if not tokens:
        return args, kwargs
    if text is None:  # sounds, images
        raise RoutingError("generate() needs input_ids or inputs_embeds before which virtual tokens can stand", hint="pass one of them")
    if kwargs.get("encoder_outputs") is not None:
        warnings.warn("encoder_outputs are computed anew, with virtual tokens before the text", PeftWarning, stacklevel=4)
    for name in ("position_ids", "token_type_ids"):
        if kwargs.get(name) is not None:
            warnings.warn(f"{name} are ignored: virtual tokens stand before the text", PeftWarning, stacklevel=4)
    pad = getattr(index.view.config, "pad_token_id", None)
    ids = given.get("input_ids")
    if "attention_mask" not in given and ids is not None and pad is not None and bool((ids == pad).any()):
        given["attention_mask"] = (ids != pad).long()  # the same mask that generate() would compute
    ready = encoder_inputs(call, tokens, index.forward, given)
    rest = {name: value for name, value in kwargs.items() if name not in (*names, "encoder_outputs", "position_ids", "token_type_ids")}
    return args[1:], {**rest, **ready}


def install(index: AdapterIndex, undo: Undo) -> None:
    """Install the hook if a tuner takes part in calls and the base has the method; a second call does nothing."""
    base = index.base
    if not index.call_tuners or not hasattr(type(base), METHOD) or isinstance(base.__dict__.get(METHOD), GenerationHook):
        return
    before = base.__dict__.get(METHOD)
    base.__dict__[METHOD] = GenerationHook(index, before)
    undo.call(uninstall, base)


def uninstall(base: nn.Module) -> None:
    """Remove the hook and restore the method that it replaced."""
    hook = base.__dict__.get(METHOD)
    if isinstance(hook, GenerationHook):
        del base.__dict__[METHOD]
        if hook.replaced is not None:
            base.__dict__[METHOD] = hook.replaced
