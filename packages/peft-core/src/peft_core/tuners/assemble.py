"""From a call with virtual tokens to the keywords that the base gets. Done once, for all methods, rows and lengths.

The order in the sequence is [keys/values, embeddings, text]. A row that does not use a virtual token has 0 for it in the mask, and
positions count what the mask counts: so rows with prompts of different lengths, and padding on either side, come out as if alone.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CapabilityError, ModelError, RoutingError
from ..layers.activation import ALL
from .base_view import BaseView, checkpointed
from .call import Call, Site, VirtualTokens
from .tasks import IGNORED, Lead, TaskSpec


class BaseForward:
    """What `assemble` must know of a base's forward; asked once per model."""

    def __init__(self, view: BaseView) -> None:
        self.view = view
        found = inspect.signature(type(view.base).forward).parameters
        #: the names of the forward's parameters, in order
        self.parameters = tuple(found)
        #: keys and values can be handed in: by name, or through keywords that the model passes on to its backbone
        self.takes_cache = "past_key_values" in found or any(p.kind is p.VAR_KEYWORD for p in found.values())
        #: the position of the first token: 0, or behind the padding index where position embeddings have one (RoBERTa)
        self.first_position = 0
        for name, module in view.modules.items():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
                self.first_position = int(module.padding_idx) + 1
                break
        #: tokens see only what stands before them; else the first token of a row may stand for the whole (BERT's pooler)
        self.causal = next((bool(m.is_causal) for m in view.modules.values() if hasattr(m, "is_causal")), True)

    def accepts(self, name: str) -> bool:
        """Return whether the forward has a parameter of this name."""
        return name in self.parameters

    def embed(self, ids: Any) -> Tensor:
        """Return the embeddings of token ids, adapters on the embedding included."""
        module: nn.Module = self.view.base.get_input_embeddings()  # type: ignore[operator]
        embedded: Tensor = module(ids)
        return embedded


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


def assemble(call: Call, forward: BaseForward, task: TaskSpec) -> Assembled:
    """Return what the base gets for a call.

    Args:
        call: the call, with the virtual tokens that tuners offered.
        forward: what the base's forward takes.
        task: decides what happens to labels.

    Raises:
        RoutingError: an attention mask that is not (batch, tokens).
        CapabilityError: virtual tokens that this base can't take.
    """
    inputs = dict(call.inputs)
    if not call.virtual:
        return Assembled(inputs)
    for tokens in call.virtual:
        if tokens.site is not Site.INPUT or getattr(forward.view.config, "is_encoder_decoder", False):
            raise CapabilityError(
                f"virtual tokens are not supported on the encoder-decoder model {forward.view.name} yet", hint="use a method that wraps layers"
            )
    kv = [tokens for tokens in call.virtual if tokens.keys_values is not None]
    embeds = [tokens for tokens in call.virtual if tokens.embeds is not None]
    n_kv, n_embeds = sum(tokens.length for tokens in kv), sum(tokens.length for tokens in embeds)

    cache = inputs.get("past_key_values")
    cached = 0 if cache is None else int(cache.get_seq_length())
    ids, embedded = inputs.get("input_ids"), inputs.get("inputs_embeds")
    text = ids if embedded is None else embedded
    if text is None:
        raise RoutingError("virtual tokens need input_ids or inputs_embeds", hint="pass one of them")
    length = text.shape[1]

    own_positions = inputs.get("position_ids")
    mask = _extended_mask(call, (*kv, *embeds), inputs.get("attention_mask"), length + max(cached - n_kv - n_embeds, 0), own_positions)
    positions = None if mask is None else _positions(mask, n_kv, n_embeds, length, cached, forward, own_positions)
    if cached:  # a later step: the virtual tokens are in the cache already
        return Assembled(_with(inputs, attention_mask=mask, position_ids=positions), 0, length)

    lead: Lead = n_embeds
    if embeds:
        embedded = forward.embed(ids) if embedded is None else embedded
        inputs["inputs_embeds"] = torch.cat([*(_spread(tokens, tokens.embeds, embedded) for tokens in embeds), embedded], dim=1)
        inputs.pop("input_ids", None)
        for name, filler in (("token_type_ids", 0), *((("labels", IGNORED),) if task.token_labels else ())):
            if isinstance(inputs.get(name), Tensor):
                own = inputs[name]
                inputs[name] = torch.cat([own.new_full((own.shape[0], n_embeds), filler), own], dim=1)
        if mask is not None and not forward.causal and any(tokens.rows is not ALL for tokens in embeds):
            inputs, mask, positions, lead = _packed(inputs, mask, positions, n_kv, n_embeds)
        inputs = task.shift(inputs, lead)
    if kv:
        inputs["past_key_values"] = _filled_cache(call, kv, forward, cache)
    return Assembled(_with(inputs, attention_mask=mask, position_ids=positions), lead, length)


def _with(inputs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return `inputs` with those changes that are not None; what is None anyway is left to the base."""
    merged = {**inputs, **{name: value for name, value in changes.items() if value is not None}}
    return {name: value for name, value in merged.items() if value is not None or name not in changes}


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


def _extended_mask(call: Call, virtual: tuple[VirtualTokens, ...], mask: Any, text_length: int, own_positions: Any) -> Tensor | None:
    """Return the mask (batch, virtual + text), or None where everything attends to everything anyway."""
    if mask is None:
        if all(tokens.rows is ALL for tokens in virtual) and own_positions is None:
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
            blocks.append(mask.new_zeros(call.batch, tokens.length).index_fill(0, _ids(tokens), 1))
    return torch.cat([*blocks, mask], dim=1)


def _positions(mask: Tensor, n_kv: int, n_embeds: int, length: int, cached: int, forward: BaseForward, own: Any) -> Tensor | None:
    """Return the positions of the tokens that the base sees in this call: what the mask counts, or the caller's own, moved."""
    if not forward.accepts("position_ids"):
        return None
    counted = (mask.cumsum(dim=1) - 1).clamp(min=0) + forward.first_position
    if isinstance(own, Tensor):
        own = own + mask[:, : n_kv + n_embeds].sum(dim=1, keepdim=True)
        return own if cached else torch.cat([counted[:, n_kv : n_kv + n_embeds], own], dim=1)
    return counted[:, -length:] if cached else counted[:, n_kv:]


def _spread(tokens: VirtualTokens, value: Tensor | None, like: Tensor) -> Tensor:
    """Return (…) or (rows, …) as (batch, …) in the dtype of `like`; zero in rows that do not use it."""
    assert value is not None
    per_row = tokens.embeds is not None and tokens.embeds.ndim == 3
    value = value.to(dtype=like.dtype, device=like.device)
    if tokens.rows is ALL:
        return value if per_row else value.unsqueeze(0).expand(like.shape[0], *value.shape)
    ids = _ids(tokens)
    value = value if per_row else value.unsqueeze(0).expand(ids.shape[0], *value.shape)
    return like.new_zeros(like.shape[0], *value.shape[1:]).index_copy(0, ids.to(like.device), value)


def _ids(tokens: VirtualTokens) -> Tensor:
    assert isinstance(tokens.rows, Tensor)
    return tokens.rows


def _filled_cache(call: Call, kv: list[VirtualTokens], forward: BaseForward, cache: Any) -> Any:
    """Return a cache that holds the keys and values of all prefixes; rows without one have zeros there, which the mask hides."""
    view = forward.view
    if not forward.takes_cache:
        raise CapabilityError(
            "Model does not support past key values which are required for prefix tuning",
            hint=f"the forward of {view.name} takes no past_key_values; use a method with virtual embeddings",
        )
    if view.base.training and checkpointed(view.base):
        raise ModelError(
            "keys and values can't be prepended while gradient checkpointing is on: it runs each layer again with the cache already filled",
            hint="call gradient_checkpointing_disable() on the base",
        )
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=view.text_config)
    like = torch.empty(call.batch, 0, dtype=_dtype(view.base), device=call.device)
    for layer in range(len(kv[0].keys_values or ())):
        pairs = [tokens.keys_values[layer] for tokens in kv if tokens.keys_values is not None]
        keys = [_spread(tokens, pair[0], like) for tokens, pair in zip(kv, pairs, strict=True)]
        values = [_spread(tokens, pair[1], like) for tokens, pair in zip(kv, pairs, strict=True)]
        cache.update(torch.cat(keys, dim=2) if len(keys) > 1 else keys[0], torch.cat(values, dim=2) if len(values) > 1 else values[0], layer)
    return cache


def _dtype(base: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in base.parameters() if parameter.is_floating_point()), torch.float32)


def prompt_of(call: Call, forward: BaseForward) -> Any:
    """Return the virtual tokens of a call by themselves: embeddings (batch, n, hidden), or a cache of keys and values."""
    kv = [tokens for tokens in call.virtual if tokens.keys_values is not None]
    if kv:
        return _filled_cache(call, kv, forward, None)
    embeds = [tokens for tokens in call.virtual if tokens.embeds is not None]
    first = embeds[0].embeds
    assert first is not None
    like = first.new_zeros(call.batch, 0, first.shape[-1])
    return torch.cat([_spread(tokens, tokens.embeds, like) for tokens in embeds], dim=1)
