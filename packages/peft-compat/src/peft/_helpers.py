"""Small functions on tensors and devices for code written for upstream; our own methods do not use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_core.errors import ConfigError


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> Tensor:
    """Return decoder input ids (batch, tokens) for labels: the labels shifted right by one token, with padding instead of ignored labels.

    Args:
        input_ids: labels (batch, tokens); -100 means that a label is ignored.
        pad_token_id: the id that replaces -100.
        decoder_start_token_id: the id of the first token.

    Raises:
        ConfigError: `pad_token_id` is None.
    """
    if pad_token_id is None:
        raise ConfigError("self.model.config.pad_token_id has to be defined.", hint="set pad_token_id in the model's config")
    shifted = input_ids.new_zeros(input_ids.shape)
    shifted[:, 1:] = input_ids[:, :-1]
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


def bloom_model_postprocess_past_key_value(past_key_values: Any) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return keys and values in the layout of old Bloom models: keys (batch·heads, head_dim, n), values (batch·heads, n, head_dim).

    Args:
        past_key_values: (2·layers, batch, heads, n, head_dim), as one tensor or as parts split along the first dimension; first the keys of all
            layers, then the values of all layers.
    """
    stacked = torch.cat(list(past_key_values)) if not isinstance(past_key_values, Tensor) else past_key_values
    layers, batch, heads, count, width = stacked.shape
    keys = stacked[: layers // 2].transpose(3, 4).reshape(layers // 2, batch * heads, width, count)
    values = stacked[layers // 2 :].reshape(layers // 2, batch * heads, count, width)
    return tuple(zip(keys, values, strict=True))


def infer_device() -> str:
    """Return the type of the best available device: ``"cuda"``, ``"mps"``, ``"xpu"``, … or ``"cpu"``."""
    for kind in ("cuda", "mps", "npu", "xpu", "mlu"):
        backend = getattr(torch.backends if kind == "mps" else torch, kind, None)
        if backend is not None and getattr(backend, "is_available", bool)():
            return kind
    return "cpu"


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """Return `weight` (in, out) transposed to (out, in) if `fan_in_fan_out`; otherwise return `weight` unchanged."""
    return weight.T if fan_in_fan_out else weight
