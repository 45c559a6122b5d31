"""Creates transformers caches that begin with the keys and values of prefixes."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base.view import BaseView
from ..errors import CapabilityError
from ..selection.route import ALL
from ..tuners.call import Call, VirtualTokens

#: key in `Route.context` of the cache with the prefixes, for layers that are recomputed
PREFIX = "peft_core.prefix"


def prefix_cache(call: Call, tokens: Sequence[VirtualTokens], view: BaseView, cache: Any, *, recomputing: bool = False) -> Any:
    """Return a cache that begins with the keys and values of prefixes; rows without a prefix have zeros there, which the mask hides.

    Args:
        call: the call.
        tokens: virtual tokens with keys and values, in the order of the sequence.
        view: the base.
        cache: an empty cache; None: a new cache is created.
        recomputing: layers are recomputed in the backward pass, so the cache does not store the keys and values that layers append.

    Raises:
        CapabilityError: the cache is too short, or layers that have no keys are to be recomputed.
    """
    if recomputing and any(pair is None for part in tokens for pair in part.keys_values or ()):
        raise CapabilityError(
            f"layers of {view.name} have states beside keys and values, which can't be computed twice from one cache",
            hint="gradient_checkpointing_disable() for prefixes",
        )
    if cache is None or recomputing:
        cache = new_cache(view, len(tokens[0].keys_values or ()), recomputing)
    decoder_cache = self_attention_cache(cache)
    _check_size(decoder_cache, sum(part.length for part in tokens))
    write = decoder_cache.begin if recomputing else decoder_cache.update
    at = () if recomputing or newer() else ({"cache_position": torch.arange(sum(part.length for part in tokens), device=call.device)},)
    like = torch.empty(call.batch, 0, dtype=dtype_of(view.base), device=call.device)
    for layer in range(len(tokens[0].keys_values or ())):
        offered = [part.keys_values[layer] for part in tokens if part.keys_values is not None]
        pairs = [pair for pair in offered if pair is not None]
        if not pairs:  # a layer without keys
            continue
        keys = [expand_to_batch(part, pair[0], like) for part, pair in zip(tokens, pairs, strict=True)]
        values = [expand_to_batch(part, pair[1], like) for part, pair in zip(tokens, pairs, strict=True)]
        k, v = (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in (keys, values))
        write(k, v, layer, *at)  # sliding layers of transformers 4.56 have to be told the positions
    return cache


def new_cache(view: BaseView, layers: int, recomputing: bool = False) -> Any:
    """Return an empty cache that grows, for a decoder with `layers` layers; for an encoder-decoder model, it covers self- and cross-attention."""
    from transformers import DynamicCache, EncoderDecoderCache

    encoder_decoder = bool(getattr(view.config, "is_encoder_decoder", False))
    config = decoder_config(view)
    if encoder_decoder and getattr(config, "num_hidden_layers", layers) != layers:
        config = None  # T5's config counts the layers of its encoder
    kind = _recomputing_class() if recomputing else DynamicCache
    if not encoder_decoder:
        return kind(config=config)
    cache = EncoderDecoderCache(kind(config=config), kind(config=config))
    if recomputing:
        cache.is_updated = _NeverUpdated()
    return cache


def _check_size(cache: Any, length: int) -> None:
    for layer in cache.layers:
        size = getattr(layer, "max_cache_len", None)
        if size is not None and size < length:
            raise CapabilityError(
                f"the cache has room for {size} tokens, but {length} virtual ones come first", hint="make it longer by their number"
            )


def self_attention_cache(cache: Any) -> Any:
    """Return the part of a cache that belongs to the decoder's self-attention; for decoder-only models, this is the cache itself."""
    return getattr(cache, "self_attention_cache", cache)


def has_begun(layer: Any) -> bool:
    """Return whether a layer of a cache has memory for keys and values; layers of transformers 4.56 do not say it by `is_initialized`."""
    return bool(getattr(layer, "is_initialized", getattr(layer, "keys", None) is not None))


def newer() -> bool:
    """Return whether the installed version of transformers is 5 or later."""
    import transformers

    return int(transformers.__version__.partition(".")[0]) >= 5


def empty(view: BaseView, max_length: int) -> Any:
    """Return an empty cache of fixed size, for `max_length` tokens."""
    from transformers import EncoderDecoderCache, StaticCache

    config = decoder_config(view)
    cache = StaticCache(config=config, max_cache_len=max_length)
    if not getattr(view.config, "is_encoder_decoder", False):
        return cache
    return EncoderDecoderCache(cache, StaticCache(config=config, max_cache_len=max_length))


def decoder_config(view: BaseView) -> Any:
    """Return the config of the part of the model that has a cache (the decoder)."""
    config = view.text_config
    getter = getattr(config, "get_text_config", None)
    return getter(decoder=True) if getter is not None and getattr(config, "is_encoder_decoder", False) else config


def expand_to_batch(tokens: VirtualTokens, value: Tensor, like: Tensor) -> Tensor:
    """Return `value`, (…) or (rows that use the tokens, …), as (batch, …) in the dtype of `like`; rows that do not use the tokens are zeros."""
    per_row = tokens.embeds is not None and tokens.embeds.ndim == 3
    value = value.to(dtype=like.dtype, device=like.device)
    if tokens.rows is ALL:
        return value if per_row else value.unsqueeze(0).expand(like.shape[0], *value.shape)
    rows = row_indices(tokens)
    value = value if per_row else value.unsqueeze(0).expand(rows.shape[0], *value.shape)
    return like.new_zeros(like.shape[0], *value.shape[1:]).index_copy(0, rows.to(like.device), value)


def row_indices(tokens: VirtualTokens) -> Tensor:
    """Return the indices of the batch rows that use the virtual tokens; only for tokens that not all rows use."""
    assert isinstance(tokens.rows, Tensor)
    return tokens.rows


def dtype_of(base: nn.Module) -> torch.dtype:
    """Return the dtype in which a base computes: that of its first floating-point parameter, float32 if there is none."""
    return next((parameter.dtype for parameter in base.parameters() if parameter.is_floating_point()), torch.float32)


def pair_of(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values (batch, heads, n, head_dim) with which a layer's cache begins."""
    found = self_attention_cache(cache).layers[layer]
    return found.keys, found.values


def with_pair(cache: Any, layer: int, keys: Tensor, values: Tensor) -> Any:
    """Return a copy of a cache in which one layer, which will be recomputed, has the given keys and values."""
    original = self_attention_cache(cache)
    changed, changed_layer = copy.copy(original), copy.copy(original.layers[layer])
    changed_layer.keys, changed_layer.values = keys, values
    changed.layers = [*original.layers[:layer], changed_layer, *original.layers[layer + 1 :]]
    if original is cache:
        return changed
    both = copy.copy(cache)
    both.self_attention_cache = changed
    return both


class _NeverUpdated(dict[int, bool]):
    """A dict that ignores assignments, so that no layer's cross-attention counts as cached: its keys and values are recomputed with gradients."""

    def __setitem__(self, key: int, value: bool) -> None:
        pass


_classes: list[type[Any]] = []


def _recomputing_class() -> type[Any]:
    """Return the class of caches that a layer can use again when it is recomputed; the class is created on first use, since it needs transformers."""
    if not _classes:
        from transformers import DynamicCache

        class RecomputingCache(DynamicCache):
            """A cache that stores only the prefix, and records in `readers` the layers that read the prefix; copies share `readers`."""

            def __init__(self, config: Any = None) -> None:
                super().__init__(config=config)
                self.readers: set[int] = set()

            def begin(self, keys: Tensor, values: Tensor, layer: int) -> None:
                super().update(keys, values, layer)

            def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
                layer: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
                if layer is None or not has_begun(layer):
                    return key_states, value_states
                self.readers.add(layer_idx)
                return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)

        _classes.append(RecomputingCache)
    return _classes[0]


class _CacheWarningFilter(logging.Filter):
    """Drops transformers' warning that caches are removed under gradient checkpointing: a hook of this package passes the cache to the layers."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.msg.__class__ is str and record.msg.startswith("Caching is incompatible with gradient checkpointing"))


@functools.cache
def silence_cache_warning() -> None:
    """Silence transformers' warning that caches are removed under checkpointing, for this process."""
    logging.getLogger("transformers.modeling_layers").addFilter(_CacheWarningFilter())
