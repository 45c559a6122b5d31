"""What EVA keeps for each layer while data passes: rows, directions, and the rank that they deserve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import ConfigError

from .pca import IncrementalPca

#: from a layer's arguments, the prepared batch and its name to rows (tokens, features)
Prepare = Callable[[Any, Any, str], Tensor]
Inputs = Prepare | Mapping[str, Prepare | None] | None


class LayerStatistics:
    """One layer whose inputs are looked at.

    Args:
        name: of the module.
        module: whose arguments are looked at.
        rank: that the config gives it; then, what it deserves.
        components: how many directions are followed.
        features: of its input.
        inputs: makes rows of its arguments.
        gather: use the rows of all processes.
    """

    def __init__(self, name: str, module: nn.Module, rank: int, components: int, features: int, inputs: Inputs, gather: bool) -> None:
        self.name, self.module, self.rank, self.features, self.gather = name, module, rank, features, gather
        self.components = components
        self.prepare = inputs.get(name) if isinstance(inputs, Mapping) else inputs
        self.grouped = False
        self.leader = self
        self.pca = IncrementalPca(components)
        #: ranks of all that share this one's directions
        self.group: list[LayerStatistics] = [self]
        self._waiting: list[Tensor] = []

    # ---- sharing --------------------------------------------------------------------------------------------------------
    def follow(self, leader: LayerStatistics) -> None:
        """Share the directions of a layer with the same inputs."""
        self.grouped, self.leader = True, leader
        if leader is not self:
            leader.group.append(self)
            if self.components > leader.pca.components:
                leader.pca = IncrementalPca(self.components)

    @property
    def leads(self) -> bool:
        """Whether it computes directions itself."""
        return self.leader is self

    # ---- data -----------------------------------------------------------------------------------------------------------
    def rows(self, args: Any, prepared: Any) -> Tensor:
        """Return the rows (tokens, features) of a call.

        Raises:
            ConfigError: they are not finite, or not two-dimensional.
        """
        x: Tensor = args[0].detach().flatten(0, -2) if self.prepare is None else self.prepare(args, prepared, self.name)
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ConfigError(f"prepare_layer_inputs_fn returned {tuple(x.shape)} for {self.name!r}, not (tokens, {self.features})")
        x = x.float()
        if not torch.isfinite(x).all():
            raise ConfigError(f"the inputs of {self.name!r} are not finite", hint="is the model broken, or in half precision?")
        return x

    @property
    def waiting(self) -> int:
        """How many rows wait for others to come."""
        return sum(len(rows) for rows in self._waiting)

    def take(self, args: Any, prepared: Any, tau: float) -> None:
        """Take in the rows of a call. They wait until there are as many as directions: none is left out."""
        x = self.rows(args, prepared)
        self._waiting.append(gathered(x) if self.gather else x)
        if self.waiting >= self.pca.components:
            rows, self._waiting = torch.cat(self._waiting), []
            self.pca.update(rows, tau)

    # ---- results --------------------------------------------------------------------------------------------------------
    @property
    def wanted(self) -> int:
        """How many directions those that share them need."""
        return max(stats.rank for stats in self.group)

    @property
    def settled(self) -> bool:
        """Whether the directions that are needed do not move any more."""
        return self.pca.rows > 0 and bool(self.pca.converged[: self.wanted].all())

    @property
    def converged(self) -> int:
        """How many of its directions do not move any more."""
        return int(self.leader.pca.converged[: self.rank].sum())

    def result(self, whiten: bool) -> Tensor:
        """Return the directions that its rank takes, (rank, features) in float32."""
        pca = self.leader.pca
        rows = pca.directions[: self.rank]
        if whiten:
            rows = rows / pca.singular_values[: self.rank, None].sqrt()
        return rows.float()


def distribute(statistics: Sequence[LayerStatistics], budget: int) -> None:
    """Give each layer as many of the budget's ranks as it has directions among the `budget` that explain most of their variance."""
    known = [stats for stats in statistics if stats.leader.pca.rows]
    if len(known) < len(statistics):  # some wait for their first rows
        return
    ratios = torch.cat([stats.leader.pca.ratios.cpu() for stats in statistics])
    owners = torch.cat([torch.full((stats.leader.pca.components,), i) for i, stats in enumerate(statistics)])
    chosen = owners[ratios.sort(descending=True, stable=True).indices[:budget]]
    for stats, count in zip(statistics, torch.bincount(chosen, minlength=len(statistics)).tolist(), strict=True):
        stats.rank = count


def digest(x: Tensor) -> tuple[Any, ...]:
    """Return numbers that are equal for equal tensors and, as good as always, for no others; computed where the tensor is."""
    bits = x.contiguous().view(torch.int32).flatten().long()
    place = torch.arange(1, bits.numel() + 1, device=x.device)
    # odd multipliers lose no bit; sums wrap around
    sums = [int((bits * (place * factor | 1)).sum()) for factor in (0x9E3779B97F4A7C1, 0xC2B2AE3D27D4EB5)]
    return (*x.shape, *sums)


def gathered(x: Tensor) -> Tensor:
    """Return the rows of all processes of the default group, those of this one if there is none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or torch.distributed.get_world_size() == 1:
        return x
    world = torch.distributed.get_world_size()
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(world)]
    torch.distributed.all_gather(counts, torch.tensor([len(x)], device=x.device))
    most = max(int(count) for count in counts)
    padded = x.new_zeros(most, x.shape[1])
    padded[: len(x)] = x
    parts = [torch.zeros_like(padded) for _ in range(world)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])
