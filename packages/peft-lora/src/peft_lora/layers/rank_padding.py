"""Padding A and B with zeros to a larger rank than the adapter uses, so that adapters of other ranks can be hot-swapped into compiled graphs.

A is viewed as (groups, ρ, …) and B as (out, ρ, …), where ρ is the number of B's columns: r, or r / groups on a grouped convolution. The padded
columns of B are zero, and so are the rows of A that are multiplied by them: they change neither the output nor any gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_core import Slot

if TYPE_CHECKING:
    from ..contracts import FactorLayer

#: ends of the file keys of A and of B
A_KEYS = ("lora_A.weight", "lora_embedding_A")
B_KEYS = ("lora_B.weight", "lora_embedding_B")


def unpadded(end: str, tensor: Tensor, padded_rank: int, used_rank: int) -> Tensor:
    """Return a stored A or B without its padding, in the shape that it has in a file.

    Args:
        end: end of the file key; it says whether `tensor` is A or B.
        tensor: the stored parameter.
        padded_rank: number of columns of the stored B, padding included.
        used_rank: number of columns of B without padding.
    """
    if end in A_KEYS:
        return tensor.reshape(-1, padded_rank, *tensor.shape[1:])[:, :used_rank].flatten(0, 1)
    return tensor[:, :used_rank]


def padded(end: str, tensor: Tensor, used_rank: int, padded_rank: int) -> Tensor:
    """Return an A or B from a file, padded with zeros to the stored rank.

    Args:
        end: end of the file key; it says whether `tensor` is A or B.
        tensor: A or B of an adapter whose B has `used_rank` columns.
        used_rank, padded_rank: number of columns of B before and after padding.
    """
    if end in A_KEYS:
        parts = tensor.reshape(-1, used_rank, *tensor.shape[1:])
        wide = parts.new_zeros(parts.shape[0], padded_rank, *parts.shape[2:])
        wide[:, :used_rank] = parts
        return wide.flatten(0, 1)
    wide = tensor.new_zeros(tensor.shape[0], padded_rank, *tensor.shape[2:])
    wide[:, :used_rank] = tensor
    return wide


def stored_rank(layer: FactorLayer, adapter: str) -> int:
    """Return how many columns the stored B has, padding included."""
    return int(layer.factors(adapter)[1].shape[1])


def unpadded_slots(layer: FactorLayer, adapter: str, slots: Mapping[str, Slot]) -> Mapping[str, Slot]:
    """Return the slots of a layer, where the slots of A and B read and write the tensors without padding."""
    padded_rank, used_rank = stored_rank(layer, adapter), layer.used_rank[adapter]
    return {end: _narrow(end, slot, padded_rank, used_rank) if end in (*A_KEYS, *B_KEYS) else slot for end, slot in slots.items()}


def _narrow(end: str, slot: Slot, padded_rank: int, used_rank: int) -> Slot:
    shape = tuple(unpadded(end, torch.empty(slot.shape, device="meta"), padded_rank, used_rank).shape)
    # no owner: the tensor in memory has padding, the tensor in a file has none
    return replace(
        slot,
        shape=shape,
        read=partial(_read, end, slot, padded_rank, used_rank),
        write=partial(_write, end, slot, padded_rank, used_rank),
        owner=None,
    )


def _read(end: str, slot: Slot, padded_rank: int, used_rank: int) -> Tensor:
    return unpadded(end, slot.read(), padded_rank, used_rank)


def _write(end: str, slot: Slot, padded_rank: int, used_rank: int, value: Tensor) -> None:
    slot.write(padded(end, value, used_rank, padded_rank))
