"""From a call with virtual tokens to the keywords that the base gets. Done once, for all methods, rows and lengths.

The order in the sequence is [keys/values, embeddings, text]. A row that does not use a virtual token has 0 for it in the mask, and
positions count what the mask counts: so rows with prompts of different lengths, and padding on either side, come out as if alone.
"""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CapabilityError, ModelError, RoutingError
from ..layers.activation import ALL
from .base_view import BaseView, checkpointed
from .call import Call, Site, VirtualTokens
from .tasks import TaskSpec


class BaseForward:
    """What `assemble` must know of a base's forward; asked once per model."""

    def __init__(self, view: BaseView) -> None:
        self.view = view

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of the forward's parameters, in order."""
        return tuple(inspect.signature(type(self.view.base).forward).parameters)

    @cached_property
    def takes_cache(self) -> bool:
        """Whether keys and values can be handed in: by name, or through keywords that the model passes on to its backbone."""
        found = inspect.signature(type(self.view.base).forward).parameters
        return "past_key_values" in found or any(p.kind is p.VAR_KEYWORD for p in found.values())

    def accepts(self, name: str) -> bool:
        """Return whether the forward has a parameter of this name."""
        return name in self.parameters

    @cached_property
    def first_position(self) -> int:
        """The position of the first token: 0, or behind the padding index where position embeddings have one (RoBERTa)."""
        for name, module in self.view.modules.items():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
                return int(module.padding_idx) + 1
        return 0

    def embed(self, ids: Any) -> Tensor:
        """Return the embeddings of token ids, adapters on the embedding included."""
        module: nn.Module = self.view.base.get_input_embeddings()  # type: ignore[operator]
        embedded: Tensor = module(ids)
        return embedded


def assemble(call: Call, forward: BaseForward, task: TaskSpec) -> tuple[dict[str, Any], int]:
    """Return the base's keywords, and by how many leading tokens the output is longer than the caller's input.

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
        return inputs, 0
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
    if mask is not None:
        inputs["attention_mask"] = mask
        inputs["position_ids"] = _positions(mask, n_kv, n_embeds, length, cached, forward, own_positions)
    if inputs.get("position_ids") is None:
        inputs.pop("position_ids", None)

    if cached:
        # a later step: the virtual tokens are in the cache already
        return inputs, 0
    if embeds:
        embedded = forward.embed(ids) if embedded is None else embedded
        inputs["inputs_embeds"] = torch.cat([*(_spread(tokens, tokens.embeds, embedded) for tokens in embeds), embedded], dim=1)
        inputs.pop("input_ids", None)
        if isinstance(inputs.get("token_type_ids"), Tensor):
            types = inputs["token_type_ids"]
            inputs["token_type_ids"] = torch.cat([types.new_zeros(types.shape[0], n_embeds), types], dim=1)
        inputs = task.extend(inputs, n_embeds)
    if kv:
        inputs["past_key_values"] = _filled_cache(call, kv, forward, cache)
    return inputs, n_embeds


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


def _spread(tokens: VirtualTokens, value: Any, like: Tensor) -> Tensor:
    """Return (…) or (rows, …) as (batch, …) in the dtype of `like`; zero in rows that do not use it."""
    own = tokens.embeds if tokens.embeds is not None else None
    per_row = own is not None and own.ndim == 3
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
