"""From a call with virtual tokens to the keywords that the base gets. Done once, for all methods, rows and lengths.

The order in the sequence is [keys/values, embeddings, text]. A row that does not use a virtual token has 0 for it in the mask, and
positions count what the mask counts: so rows with prompts of different lengths, and padding on either side, come out as if alone.
An encoder-decoder model has two sequences: see `two_sequences`.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CapabilityError, PeftWarning, RoutingError
from ..layers.activation import ALL
from . import backbone, caches
from .base_view import BaseView
from .call import Call, Site, VirtualTokens
from .checkpointing import PREFIX, hush
from .tasks import IGNORED, Lead, TaskSpec


class BaseForward:
    """What `assemble` must know of a base's forward; asked once per model."""

    def __init__(self, view: BaseView) -> None:
        self.view = view
        found = inspect.signature(type(view.base).forward).parameters
        #: the names of the forward's parameters, in order
        self.parameters = tuple(found)[1:]  # without the model itself, whatever it is called
        #: keys and values can be handed in: by name, or through keywords that the model passes on to its backbone
        passes_on = any(p.kind is p.VAR_KEYWORD for p in found.values()) and backbone.own_decoder(view.base) is None
        keywords = passes_on and (not view.is_transformers_model or backbone.find(view.base) is not None)
        self.takes_cache = "past_key_values" in found or keywords
        #: where keys and values go if the forward takes none: a model inside, before its head
        self.backbone = None if self.takes_cache else backbone.find(view.base)
        #: a layer was seen to read what a prefix put into a cache
        self.reads_cache = False
        #: the position of the first token: 0, or behind the padding index where position embeddings have one (RoBERTa)
        self.first_position = 0
        for name, module in view.modules.items():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
                self.first_position = int(module.padding_idx) + 1
                break
        #: there is an encoder, whose tokens a decoder of its own looks at
        self.encoder_decoder = bool(getattr(view.config, "is_encoder_decoder", False))
        #: its decoder numbers tokens by the length of the cache, for all rows alike, and nobody can say otherwise
        self.numbers_by_cache = self.encoder_decoder and any(hasattr(module, "embed_positions") for module in view.modules.values())
        #: tokens see only what stands before them; else the first token of a row may stand for the whole (BERT's pooler)
        says = next((bool(m.is_causal) for m in view.modules.values() if hasattr(m, "is_causal")), None)
        if says is None:  # modules of older versions do not say
            says = (
                not view.is_transformers_model
                or hasattr(view.base, "prepare_inputs_for_generation")
                or bool(getattr(view.config, "is_decoder", False))
            )
        self.causal = says and not self.encoder_decoder
        #: it has a head that predicts the next token
        self.predicts = hasattr(view.base, "prepare_inputs_for_generation")
        #: how far back layers look that do not look at everything; 0: all look at everything
        self.window = _window(view)

    def accepts(self, name: str) -> bool:
        """Return whether the forward has a parameter of this name."""
        return name in self.parameters

    def embed(self, ids: Any, *, decoder: bool = False) -> Tensor:
        """Return the embeddings of token ids, adapters on the embedding included.

        Args:
            ids: (batch, tokens).
            decoder: with those of the decoder, where a model has two kinds.
        """
        module: Any = self.view.base
        if decoder and hasattr(module, "get_decoder") and hasattr(module.get_decoder(), "embed_tokens"):
            embedded: Tensor = module.get_decoder().embed_tokens(ids)
        else:
            embedded = module.get_input_embeddings()(ids)
        return embedded


def _window(view: BaseView) -> int:
    config = view.text_config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not any("sliding" in str(kind) for kind in kinds):
        return 0
    return int(getattr(config, "sliding_window", None) or 0)


@dataclass(frozen=True)
class Assembled:
    """What the base gets, and where the caller's tokens are in it.

    Args:
        inputs: the base's keywords.
        lead: how many virtual embeddings stand before the text: one number, or one per row (batch,).
        length: number of the caller's tokens.
    """

    inputs: dict[str, Any]
    lead: Lead = 0
    length: int = 0


def assemble(call: Call, forward: BaseForward, task: TaskSpec, *, again: bool = False) -> Assembled:
    """Return what the base gets for a call.

    Args:
        call: the call, with the virtual tokens that tuners offered.
        forward: what the base's forward takes.
        task: decides what happens to labels.
        again: layers run again in the backward pass.

    Raises:
        RoutingError: an attention mask that is not (batch, tokens).
        CapabilityError: virtual tokens that this base can't take.
    """
    inputs = dict(call.inputs)
    if not call.virtual:
        return Assembled(inputs)
    if forward.encoder_decoder:
        from .two_sequences import assemble_both

        return assemble_both(call, forward, task, again=again)
    if any(tokens.site is not Site.INPUT for tokens in call.virtual):
        raise CapabilityError(f"{forward.view.name} has no decoder of its own, before whose tokens virtual ones could stand", hint="use Site.INPUT")
    kv = [tokens for tokens in call.virtual if tokens.keys_values is not None]
    embeds = [tokens for tokens in call.virtual if tokens.embeds is not None]
    n_kv, n_embeds = sum(tokens.length for tokens in kv), sum(tokens.length for tokens in embeds)

    cache = inputs.get("past_key_values")
    cached = cached_in(call, cache)
    ids, embedded = inputs.get("input_ids"), inputs.get("inputs_embeds")
    text = ids if embedded is None else embedded
    if text is None:
        raise RoutingError("virtual tokens need input_ids or inputs_embeds", hint="pass one of them")
    length = text.shape[1]

    own_positions = inputs.get("position_ids")
    mask = extended_mask(call, (*kv, *embeds), inputs.get("attention_mask"), length + max(cached - n_kv - n_embeds, 0), own_positions)
    positions = None if mask is None else _positions(_placed(mask, kv), n_kv, n_embeds, length, cached, forward, own_positions)
    if 0 < forward.window < n_kv + n_embeds + length and not cached and any(tokens.rows is not ALL for tokens in call.virtual):
        warnings.warn(
            f"layers of {forward.view.name} look back {forward.window} tokens, virtual tokens of other rows among them, so that rows with different "
            "prompts see less of their own than alone",
            PeftWarning,
            stacklevel=2,
        )
    if cached:  # a later step: the virtual tokens are in the cache already
        seen = final_mask(call, kv, forward, mask, length, cache, cached)
        return Assembled(changed(inputs, attention_mask=seen, position_ids=positions), 0, length)

    lead: Lead = n_embeds
    if embeds:
        inputs["inputs_embeds"] = before(embeds, forward.embed(ids) if embedded is None else embedded)
        inputs.pop("input_ids", None)
        labelled = task.labels_each_token(inputs.get("labels"), tuple(text.shape[:2]))
        for name, filler in (("token_type_ids", 0), *((("labels", IGNORED),) if labelled else ())):
            if isinstance(inputs.get(name), Tensor):
                inputs[name] = led(inputs[name], n_embeds, filler)
        if mask is not None and not forward.causal and any(tokens.rows is not ALL for tokens in embeds):
            inputs, mask, positions, lead = _packed(inputs, mask, positions, n_kv, n_embeds)
        elif mask is not None and forward.causal and task.pools:
            inputs, mask, positions = _ending(inputs, mask, positions, n_kv)
        elif mask is not None and forward.causal and labelled and (task.generates or (task.token_labels is None and forward.predicts)):
            inputs, mask, positions = _predicting(inputs, mask, positions, n_kv, n_embeds)
        inputs = task.shift(inputs, lead)
    if kv:
        cache = filled_cache(call, kv, forward, cache, again=again)
        if forward.takes_cache:
            inputs["past_key_values"] = cache
    seen = final_mask(call, kv, forward, mask, n_embeds + length, cache, n_kv)
    return Assembled(changed(inputs, attention_mask=seen, position_ids=positions), lead, length)


def changed(inputs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return `inputs` with those changes that are not None; what is None anyway is left to the base."""
    merged = {**inputs, **{name: value for name, value in changes.items() if value is not None}}
    return {name: value for name, value in merged.items() if value is not None or name not in changes}


def before(embeds: list[VirtualTokens], text: Tensor) -> Tensor:
    """Return virtual embeddings and those of the text (batch, tokens, hidden) as one sequence."""
    return torch.cat([*(caches.spread(tokens, tokens.embeds, text) for tokens in embeds if tokens.embeds is not None), text], dim=1)


def led(values: Tensor, count: int, filler: int) -> Tensor:
    """Return (batch, tokens) with `count` times `filler` before each row."""
    return torch.cat([values.new_full((values.shape[0], count), filler), values], dim=1)


def _packed(
    inputs: dict[str, Any], mask: Tensor, positions: Tensor | None, n_kv: int, n_embeds: int
) -> tuple[dict[str, Any], Tensor, Tensor | None, Tensor]:
    """Move the virtual embeddings that a row does not use behind its text, so that each row begins with what it uses."""
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


def _predicting(inputs: dict[str, Any], mask: Tensor, positions: Tensor | None, n_kv: int, n_embeds: int) -> tuple[dict[str, Any], Tensor, Any]:
    """Move what a row does not look at before the virtual embeddings that it uses, so that the last of these predicts its first token.

    That is: the embeddings of other rows, and padding on the left. A first token that nothing of its own row stands before is no label.
    """
    seen = mask[:, n_kv:] != 0
    leading = torch.cat([torch.ones_like(seen[:, :n_embeds]), seen[:, n_embeds:].cumsum(dim=1) == 0], dim=1)
    order = torch.where(leading, seen.long(), 2).argsort(dim=1, stable=True)
    moved = dict(inputs)
    for name in ("inputs_embeds", "labels"):
        value = inputs[name]
        moved[name] = value.gather(1, order.view(*order.shape, *[1] * (value.ndim - 2)).expand_as(value))
    seen = seen.gather(1, order)
    alone = torch.nn.functional.pad(~seen[:, :-1], (1, 0), value=True)
    moved["labels"] = moved["labels"].masked_fill(alone, IGNORED)
    mask = torch.cat([mask[:, :n_kv], mask[:, n_kv:].gather(1, order)], dim=1)
    return moved, mask, None if positions is None else positions.gather(1, order)


def _ending(inputs: dict[str, Any], mask: Tensor, positions: Tensor | None, n_kv: int) -> tuple[dict[str, Any], Tensor, Any]:
    """Move all that a row does not look at before what it uses: among embeddings, a model can't tell which token is the last."""
    order = (mask[:, n_kv:] != 0).to(torch.int8).argsort(dim=1, stable=True)
    value = inputs["inputs_embeds"]
    moved = {**inputs, "inputs_embeds": value.gather(1, order.unsqueeze(2).expand_as(value))}
    mask = torch.cat([mask[:, :n_kv], mask[:, n_kv:].gather(1, order)], dim=1)
    return moved, mask, None if positions is None else positions.gather(1, order)


def extended_mask(call: Call, virtual: tuple[VirtualTokens, ...], mask: Any, text_length: int, own_positions: Any = None) -> Tensor | None:
    """Return the mask (batch, virtual + text), or None where everything attends to everything anyway.

    Raises:
        RoutingError: the caller's mask is not (batch, tokens).
    """
    if mask is None:
        if all(tokens.rows is ALL and tokens.weights is None for tokens in virtual) and own_positions is None:
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
            blocks.append(mask.new_zeros(call.batch, tokens.length).index_fill(0, caches.ids_of(tokens), 1))
    return torch.cat([*blocks, mask], dim=1)


def _placed(mask: Tensor, kv: list[VirtualTokens]) -> Tensor:
    """Return the mask without the keys that take no positions."""
    if all(tokens.weights is None for tokens in kv):
        return mask
    placed, start = mask.clone(), 0
    for tokens in kv:
        if tokens.weights is not None:
            placed[:, start : start + tokens.length] = 0
        start += tokens.length
    return placed


def _positions(mask: Tensor, n_kv: int, n_embeds: int, length: int, cached: int, forward: BaseForward, own: Any) -> Tensor | None:
    """Return the positions of the tokens that the base sees in this call: what the mask counts, or the caller's own, moved."""
    if not forward.accepts("position_ids"):
        return None
    counted = (mask.cumsum(dim=1) - 1).clamp(min=0) + forward.first_position
    if isinstance(own, Tensor):
        own = own + mask[:, : n_kv + n_embeds].sum(dim=1, keepdim=True)
        return own if cached else torch.cat([counted[:, n_kv : n_kv + n_embeds], own], dim=1)
    return counted[:, -length:] if cached else counted[:, n_kv:]


def cached_in(call: Call, cache: Any) -> int:
    """Return how many tokens are in the cache of a call."""
    if call.cached is not None:
        return call.cached
    return 0 if cache is None else int(cache.get_seq_length())


def final_mask(call: Call, kv: list[VirtualTokens], forward: BaseForward, mask: Tensor | None, queries: int, cache: Any, past: int) -> Any:
    """Return the mask (batch, keys) as it is, or one with numbers where some keys have weights: see `masks.weighed`."""
    if all(tokens.weights is None for tokens in kv):
        return mask
    from .masks import weighed

    return weighed(call, kv, forward.view, mask, queries, cache, past, causal=forward.causal or forward.encoder_decoder)


def filled_cache(call: Call, kv: list[VirtualTokens], forward: BaseForward, cache: Any, *, again: bool = False) -> Any:
    """Return a cache that holds the keys and values of all prefixes.

    Raises:
        CapabilityError: the base takes none.
    """
    if not forward.takes_cache and forward.backbone is None:
        raise CapabilityError(
            "Model does not support past key values which are required for prefix tuning",
            hint=f"the forward of {forward.view.name} takes no past_key_values; use a method with virtual embeddings",
        )
    found = caches.filled(call, kv, forward.view, cache, again=again)
    if again:
        hush()
    if again or not forward.takes_cache:
        call.route.facts[PREFIX] = found  # type: ignore[index]
    return found


def prompt_of(call: Call, forward: BaseForward, room: int | None = None) -> Any:
    """Return the virtual tokens of a call by themselves: embeddings (batch, n, hidden), or a cache of keys and values.

    Args:
        call: after all tuners have offered their virtual tokens.
        forward: what the base's forward takes.
        room: the size of the cache; None: it grows.
    """
    kv = [tokens for tokens in call.virtual if tokens.keys_values is not None]
    if kv:
        return filled_cache(call, kv, forward, None if room is None else caches.empty(forward.view, room))
    embeds = [tokens for tokens in call.virtual if tokens.embeds is not None]
    first = embeds[0].embeds
    assert first is not None
    return before(embeds, first.new_zeros(call.batch, 0, first.shape[-1]))
