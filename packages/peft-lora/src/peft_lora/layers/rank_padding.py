"""Factors with room for a larger rank than is in use, so that adapters of other ranks can take their place in compiled graphs.

A is seen as (groups, ρ, …) and B as (out, ρ, …), with ρ the columns of B: r, or its share for each group of a convolution. Columns of B
that are not in use are zeros, as are the rows of A that meet them: no output and no gradient comes from them.
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
    """Return the part of a stored A or B that is in use, in the shape that a file has.

    Args:
        end: of the file key; says whether it is A or B.
        tensor: the stored parameter.
        padded_rank: columns of the stored B.
        used_rank: how many of them are in use.
    """
    if end in A_KEYS:
        return tensor.reshape(-1, padded_rank, *tensor.shape[1:])[:, :used_rank].flatten(0, 1)
    return tensor[:, :used_rank]


def padded(end: str, tensor: Tensor, used_rank: int, padded_rank: int) -> Tensor:
    """Return an A or B of a file with zeros for the rest of the room.

    Args:
        end: of the file key; says whether it is A or B.
        tensor: with `used_rank` columns of B.
        used_rank, padded_rank: how many there are, and how many there are to be.
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
    """Return how many columns the stored B has."""
    return int(layer.factors(adapter)[1].shape[1])


def unpadded_slots(layer: FactorLayer, adapter: str, slots: Mapping[str, Slot]) -> Mapping[str, Slot]:
    """Return the slots of a layer in which those of A and B show the part in use only."""
    padded_rank, used_rank = stored_rank(layer, adapter), layer.used_rank[adapter]
    return {end: _narrow(end, slot, padded_rank, used_rank) if end in (*A_KEYS, *B_KEYS) else slot for end, slot in slots.items()}


def _narrow(end: str, slot: Slot, padded_rank: int, used_rank: int) -> Slot:
    shape = tuple(unpadded(end, torch.empty(slot.shape, device="meta"), padded_rank, used_rank).shape)
    # no owner: the tensor in memory is not what a file holds
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
