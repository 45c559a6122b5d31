"""Turns a call with virtual tokens into the keyword arguments of the base's forward; the same code serves all methods and prompt lengths.

The order in the sequence is [keys/values, embeddings, text]. If a row of the batch does not use a virtual token, the attention mask of the row is
0 there, and `position_ids` count only the tokens with a mask of 1. So a row gives the same output as in a batch of one, even if the rows have
prompts of different lengths or are padded on either side. An encoder-decoder model has two sequences: see `encoder_decoder`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..base.forward import BaseForward
from ..errors import CapabilityError, PeftWarning, RoutingError, listed
from ..selection.route import ALL
from ..tuners.call import Call, Site, VirtualTokens
from ..tuners.tasks import IGNORED, Lead, TaskSpec
from . import caches
from .encoder_decoder import assemble_both
from .sequence import Assembled, cache_with_prefixes, cached_length, extended_mask, final_mask, pad_left, prepend_embeddings, updated


def assemble(call: Call, forward: BaseForward, task: TaskSpec, *, recomputing: bool = False) -> Assembled:
    """Return the keyword arguments for the base's forward in a call.

    Args:
        call: the call, with the virtual tokens that tuners added.
        forward: describes the arguments that the base's forward accepts.
        task: decides what happens to labels.
        recomputing: layers are recomputed in the backward pass (gradient checkpointing).

    Raises:
        RoutingError: the attention mask does not have the shape (batch, tokens).
        CapabilityError: this base does not support the virtual tokens.
    """
    if not call.virtual:
        return Assembled(dict(call.inputs))
    if forward.encoder_decoder:
        return assemble_both(call, forward, recomputing=recomputing)
    if any(tokens.site is not Site.INPUT for tokens in call.virtual):
        raise CapabilityError(f"{forward.view.name} has no decoder of its own, before whose tokens virtual ones could stand", hint="use Site.INPUT")
    return _assemble_one(call, forward, task, recomputing)


def _assemble_one(call: Call, forward: BaseForward, task: TaskSpec, recomputing: bool) -> Assembled:
    """Return the keyword arguments for a base with one sequence (no encoder-decoder), in a call with virtual tokens.

    The arguments and the errors are those of `assemble`.
    """
    inputs = dict(call.inputs)
    kv = [tokens for tokens in call.virtual if tokens.keys_values is not None]
    embeds = [tokens for tokens in call.virtual if tokens.embeds is not None]
    n_kv, n_embeds = sum(tokens.length for tokens in kv), sum(tokens.length for tokens in embeds)
    cache = forward.cache_in(inputs)
    cached = cached_length(call, cache)
    text = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    if text is None:
        raise RoutingError("virtual tokens need input_ids or inputs_embeds", hint="pass one of them")
    length = text.shape[1]
    caller_positions = inputs.get("position_ids")
    mask = extended_mask(call, (*kv, *embeds), inputs.get("attention_mask"), length + max(cached - n_kv - n_embeds, 0), caller_positions)
    positions = None if mask is None else _positions(_with_positions(mask, kv), n_kv, n_embeds, length, cached, forward, caller_positions)
    if cached:  # a later decoding step: the cache already contains the virtual tokens
        seen = final_mask(call, kv, forward, mask, length, cache, cached)
        return Assembled(updated(inputs, attention_mask=seen, position_ids=positions), 0, length)
    _warn_of_windows(call, forward, n_kv + n_embeds + length)
    lead: Lead = n_embeds
    if embeds:
        inputs, mask, positions, lead = _with_embeddings(embeds, forward, task, inputs, mask, positions, n_kv)
    if kv:
        cache = cache_with_prefixes(call, kv, forward, cache, recomputing=recomputing)
        if forward.takes_cache:
            inputs = forward.with_cache(inputs, cache)
    seen = final_mask(call, kv, forward, mask, n_embeds + length, cache, n_kv)
    return Assembled(updated(inputs, attention_mask=seen, position_ids=positions), lead, length)


def _warn_of_windows(call: Call, forward: BaseForward, length: int) -> None:
    """Warn if virtual tokens that only some rows use take up positions in the window of sliding-window attention layers.

    `length` is the length of the whole sequence; if the window covers it, there is no warning.
    """
    if 0 < forward.window < length and any(tokens.rows is not ALL for tokens in call.virtual):
        warnings.warn(
            f"layers of {forward.view.name} look back {forward.window} tokens, virtual tokens of other rows among them, so that rows with different "
            "prompts see less of their own than alone",
            PeftWarning,
            stacklevel=4,
        )


def _with_embeddings(
    embeds: list[VirtualTokens],
    forward: BaseForward,
    task: TaskSpec,
    inputs: dict[str, Any],
    mask: Tensor | None,
    positions: Tensor | None,
    n_kv: int,
) -> tuple[dict[str, Any], Tensor | None, Tensor | None, Lead]:
    """Return inputs, mask and positions with virtual embeddings before the text, and the number of virtual embeddings before the text of each row.

    Args:
        embeds: the virtual embeddings, in the order of the sequence.
        forward: describes the arguments that the base's forward accepts.
        task: decides what happens to labels.
        inputs: the inputs of the call, with the text as `input_ids` (batch, tokens) or `inputs_embeds` (batch, tokens, hidden).
        mask, positions: the mask (batch, keys) covers the keys and values, the virtual embeddings and the text; the positions (batch, tokens) cover
            the virtual embeddings and the text.
        n_kv: number of keys and values before the virtual embeddings.
    """
    ids, embedded = inputs.pop("input_ids", None), inputs.get("inputs_embeds")
    shape = tuple((ids if embedded is None else embedded).shape[:2])
    count = sum(tokens.length for tokens in embeds)
    lead: Lead = count
    other = [name for name, value in inputs.items() if name not in _EXTENDED and _is_per_token(value, shape)]
    if other:
        raise CapabilityError(
            f"{listed(other)} have a value for each token, and there is none for virtual tokens",
            hint="leave them out, or use a method that wraps layers",
        )
    inputs["inputs_embeds"] = prepend_embeddings(embeds, forward.embed(ids) if embedded is None else embedded)
    inputs |= forward.per_layer_inputs(ids, count)
    labelled = task.labels_each_token(inputs.get("labels"), shape)
    for name, value in (("token_type_ids", 0), *((("labels", IGNORED),) if labelled else ())):
        if isinstance(inputs.get(name), Tensor):
            inputs[name] = pad_left(inputs[name], count, value)
    if mask is not None and not forward.causal and any(tokens.rows is not ALL for tokens in embeds):
        inputs, mask, positions, lead = _move_unused_behind_text(inputs, mask, positions, n_kv, count)
    elif mask is not None and forward.causal and task.pools:
        inputs, mask, positions = _move_masked_to_front(inputs, mask, positions, n_kv)
    elif mask is not None and forward.causal and labelled and (task.generates or (task.token_labels is None and forward.predicts)):
        inputs, mask, positions = _move_unused_to_front(inputs, mask, positions, n_kv, count)
    return task.shift(inputs, lead), mask, positions, lead


#: inputs with one value per token, for which we know the value to use at virtual tokens
_EXTENDED = frozenset(["inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "labels"])


def _is_per_token(value: Any, shape: tuple[int, ...]) -> bool:
    """Return whether an input is an integer tensor (not bool) of the shape `shape`, which is (batch, tokens)."""
    return isinstance(value, Tensor) and tuple(value.shape) == shape and not value.is_floating_point() and value.dtype is not torch.bool


def _move_unused_behind_text(
    inputs: dict[str, Any], mask: Tensor, positions: Tensor | None, n_kv: int, n_embeds: int
) -> tuple[dict[str, Any], Tensor, Tensor | None, Tensor]:
    """Move the virtual embeddings that a row does not use behind its text, so that each row begins with virtual embeddings that it uses."""
    used = mask[:, n_kv : n_kv + n_embeds]
    text = mask[:, n_kv + n_embeds :]
    order = torch.cat([used, torch.ones_like(text)], dim=1).argsort(dim=1, descending=True, stable=True)
    moved = dict(inputs)
    for name in ("inputs_embeds", "token_type_ids", "labels"):
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.shape[:2] == order.shape:
            moved[name] = value.gather(1, order.view(*order.shape, *[1] * (value.ndim - 2)).expand_as(value))
    packed = torch.cat([mask[:, :n_kv], mask[:, n_kv:].gather(1, order)], dim=1)
    return moved, packed, None if positions is None else positions.gather(1, order), used.sum(dim=1)


def _move_unused_to_front(
    inputs: dict[str, Any], mask: Tensor, positions: Tensor | None, n_kv: int, n_embeds: int
) -> tuple[dict[str, Any], Tensor, Any]:
    """Move the masked positions before a row's text to the front of the row, so that the row's last virtual embedding predicts its first token.

    These positions are the virtual embeddings that the row does not use, and the padding on the left. If a row has no unmasked position before
    its first token, the label of this token becomes `IGNORED`.
    """
    seen = mask[:, n_kv:] != 0
    leading = torch.cat([torch.ones_like(seen[:, :n_embeds]), seen[:, n_embeds:].cumsum(dim=1) == 0], dim=1)
    order = torch.where(leading, seen.long(), 2).argsort(dim=1, stable=True)
    moved = dict(inputs)
    for name in ("inputs_embeds", "labels", *(["per_layer_inputs"] if "per_layer_inputs" in inputs else [])):
        value = inputs[name]
        moved[name] = value.gather(1, order.view(*order.shape, *[1] * (value.ndim - 2)).expand_as(value))
    seen = seen.gather(1, order)
    alone = torch.nn.functional.pad(~seen[:, :-1], (1, 0), value=True)
    moved["labels"] = moved["labels"].masked_fill(alone, IGNORED)
    mask = torch.cat([mask[:, :n_kv], mask[:, n_kv:].gather(1, order)], dim=1)
    return moved, mask, None if positions is None else positions.gather(1, order)


def _move_masked_to_front(inputs: dict[str, Any], mask: Tensor, positions: Tensor | None, n_kv: int) -> tuple[dict[str, Any], Tensor, Any]:
    """Move all masked positions of a row to its front, so that its last token is at the end: a model can't find the last token from embeddings."""
    order = (mask[:, n_kv:] != 0).to(torch.int8).argsort(dim=1, stable=True)
    moved = dict(inputs)
    for name in ("inputs_embeds", "per_layer_inputs"):
        if name in inputs:
            value = inputs[name]
            moved[name] = value.gather(1, order.view(*order.shape, *[1] * (value.ndim - 2)).expand_as(value))
    mask = torch.cat([mask[:, :n_kv], mask[:, n_kv:].gather(1, order)], dim=1)
    return moved, mask, None if positions is None else positions.gather(1, order)


def _with_positions(mask: Tensor, kv: list[VirtualTokens]) -> Tensor:
    """Return the mask (batch, keys) for counting positions: it is 0 for the keys that have weights, since these keys take no position."""
    if all(tokens.weights is None for tokens in kv):
        return mask
    counted, start = mask.clone(), 0
    for tokens in kv:
        if tokens.weights is not None:
            counted[:, start : start + tokens.length] = 0
        start += tokens.length
    return counted


def _positions(mask: Tensor, n_kv: int, n_embeds: int, length: int, cached: int, forward: BaseForward, caller_positions: Any) -> Tensor | None:
    """Return the `position_ids` of the tokens that the base gets in this call; None if the base takes no `position_ids`.

    They are the cumulative sum of the mask or, if the caller gave `position_ids`, the caller's, shifted by the number of virtual tokens of the row.
    """
    if not forward.accepts("position_ids"):
        return None
    counted = (mask.cumsum(dim=1) - 1).clamp(min=0) + forward.first_position
    if isinstance(caller_positions, Tensor):
        moved = caller_positions + mask[:, : n_kv + n_embeds].sum(dim=1, keepdim=True)
        return moved if cached else torch.cat([counted[:, n_kv : n_kv + n_embeds], moved], dim=1)
    return counted[:, -length:] if cached else counted[:, n_kv:]


def prompt_of(call: Call, forward: BaseForward, max_cache_len: int | None = None) -> Any:
    """Return only the virtual tokens of a call, without the text: embeddings (batch, n, hidden), or a cache of keys and values.

    Args:
        call: the call, after all tuners have added their virtual tokens.
        forward: describes the arguments that the base's forward accepts.
        max_cache_len: the number of tokens for which the cache has memory; None: a cache that grows.
    """
    kv = [tokens for tokens in call.virtual if tokens.keys_values is not None]
    if kv:
        return cache_with_prefixes(call, kv, forward, None if max_cache_len is None else caches.empty(forward.view, max_cache_len))
    embeds = [tokens for tokens in call.virtual if tokens.embeds is not None]
    first = embeds[0].embeds
    assert first is not None
    return prepend_embeddings(embeds, first.new_zeros(call.batch, 0, first.shape[-1]))
