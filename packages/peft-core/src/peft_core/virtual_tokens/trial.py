"""Finds out, by running the base on a few tokens, what its cache holds and whether it supports virtual tokens.

For some models, the config does not contain this information.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base import cache_name
from ..base.forward import BaseForward
from ..base.view import BaseView
from ..errors import CapabilityError
from . import caches

#: allowed difference between the logits of tokens fed in steps and of tokens fed at once, relative to the largest logit (half-precision rounding)
TOLERANCE = 0.05


@dataclass(frozen=True)
class CacheLayer:
    """The sizes of the keys and values that the cache of one layer holds for each token.

    Args:
        heads: number of heads of keys and values.
        key_width, value_width: size of one head of the keys, and of the values.
    """

    heads: int
    key_width: int
    value_width: int


def cache_layers(view: BaseView) -> tuple[CacheLayer | None, ...] | None:
    """Return the sizes of each decoder layer's cached keys and values, measured by a forward on two tokens. Does not change the base.

    The entry of a layer without keys (linear attention, state spaces) is None. The whole result is None if nothing can be measured: the base is not
    a transformers model, takes no text, returns no cache, or has weights on the meta device or in shards.

    Args:
        view: the base.
    """
    if not _can_run(view):
        return None
    try:
        with _quiet(view.base):
            cache = cache_name.returned_in(view.base(**_tokens(view), use_cache=True))
            if cache is None:  # the base creates no cache, but may write to a given one
                cache = caches.new_cache(view, 0)
                view.base(**BaseForward(view).with_cache(_tokens(view), cache), use_cache=True)
        layers = caches.self_attention_cache(cache).layers
    except Exception:  # any error of the base: the caller then uses the config instead
        return None
    return tuple(_measured(layer) for layer in layers) or None


def require_prefix(view: BaseView, layers: Sequence[CacheLayer | None]) -> None:
    """Check that a base computes correctly with a cache that begins with keys and values of virtual tokens.

    Args:
        view: the base.
        layers: the result of `cache_layers`.

    Raises:
        CapabilityError: no layer has keys, the base raises an error, or tokens fed in steps give other outputs than the same tokens fed at once.
    """
    if not any(layers):
        raise CapabilityError(
            f"no layer of {view.name} has keys and values, before which those of virtual tokens could stand",
            hint="use a method with virtual embeddings (prompt tuning, p-tuning), or one that wraps layers",
        )
    forward = BaseForward(view)
    if not forward.takes_cache or getattr(view.config, "is_encoder_decoder", False):
        return
    try:
        with _quiet(view.base):
            at_once = _logits(forward, layers, [3])
            in_steps = _logits(forward, layers, [2, 1]) if forward.causal else at_once  # in an encoder, each token attends to all
    except Exception as error:
        raise CapabilityError(
            f"{view.name} does not compute with a cache that begins with keys and values: {type(error).__name__}: {str(error)[:200]}",
            hint="use a method with virtual embeddings (prompt tuning, p-tuning), or one that wraps layers",
        ) from error
    if isinstance(at_once, Tensor) and float((at_once - in_steps).abs().max()) > TOLERANCE * float(at_once.abs().max()):
        raise CapabilityError(
            f"with a cache that begins with keys and values, {view.name} gives other outputs for tokens one by one than for all at once",
            hint="use a method with virtual embeddings (prompt tuning, p-tuning), or one that wraps layers",
        )


def require_embeddings(view: BaseView) -> None:
    """Check that the base of `view` accepts `inputs_embeds` instead of token ids; a base that can't be run here passes the check.

    Raises:
        CapabilityError: the base does not accept embeddings.
    """
    if not _can_run(view):
        return
    given = _tokens(view)
    with _quiet(view.base):
        try:
            view.base(**given)
            forward = BaseForward(view)
            further = forward.per_layer_inputs(given["input_ids"])
            embedded = forward.embed(given["input_ids"]) * 1.5  # the embedding of no token
        except Exception:  # the base fails even without virtual tokens
            return
        try:
            view.base(**{name: value for name, value in given.items() if name != "input_ids"}, **further, inputs_embeds=embedded)
        except NotImplementedError:  # the base says it itself, when it is called
            return
        except Exception as error:
            raise CapabilityError(
                f"{view.name} does not take embeddings in the place of token ids: {type(error).__name__}: {str(error)[:200]}",
                hint="use a method that wraps layers",
            ) from error


def _measured(layer: Any) -> CacheLayer | None:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.ndim != 4 or values.ndim != 4:
        return None
    return CacheLayer(keys.shape[1], keys.shape[3], values.shape[3])


def _can_run(view: BaseView) -> bool:
    """Return whether a base can be run on tokens: a transformers model for text, with all its weights loaded (not on meta, not in shards)."""
    if not view.is_transformers_model or getattr(view.base, "main_input_name", None) != "input_ids":
        return False
    return all(type(p) is nn.Parameter and not p.is_meta and p.numel() for p in view.base.parameters() if p.is_floating_point())


def _tokens(view: BaseView, count: int = 2) -> dict[str, Tensor]:
    """Return inputs with `count` tokens, for the decoder of an encoder-decoder model as well."""
    device = next(view.base.parameters()).device
    ids = torch.arange(1, count + 1, device=device).unsqueeze(0)
    return {"input_ids": ids, "decoder_input_ids": ids} if getattr(view.config, "is_encoder_decoder", False) else {"input_ids": ids}


def _logits(forward: BaseForward, layers: Sequence[CacheLayer | None], steps: Sequence[int]) -> Any:
    """Return the logits of the last of three tokens after two virtual tokens, with `steps` tokens per forward; None if there are no logits."""
    view = forward.view
    ids = _tokens(view, 3)["input_ids"]
    cache, start, n = caches.new_cache(view, len(layers)), 0, 2
    generator = torch.Generator().manual_seed(0)
    for number, layer in enumerate(layers):
        if layer is not None:
            pair = [torch.randn(1, layer.heads, n, width, generator=generator) for width in (layer.key_width, layer.value_width)]
            keys, values = (tensor.to(ids.device, caches.dtype_of(view.base)) for tensor in pair)
            cache.update(keys, values, number)
    found: Any = None
    for step in steps:
        given = {"input_ids": ids[:, start : start + step], "attention_mask": ids.new_ones(1, n + start + step), "use_cache": True}
        found = view.base(**forward.with_cache(given, cache))
        start += step
    logits = getattr(found, "logits", None)
    return logits[:, -1].float() if isinstance(logits, Tensor) and logits.ndim == 3 else None


@contextlib.contextmanager
def _quiet(base: nn.Module) -> Iterator[None]:
    """Context manager that sets a base to evaluation mode without gradients, and restores each module's training mode afterwards."""
    training = [module for module in base.modules() if module.training]
    for module in training:
        module.training = False
    try:
        # a base that was compiled in place is not compiled again for two tokens
        compiled = "torch._dynamo" in sys.modules
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            yield
    finally:
        for module in training:
            module.training = True
