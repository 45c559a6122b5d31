"""Additive attention masks with a weight for each key, for prefixes whose keys get more or less attention than other keys."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.view import BaseView
from ..errors import CapabilityError
from ..selection.route import ALL
from ..tuners.call import Call, VirtualTokens
from .caches import decoder_config, dtype_of, newer, row_indices, self_attention_cache

#: attention implementations that accept an additive mask
_WEIGHING = ("sdpa", "eager", "sdpa_paged", "eager_paged")


def _takes_query_length(cache: Any) -> bool:
    """Return whether a cache's `get_mask_sizes` takes the number of queries; in older versions of transformers it takes their positions."""
    return "query_length" in inspect.signature(cache.get_mask_sizes).parameters


def weighted_mask(
    call: Call, tokens: Sequence[VirtualTokens], view: BaseView, mask: Tensor | None, queries: int, cache: Any, past_length: int, *, causal: bool
) -> Any:
    """Return the additive mask (batch, 1, queries, keys) of a call in which some keys have a weight.

    If the base has several layer types, the result is a dict: name of the layer type → mask.

    Args:
        call: the call.
        tokens: the virtual tokens with keys and values at the beginning of the cache, in the order of the sequence.
        view: the base.
        mask: (batch, keys), 1 for keys that may be attended to; None: all keys may be.
        queries: number of query tokens.
        cache: the cache, which contains the prefix.
        past_length: number of tokens in the cache.
        causal: a token attends only to itself and to tokens before it.

    Raises:
        CapabilityError: the base's attention implementation does not support weights of keys.
    """
    config = decoder_config(view)
    kind = str(getattr(config, "_attn_implementation", None) or "eager")
    if kind not in _WEIGHING:
        raise CapabilityError(f"the attention {kind!r} of {view.name} can't weigh keys", hint="load the base with attn_implementation='sdpa'")
    if not causal and not newer():
        raise CapabilityError(f"the encoder {view.name} can't weigh keys under transformers 4", hint="use transformers 5, or another init_weights")
    decoder_cache = self_attention_cache(cache)
    keys = past_length + queries
    seen = torch.ones(call.batch, keys, dtype=torch.bool, device=call.device) if mask is None else mask != 0
    allowed = seen[:, None, None, :]
    at = torch.arange(past_length, keys, device=call.device)[:, None] - torch.arange(keys, device=call.device)  # distance from key to query
    if causal:
        allowed = allowed & (at >= 0)
    weights = _weights(call, tokens, keys)[:, None, None, :].to(dtype_of(view.base))
    layers = tuple(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    near = allowed & (at < window) if window and causal else allowed
    if not layers:
        return _additive_mask(decoder_cache, past_length, 0, weights, near, queries)
    found = {
        name: _additive_mask(decoder_cache, past_length, layers.index(name), weights, near if "sliding" in name else allowed, queries)
        for name in dict.fromkeys(layers)
    }
    return found if len(found) > 1 else next(iter(found.values()))


def _weights(call: Call, tokens: Sequence[VirtualTokens], keys: int) -> Tensor:
    """Return the weights (batch, keys) that are added to the attention scores of the keys; 0 for keys without a weight."""
    parts = []
    for part in tokens:
        if part.weights is None:
            parts.append(torch.zeros(call.batch, part.length, device=call.device))
        elif part.rows is ALL:
            parts.append(part.weights.to(call.device).expand(call.batch, -1))
        else:
            none = part.weights.new_zeros(call.batch, part.length).to(call.device)
            parts.append(none.index_copy(0, row_indices(part), part.weights.to(call.device).expand(row_indices(part).shape[0], -1)))
    rest = keys - sum(part.length for part in tokens)
    return torch.cat([*parts, torch.zeros(call.batch, rest, device=call.device)], dim=1)


def _additive_mask(cache: Any, past_length: int, layer: int, weights: Tensor, allowed: Tensor, queries: int) -> Tensor:
    """Return the additive mask (batch, 1, queries, keys of the layer).

    The number of keys of a layer differs from the number of tokens if the layer's cache has a sliding window or a fixed size.
    """
    lowest = torch.finfo(weights.dtype).min
    numbers = torch.where(allowed, weights, weights.new_tensor(lowest)).expand(allowed.shape[0], 1, queries, -1)
    length, offset = cache.get_mask_sizes(queries if _takes_query_length(cache) else torch.arange(past_length, past_length + queries), layer)
    numbers = numbers[..., offset : offset + length]
    if numbers.shape[-1] < length:
        numbers = torch.nn.functional.pad(numbers, (0, length - numbers.shape[-1]), value=lowest)
    return numbers
