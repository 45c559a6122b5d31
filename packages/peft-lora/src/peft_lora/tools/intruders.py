"""Reducing intruder dimensions (arXiv 2410.21228): leading singular vectors of W + ΔW that are similar to no singular vector of W."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_core import ConfigError

from ..layers.common import LoraLayer
from .conversion import factor_keys, shaped


def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Add a copy of an adapter in which intruder dimensions are weaker, and activate the copy.

    An intruder is one of the first `top_k` left singular vectors u of W + ΔW whose cosine with every left singular vector of W is below
    `threshold_epsilon`. The new ΔW is the best approximation of the same rank to ΔW + (λ - 1)·Σ σ·u·vᵀ, where the sum is over the intruders.

    Args:
        peft_model: a model with LoRA adapters.
        old_adapter_name: name of the adapter to copy.
        new_adapter_name: name of the copy.
        top_k: how many leading singular vectors to check.
        threshold_epsilon: a singular vector with a cosine of at least this value is no intruder, in [0, 1].
        mitigation_lambda: λ, the factor for the singular values of the intruders: 1 changes nothing.
        logging_sink: function that is called with a message for each layer; None: no messages.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
        ConfigError: the adapter has weights that are no product B·A around a layer, or that are tied to another layer; the model is then unchanged.
        others: the errors of `add_adapter`.

    Example:
        >>> reduce_intruder_dimension(model, top_k=5)
    """
    index = peft_model._peft_index
    index.require(old_adapter_name)
    new: dict[str, tuple[Tensor, Tensor]] = {}
    lines = []
    with torch.no_grad():
        for (kind, path), layer in index.modules_of(old_adapter_name):
            if not isinstance(layer, LoraLayer) or layer.low_rank_factors(old_adapter_name) is None or old_adapter_name in layer.tied:
                raise ConfigError(f"{path!r} holds more of {old_adapter_name!r} ({kind}) than a product B·A", hint="plain LoRA can be reduced")
            a, b, count = _reduced(layer, old_adapter_name, top_k, threshold_epsilon, mitigation_lambda)
            new[path] = a, b
            lines.append(f"{index.prefix(old_adapter_name)}{path}: Intruders: {count}")
    config = copy.deepcopy(index.configs[old_adapter_name])
    config.init_lora_weights = True
    peft_model.add_adapter(new_adapter_name, config)
    for (_, path), layer in index.modules_of(new_adapter_name):
        slots = layer.slots(new_adapter_name)
        for key, value in zip(factor_keys(layer), shaped(layer, *new[path]), strict=True):
            slots[key].write(value)
    peft_model.set_adapter(new_adapter_name)
    for line in (*lines, f"Enabling new adapter {new_adapter_name}") if logging_sink is not None else ():
        logging_sink(line)  # type: ignore[misc]


def _reduced(layer: LoraLayer, adapter: str, top_k: int, epsilon: float, share: float) -> tuple[Tensor, Tensor, int]:
    """Return A (r, in) and B (out, r) of the reduced adapter, and the number of intruders."""
    a, b = layer.factors(adapter)
    weight = layer.ops.matrix(layer.base_weight()).float()
    delta = layer.delta_weight(adapter).float()
    known = torch.linalg.svd(weight, full_matrices=False).U
    u, s, vh = torch.linalg.svd(weight + delta, full_matrices=False)
    strangers = (u[:, :top_k].T @ known).abs().amax(dim=1) < epsilon
    chosen = torch.nonzero(strangers).flatten()
    if not chosen.numel():
        return a.detach().clone(), b.detach().clone(), 0
    delta = delta + (share - 1) * (u[:, chosen] * s[chosen]) @ vh[chosen]
    u, s, vh = torch.linalg.svd(delta / float(layer.scaling[adapter]), full_matrices=False)
    rank, root = a.shape[0], s.sqrt()
    return root[:rank, None] * vh[:rank], u[:, :rank] * root[:rank], int(chosen.numel())
