"""Gradient checkpointing: recompute layers in the backward pass with the same adapters, keys and values as in the forward pass.

In transformers, each checkpointed layer has an attribute with the function that runs the layer under checkpointing. `CheckpointHook` replaces that
function: it stores the route of the call (which adapters, which keys and values of a prefix) and uses the route again when the layer is recomputed,
in whichever thread that happens. The replacement is made once, not for each call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..base import cache_name
from ..errors import ModelError, RoutingError
from ..selection.route import Route
from ..selection.selection import AdapterSelection
from ..tuners.index import AdapterIndex
from ..virtual_tokens import caches
from ..virtual_tokens.caches import PREFIX

FUNCTION = "_gradient_checkpointing_func"
#: names of a layer's parameter for the KV cache
_CACHES = (*cache_name.NAMES, "past_key_value", "layer_past")


class CheckpointHook:
    """Replaces the function that runs a layer under gradient checkpointing.

    Args:
        selection: the model's adapter selection.
        original: the function that this object replaces.
        number: index of the layer in a KV cache; None if the layer has no cache.
    """

    def __init__(self, selection: AdapterSelection, original: Callable[..., Any], number: int | None) -> None:
        self.selection = selection
        self.original = original
        self.number = number

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        route = getattr(self.selection.local, "route", None)
        if route is None:
            if torch.compiler.is_compiling():
                return self.original(layer, *args, **kwargs)
            run = functools.partial(_with_same_adapters, self.selection, self.selection.default, self.selection.switches, layer)
            return self.original(_bound(layer, run), *args, **kwargs)
        cache = route.context.get(PREFIX)
        if cache is None or self.number is None:
            return self.original(_bound(layer, functools.partial(_under, self.selection, route, layer)), *args, **kwargs)
        # keys and values are passed as arguments, because tensors that are not arguments of the checkpointed function would get their gradient in
        # a separate backward pass for each layer
        pair = caches.pair_of(cache, self.number)
        run = functools.partial(_with_prefix, self.selection, route, layer, cache, self.number)
        return self.original(_bound(layer, run), *pair, *args, **kwargs)


def _bound(layer: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` in the form of `layer`, so that the replaced function can find the module that it runs.

    transformers hands over a partial of a bound method, whose `func.__self__` is the module, or of a function whose first argument is the module.
    """
    function, given = (layer.func, layer.args) if isinstance(layer, functools.partial) else (layer, ())
    if (owner := getattr(function, "__self__", None)) is not None:
        return functools.partial(MethodType(_call, owner), run)
    return functools.partial(_call, given[0], run) if given else run


def _call(owner: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return run(*args, **kwargs)


def _with_same_adapters(selection: AdapterSelection, default: Route, switches: int | None, layer: Callable[..., Any], *args: Any) -> Any:
    """Recompute a layer with the adapters of the forward pass, even if adapters were switched after it.

    Args:
        selection: the model's adapter selection.
        default, switches: values of the attributes `default` and `switches` of `selection` in the forward pass.
        layer, args: the layer to recompute and its arguments.

    Raises:
        RoutingError: adapters were switched, and some layers were switched individually in the forward pass.
    """
    if selection.default.names == default.names and selection.switches == switches:
        return layer(*args)
    if switches is not None:
        raise RoutingError(
            "adapters were switched between a forward pass and its backward pass under gradient checkpointing, and some layers were switched "
            "individually",
            hint="call backward() before switching adapters",
        )
    return _under(selection, default, layer, *args)


def _under(selection: AdapterSelection, route: Route, layer: Callable[..., Any], *args: Any) -> Any:
    with selection.use(route):
        return layer(*args)


def _with_prefix(
    selection: AdapterSelection, route: Route, layer: Callable[..., Any], cache: Any, number: int, keys: Tensor, values: Tensor, *args: Any
) -> Any:
    """Run a layer with a KV cache that begins with `keys` and `values`, each (batch, heads, n, head_dim).

    transformers removes caches under checkpointing, because recomputation would append to a growing cache twice; this cache does not grow.
    """
    cache = caches.with_pair(cache, number, keys, values)
    if isinstance(layer, functools.partial):
        for name in _CACHES:
            if name in layer.keywords:
                return _under(selection, route, functools.partial(layer.func, *layer.args, **{**layer.keywords, name: cache}), *args)
        position = _cache_position(layer.func) - len(layer.args)
        if 0 <= position < len(args):
            return _under(selection, route, layer, *args[:position], cache, *args[position + 1 :])
    raise ModelError(
        "keys and values can't be prepended while gradient checkpointing is on: this model's layers can't be given a cache then",
        hint="call gradient_checkpointing_disable() on the base",
    )


@functools.lru_cache(maxsize=64)
def _parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _cache_position(function: Callable[..., Any]) -> int:
    """Return the position of the KV cache among the parameters of a function; -1 if the function has no such parameter."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):  # the function is `super().__call__` of a layer, which takes the same parameters as the layer's `forward`
        names = _parameter_names(type(owner).forward)[1:]
    else:
        names = _parameter_names(function)
    return next((names.index(name) for name in _CACHES if name in names), -1)


def prepare(index: AdapterIndex) -> bool:
    """Return whether layers will be recomputed in the backward pass; if so, install hooks so that recomputation uses the same adapters."""
    if not (index.base.training and torch.is_grad_enabled()):
        return False
    waiting = []
    for module in index.view.checkpointable:
        function = module.__dict__.get(FUNCTION) if module.gradient_checkpointing else None
        if isinstance(function, CheckpointHook) and function.selection is index.selection:
            return True  # the hooks of all layers were installed by an earlier call
        if function is not None:
            waiting.append((module, function))
    encoder = _encoder(index) if waiting else frozenset()
    for module, function in waiting:
        module.__dict__[FUNCTION] = CheckpointHook(index.selection, function, None if module in encoder else _layer_number(module))
    return bool(waiting)


def _encoder(index: AdapterIndex) -> frozenset[nn.Module]:
    """Return all modules of encoders, whose layers have no KV cache.

    An encoder is the result of `get_encoder` of an encoder-decoder model, or a module with ``is_decoder=False`` (such as T5's encoder-only model).
    """
    found: Any = getattr(index.base, "get_encoder", dict)() if index.forward.encoder_decoder else None
    encoders = [found] if isinstance(found, nn.Module) and found is not index.base else []
    encoders += [part for part in index.base.modules() if getattr(part, "is_decoder", None) is False and hasattr(part, "embed_tokens")]
    return frozenset(module for encoder in encoders for module in encoder.modules())


def _layer_number(layer: nn.Module) -> int | None:
    numbers = (getattr(module, "layer_idx", None) for module in layer.modules())
    return next((number for number in numbers if isinstance(number, int)), None)


def uninstall(base: nn.Module) -> None:
    """Put the functions that the hooks replaced back in place."""
    for module in base.modules():
        hook = module.__dict__.get(FUNCTION)
        if isinstance(hook, CheckpointHook):
            module.__dict__[FUNCTION] = hook.original


def prepare_inputs(model: nn.Module) -> None:
    """Make the output of the input embeddings of `model` require gradients; a quantised model is not changed."""
    if any(getattr(model, name, False) for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")):
        return
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # type: ignore[operator]
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(require_output_grad)  # type: ignore[operator]


def require_output_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    """Make the output of `module` require gradients. This is a forward hook for embeddings.

    Without the hook, checkpointed layers of a frozen base would get no gradients, because none of their inputs requires gradients.
    """
    output.requires_grad_(True)
