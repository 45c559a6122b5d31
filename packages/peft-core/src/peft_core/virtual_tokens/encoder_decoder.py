"""Virtual tokens of encoder-decoder models: embeddings before the encoder's or the decoder's text, keys and values before the decoder's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base.forward import BaseForward
from ..errors import CapabilityError, RoutingError
from ..selection.route import ALL
from ..tuners.call import Call, Site, VirtualTokens
from ..tuners.tasks import IGNORED
from .sequence import Assembled, cache_with_prefixes, cached_length, extended_mask, final_mask, pad_left, prepend_embeddings, updated


def assemble_both(call: Call, forward: BaseForward, *, recomputing: bool = False) -> Assembled:
    """Return the keyword arguments for the forward of an encoder-decoder model; the arguments and the errors are those of `assemble`."""
    inputs = dict(call.inputs)
    encoder = [tokens for tokens in call.virtual if tokens.site is Site.INPUT]
    kv = [tokens for tokens in call.virtual if tokens.site is Site.DECODER and tokens.keys_values is not None]
    embeds = [tokens for tokens in call.virtual if tokens.site is Site.DECODER and tokens.embeds is not None]
    if any(tokens.keys_values is not None for tokens in encoder):
        raise CapabilityError("an encoder takes no keys and values", hint="offer them with site=Site.DECODER, or embeddings")
    if encoder and not call.generating:  # during generation, `generate` has run the encoder already
        inputs = encoder_inputs(call, encoder, forward, inputs)
    if not (kv or embeds):
        return Assembled(inputs)

    cache = forward.cache_in(inputs)
    cached = cached_length(call, cache)
    if not cached and embeds and inputs.get("decoder_input_ids") is None and inputs.get("decoder_inputs_embeds") is None:
        inputs["decoder_input_ids"] = _shifted(forward, inputs.get("labels"))
    length = _decoder_length(inputs)
    _check_numbering(forward, kv, embeds)
    lead = sum(tokens.length for tokens in embeds)
    count = lead + sum(tokens.length for tokens in kv)
    mask = extended_mask(call, (*kv, *embeds), inputs.get("decoder_attention_mask"), length + max(cached - count, 0))
    if cached:  # a later decoding step: the cache already contains the virtual tokens
        return Assembled(updated(inputs, decoder_attention_mask=final_mask(call, kv, forward, mask, length, cache, cached)), 0, length)
    if embeds:
        _prepend_to_decoder(embeds, forward, inputs)
    if kv:
        cache = cache_with_prefixes(call, kv, forward, cache, recomputing=recomputing)
        if forward.takes_cache:
            inputs = forward.with_cache(inputs, cache)
    return Assembled(updated(inputs, decoder_attention_mask=final_mask(call, kv, forward, mask, lead + length, cache, count - lead)), lead, length)


def _decoder_length(inputs: dict[str, Any]) -> int:
    """Return the number of the decoder's tokens in a call, without virtual tokens."""
    text = next((inputs[name] for name in ("decoder_inputs_embeds", "decoder_input_ids") if inputs.get(name) is not None), None)
    if text is None:
        text = inputs.get("labels")  # the base derives decoder_input_ids from labels, or from input_ids for classification
    return text.shape[1] if isinstance(text, Tensor) and text.ndim > 1 else _text_length(inputs)


def _check_numbering(forward: BaseForward, kv: list[VirtualTokens], embeds: list[VirtualTokens]) -> None:
    """Check that virtual tokens do not wrongly shift the positions of the text in a decoder that derives positions from the cache length.

    Raises:
        CapabilityError: keys with weights would shift the positions in all rows, or virtual tokens that only some rows use would shift the
            positions in the other rows.
    """
    if not forward.positions_from_cache_length:
        return
    if any(tokens.weights is not None for tokens in kv):
        raise CapabilityError(
            f"the decoder of {forward.view.name} numbers its tokens by what is in the cache, so that keys with weights move them",
            hint="use another init_weights",
        )
    if any(tokens.rows is not ALL for tokens in (*kv, *embeds)):
        raise CapabilityError(
            f"the decoder of {forward.view.name} numbers the tokens of all rows alike, so that virtual tokens of some rows move the others'",
            hint="use the same prompts for all rows, or methods that wrap layers",
        )


def _prepend_to_decoder(embeds: list[VirtualTokens], forward: BaseForward, inputs: dict[str, Any]) -> None:
    """Add virtual embeddings before the decoder's text, and `IGNORED` before its labels; `inputs` is changed in place.

    Raises:
        CapabilityError: the forward takes no `decoder_inputs_embeds`.
    """
    if not forward.accepts("decoder_inputs_embeds"):
        raise CapabilityError(f"the forward of {forward.view.name} takes no decoder_inputs_embeds", hint="use num_transformer_submodules=1")
    ids, embedded = inputs.pop("decoder_input_ids", None), inputs.get("decoder_inputs_embeds")
    inputs["decoder_inputs_embeds"] = prepend_embeddings(embeds, forward.embed(ids, decoder=True) if embedded is None else embedded)
    if isinstance(inputs.get("labels"), Tensor) and inputs["labels"].ndim == 2:
        inputs["labels"] = pad_left(inputs["labels"], sum(tokens.length for tokens in embeds), IGNORED)


def encoder_inputs(call: Call, tokens: list[VirtualTokens], forward: BaseForward, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return `inputs` with virtual embeddings before the encoder's text.

    The result is right-padded: masked positions are moved to the end of each row, since an encoder counts positions from the left.

    Raises:
        RoutingError: `encoder_outputs` are given, there is no text, or the mask does not have the shape (batch, tokens).
    """
    if inputs.get("encoder_outputs") is not None:
        raise RoutingError("encoder_outputs are given, so virtual tokens can't stand before the encoder's text", hint="pass input_ids instead")
    ids, embedded = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if ids is None and embedded is None:
        raise RoutingError("virtual tokens need input_ids or inputs_embeds", hint="pass one of them")
    embedded = forward.embed(ids) if embedded is None else embedded
    sequence = prepend_embeddings(tokens, embedded)
    mask = extended_mask(call, tuple(tokens), inputs.get("attention_mask"), embedded.shape[1])
    if mask is not None:
        order = (mask != 0).to(torch.int8).argsort(dim=1, descending=True, stable=True)
        sequence = sequence.gather(1, order.unsqueeze(2).expand_as(sequence))
        mask = mask.gather(1, order)
    return updated({**{k: v for k, v in inputs.items() if k not in ("input_ids", "token_type_ids")}, "inputs_embeds": sequence}, attention_mask=mask)


def _shifted(forward: BaseForward, labels: Any) -> Tensor:
    base: Any = forward.view.base
    if not isinstance(labels, Tensor) or not hasattr(base, "prepare_decoder_input_ids_from_labels"):
        raise RoutingError("virtual tokens of the decoder need decoder_input_ids, decoder_inputs_embeds or labels", hint="pass one of them")
    found: Tensor = base.prepare_decoder_input_ids_from_labels(labels=labels)
    return found


def _text_length(inputs: dict[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds"):
        value = inputs.get(name)
        if isinstance(value, Tensor):
            return value.shape[1]
    raise RoutingError("virtual tokens need decoder_input_ids, decoder_inputs_embeds or labels", hint="pass one of them")
