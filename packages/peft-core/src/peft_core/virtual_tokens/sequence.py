"""Helpers that prepend virtual tokens to the embeddings, the mask and the cache of a call; shared by `assembly` and `encoder_decoder`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.forward import BaseForward
from ..errors import CapabilityError, RoutingError
from ..selection.route import ALL
from ..tuners.call import Call, VirtualTokens
from ..tuners.tasks import Lead
from . import caches
from .caches import PREFIX, silence_cache_warning
from .masks import weighted_mask


@dataclass(frozen=True)
class Assembled:
    """The keyword arguments of the base's forward, and where in the sequence the caller's tokens are.

    Args:
        inputs: the keyword arguments.
        lead: number of virtual embeddings before the text: one number, or one per row (batch,).
        length: number of the caller's tokens.
    """

    inputs: dict[str, Any]
    lead: Lead = 0
    length: int = 0


def updated(inputs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return `inputs` updated with `changes`.

    A change with the value None keeps the value in `inputs`; if this value is None or missing as well, the result does not contain the name.
    """
    merged = {**inputs, **{name: value for name, value in changes.items() if value is not None}}
    return {name: value for name, value in merged.items() if value is not None or name not in changes}


def prepend_embeddings(virtual: list[VirtualTokens], text: Tensor) -> Tensor:
    """Return the virtual embeddings, followed by the embeddings of the text (batch, tokens, hidden), as one sequence."""
    return torch.cat([*(caches.expand_to_batch(tokens, tokens.embeds, text) for tokens in virtual if tokens.embeds is not None), text], dim=1)


def pad_left(values: Tensor, count: int, value: int) -> Tensor:
    """Return `values` (batch, tokens), padded on the left with `count` columns of `value`."""
    return torch.nn.functional.pad(values, (count, 0), value=value)


def extended_mask(call: Call, virtual: tuple[VirtualTokens, ...], mask: Any, text_length: int, caller_positions: Any = None) -> Tensor | None:
    """Return the attention mask (batch, virtual + text), or None if no mask is needed: all rows use all virtual tokens.

    Args:
        call: the call.
        virtual: the call's virtual tokens, in the order of the sequence.
        mask: the caller's attention mask (batch, text), or None.
        text_length: number of the caller's tokens, including the tokens in the cache.
        caller_positions: the caller's `position_ids`; if given, a mask is always needed.

    Raises:
        RoutingError: the caller's mask is not (batch, tokens).
    """
    if mask is None:
        # if some layers have no keys, the base may take the cache length from such a layer: an explicit mask and positions avoid the error
        plain = all(tokens.rows is ALL and tokens.weights is None and None not in (tokens.keys_values or ()) for tokens in virtual)
        if plain and caller_positions is None:
            return None
        mask = torch.ones(call.batch, text_length, dtype=torch.long, device=call.device)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise RoutingError(
            f"virtual tokens need an attention_mask of shape (batch, tokens), not {tuple(getattr(mask, 'shape', ()))}",
            hint="pass the 2-D mask of the tokenizer",
        )
    blocks = []
    for tokens in virtual:
        if tokens.rows is ALL:
            blocks.append(mask.new_ones(call.batch, tokens.length))
        else:
            blocks.append(mask.new_zeros(call.batch, tokens.length).index_fill(0, caches.row_indices(tokens), 1))
    return torch.cat([*blocks, mask], dim=1)


def cached_length(call: Call, cache: Any) -> int:
    """Return the number of tokens in the cache of a call, including virtual tokens."""
    if call.cached is not None:
        return call.cached
    return 0 if cache is None else int(cache.get_seq_length())


def final_mask(call: Call, kv: list[VirtualTokens], forward: BaseForward, mask: Tensor | None, queries: int, cache: Any, past_length: int) -> Any:
    """Return `mask` (batch, keys) unchanged or, if some keys have weights, the result of `masks.weighted_mask`, with the same arguments."""
    if all(tokens.weights is None for tokens in kv):
        return mask
    return weighted_mask(call, kv, forward.view, mask, queries, cache, past_length, causal=forward.causal or forward.encoder_decoder)


def cache_with_prefixes(call: Call, kv: list[VirtualTokens], forward: BaseForward, cache: Any, *, recomputing: bool = False) -> Any:
    """Return a cache that holds the keys and values of all prefixes.

    If the base's forward takes no cache, or if the layers are recomputed, the cache is also stored in the route's context, with the key `PREFIX`.

    Args:
        call: the call.
        kv: the virtual tokens with keys and values, in the order of the sequence.
        forward: describes the arguments that the base's forward accepts.
        cache: the caller's empty cache; None: a new cache is created.
        recomputing: layers are recomputed in the backward pass (gradient checkpointing).

    Raises:
        CapabilityError: the base's forward takes no KV cache.
    """
    if not forward.takes_cache and forward.backbone is None:
        raise CapabilityError(
            "Model does not support past key values which are required for prefix tuning",
            hint=f"the forward of {forward.view.name} takes no {forward.cache_name}; use a method with virtual embeddings",
        )
    found = caches.prefix_cache(call, kv, forward.view, cache, recomputing=recomputing)
    if recomputing:
        silence_cache_warning()
    if recomputing or not forward.takes_cache:
        call.route.context[PREFIX] = found  # type: ignore[index]
    return found
