"""How many numbers of a model train."""

from __future__ import annotations

from torch import nn


def count(model: nn.Module) -> tuple[int, int]:
    """Return (numbers that train, all numbers); shared parameters count once.

    ZeRO-3 shards count with their full size, packed 4-bit weights with the number of weights they hold.
    """
    trainable = total = 0
    for parameter in model.parameters():
        size = parameter.numel()
        if size == 0 and hasattr(parameter, "ds_numel"):
            size = int(parameter.ds_numel)
        if type(parameter).__name__ == "Params4bit":
            storage = getattr(parameter, "quant_storage", None)
            size *= 2 * (storage.itemsize if storage is not None else 1)
        total += size
        if parameter.requires_grad:
            trainable += size
    return trainable, total


def summary(model: nn.Module) -> str:
    """Return one line: ``trainable params: 370,178 || all params: 108,681,988 || trainable%: 0.3406``."""
    trainable, total = count(model)
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / max(total, 1):.4f}"
