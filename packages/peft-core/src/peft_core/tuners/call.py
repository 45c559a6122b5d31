"""A model call as data: inputs, task, route, and the virtual tokens that tuners have added so far."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..selection.route import Route, Rows

Output = Any


class Site(enum.Enum):
    """The input sequence before which virtual tokens are inserted."""

    INPUT = "input"  #: before the tokens of a decoder-only model, or of an encoder
    DECODER = "decoder"  #: before the decoder's tokens of an encoder-decoder model


@dataclass(frozen=True)
class VirtualTokens:
    """The virtual tokens that a prompt method adds to some rows of a call: embeddings, or keys and values for every layer.

    Args:
        rows: the batch rows that use the virtual tokens: `ALL`, or row numbers (rows,).
        site: the input sequence before which they are inserted.
        embeds: embeddings (n, hidden), or (rows, n, hidden) if they differ between rows.
        keys_values: for each layer the pair of keys and values, each of shape (heads, n, head_dim) of that layer; None for a layer without keys.
        weights: (n,), added to the attention scores of the keys: the logarithm of each key's weight in the attention; None: the virtual keys
            count like any other key. Keys with weights occupy no positions, so that with zero weight the base model computes the same as without
            virtual tokens.
    """

    rows: Rows
    site: Site = Site.INPUT
    embeds: Tensor | None = None
    keys_values: tuple[tuple[Tensor, Tensor] | None, ...] | None = None
    weights: Tensor | None = None

    @property
    def length(self) -> int:
        """The number n of virtual tokens."""
        if self.embeds is not None:
            return self.embeds.shape[-2]
        assert self.keys_values is not None
        return next(pair[0].shape[-2] for pair in self.keys_values if pair is not None)


@dataclass(frozen=True)
class Call:
    """One call of the base.

    Args:
        task: the model's task, as in `TaskType`; None if it has no task.
        inputs: the keyword arguments that the base model would receive.
        route: which adapters act on which rows.
        batch: the number of rows.
        device: the device on which the call is computed.
        virtual: the virtual tokens that tuners have added so far, in the order in which they are inserted.
        arguments: keyword arguments for tuners (`TunerSpec.call_arguments`); they are not passed to the base model.
        generating: True if the call is a step of `generate`.
        cached: the number of tokens in the key-value cache; None: read it from the cache.
        entire: True if the base model is not called and the caller wants all virtual tokens of the adapters, also those that no forward uses.
    """

    task: str | None
    inputs: Mapping[str, Any]
    route: Route
    batch: int
    device: torch.device
    virtual: tuple[VirtualTokens, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    generating: bool = False
    cached: int | None = None
    entire: bool = False

    def adding(self, *tokens: VirtualTokens) -> Call:
        """Return a copy of the call with `tokens` appended to its virtual tokens."""
        return replace(self, virtual=self.virtual + tokens)

    def telling(self, **context: Any) -> Call:
        """Return a copy of the call with `context` added to its route, where the tuner's own layers read it."""
        return replace(self, route=replace(self.route, context={**self.route.context, **context}))

    def share(self, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Rows]]:
        """Yield (adapter, rows) for each adapter in `modules` that the route applies to at least one row of the batch."""
        for adapter in self.route.used:
            if adapter in modules:
                rows = self.route.rows(adapter, self.batch, self.device)
                if rows is not None:
                    yield adapter, rows


def batch_of(inputs: Mapping[str, Any]) -> tuple[int, torch.device] | None:
    """Return the batch size and the device of a call, read from the first input that is a tensor; None if there is no such input."""
    for key in ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features", "attention_mask", "decoder_input_ids"):
        value = inputs.get(key)
        if isinstance(value, Tensor):
            return value.shape[0], value.device
    for value in inputs.values():
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0], value.device
    return None
