"""Prefix tuning. Source: arXiv 2101.00190."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import BaseView, Call, Creation, Plan, Slot, TunerBase, VirtualTokens

from . import dimensions
from .config import PrefixTuningConfig


class PrefixEncoder(nn.Module):
    """Keys and values of a prefix for every layer.

    Without projection a table `embedding.weight` (tokens, 2·layers·width). With it, a table (tokens, width) and the network
    `transform`: Linear, tanh, Linear. Files hold the result; once one is read, the network gives way to a table.

    Args:
        config: projection and starting values.
        found: resolved dimensions: `num_layers`, `num_attention_heads`, `token_dim`.
        creation: whether starting values are needed.
    """

    def __init__(self, config: PrefixTuningConfig, found: dict[str, Any], creation: Creation) -> None:
        super().__init__()
        self.count: int = int(config.num_virtual_tokens or 0)
        self.layers: int = found["num_layers"]
        self.heads: int = found["num_attention_heads"]
        width: int = found["token_dim"]
        self.head_dim = width // self.heads
        total = 2 * self.layers * width
        device = torch.device("meta" if creation.meta else "cpu")
        self.transform: nn.Sequential | None = None
        if config.prefix_projection and not config.inference_mode:
            hidden = int(config.encoder_hidden_size or width)
            with device:
                self.embedding = nn.Embedding(self.count, width)
                self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, total))
            if config.init_weights == "zero" and not creation.meta:
                nn.init.zeros_(self.transform[2].weight)  # type: ignore[arg-type]
                nn.init.zeros_(self.transform[2].bias)  # type: ignore[arg-type]
        else:
            table = torch.empty(self.count, total, device=device)
            if creation.initialise and not creation.meta:
                table.zero_() if config.init_weights == "zero" else table.normal_()
            self.embedding = nn.Embedding(self.count, total, _weight=table)

    def table(self) -> Tensor:
        """Return all keys and values as one table (tokens, 2·layers·width)."""
        weight = self.embedding.weight
        return weight if self.transform is None else self.transform(weight)

    def keys_values(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return for each layer its keys and values, each (heads, tokens, head_dim)."""
        table = self.table().view(self.count, 2 * self.layers, self.heads, self.head_dim).permute(1, 2, 0, 3).unbind(0)
        return tuple(zip(table[0::2], table[1::2], strict=True))

    def slots(self) -> dict[str, Slot]:
        """Return what a file holds: the table."""
        if self.transform is None:
            return {"prompt_embeddings": Slot.of(self.embedding, "weight")}
        shape = (self.count, 2 * self.layers * self.heads * self.head_dim)
        return {"prompt_embeddings": Slot(shape, self._read, self._become_table)}

    def _read(self) -> Tensor:
        with torch.no_grad():
            return self.table().detach()

    def _become_table(self, value: Tensor) -> None:
        weight = self.embedding.weight
        device = value.device if weight.is_meta else weight.device
        table = nn.Embedding(value.shape[0], value.shape[1], _weight=value.to(device=device, dtype=torch.float32, copy=True))
        self.embedding = table.requires_grad_(weight.requires_grad)
        self.transform = None


class PrefixTuner(TunerBase):
    """Puts learned keys and values before those of the rows that use them."""

    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        """Mount a `PrefixEncoder`."""
        found = dimensions.resolve(base, config, keys_values=True)
        resolved = {**found, "encoder_hidden_size": config.encoder_hidden_size or found["token_dim"]}
        return Plan(mounts={"prompt_encoder": partial(PrefixEncoder, config, found)}, resolved=resolved)

    def prepare(self, call: Call) -> Call:
        """Offer the keys and values of the adapters in use."""
        encoders = self.mounted.get("prompt_encoder", {})
        for adapter, rows in call.share(encoders):
            call = call.adding(VirtualTokens(rows, keys_values=encoders[adapter].keys_values()))  # type: ignore[operator]
        return call
