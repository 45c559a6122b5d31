"""A model call as data: inputs, task, route, and the virtual tokens offered so far."""

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
    """Where virtual tokens go."""

    INPUT = "input"  #: before the tokens of a decoder-only model, or of an encoder
    DECODER = "decoder"  #: before the decoder's tokens of an encoder-decoder model


@dataclass(frozen=True)
class VirtualTokens:
    """What a prompt method offers to some rows of a call: embeddings, or keys and values for every layer.

    Args:
        rows: the rows that use them: `ALL`, or row numbers (rows,).
        site: where they go.
        embeds: (n, hidden), or (rows, n, hidden) where the rows differ.
        keys_values: for each layer keys and values, each (heads, n, head_dim) of that layer; None for a layer without keys.
        weights: added to the attention scores of the keys (n,): the logarithm of how much each counts; None: as any other key. Keys with weights
            take no positions, so that with no weight at all the base computes what it computes alone.
    """

    rows: Rows
    site: Site = Site.INPUT
    embeds: Tensor | None = None
    keys_values: tuple[tuple[Tensor, Tensor] | None, ...] | None = None
    weights: Tensor | None = None

    @property
    def length(self) -> int:
        """n."""
        if self.embeds is not None:
            return self.embeds.shape[-2]
        assert self.keys_values is not None
        return next(pair[0].shape[-2] for pair in self.keys_values if pair is not None)


@dataclass(frozen=True)
class Call:
    """One call of the base.

    Args:
        task: the model's task, as in `TaskType`; None without one.
        inputs: the keywords that the base would get.
        route: which adapters act on which rows.
        batch: number of rows.
        device: where the call is computed.
        virtual: virtual tokens offered so far, in the order in which they will stand.
        arguments: keywords that belong to tuners (`TunerSpec.call_arguments`), the base never sees them.
        generating: the call is a step of `generate`.
        cached: number of tokens in its cache; None: ask the cache.
        entire: not a call of the base; all virtual tokens of the adapters are wanted, also those that no forward uses.
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
        """Return the call with more virtual tokens, after those already there."""
        return replace(self, virtual=self.virtual + tokens)

    def telling(self, **context: Any) -> Call:
        """Return the call with context that the tuner's own layers read from the route."""
        return replace(self, route=replace(self.route, context={**self.route.context, **context}))

    def share(self, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Rows]]:
        """Yield those adapters of `modules` that the route uses, each with its rows."""
        for adapter in self.route.used:
            if adapter in modules:
                rows = self.route.rows(adapter, self.batch, self.device)
                if rows is not None:
                    yield adapter, rows


def batch_of(inputs: Mapping[str, Any]) -> tuple[int, torch.device] | None:
    """Return the number of rows of a call and its device, from the first input that has them."""
    for key in ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features", "attention_mask", "decoder_input_ids"):
        value = inputs.get(key)
        if isinstance(value, Tensor):
            return value.shape[0], value.device
    for value in inputs.values():
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0], value.device
    return None
