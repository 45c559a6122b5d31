"""State that EVA holds for each layer while it processes data: input rows, principal directions, and the rank assigned to the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import ConfigError

from .pca import IncrementalPca

#: function that maps (a layer's positional arguments, the prepared batch, the layer's name) to input rows (tokens, features)
Prepare = Callable[[Any, Any, str], Tensor]
Inputs = Prepare | Mapping[str, Prepare | None] | None


class LayerStatistics:
    """Input statistics of one layer, collected for EVA.

    Args:
        name: name of the module.
        module: the module whose positional arguments are recorded.
        rank: the rank from the config; `distribute` later replaces it with the rank that EVA assigns to the layer.
        components: how many principal directions the PCA computes.
        features: number of input features of the layer.
        inputs: function that maps the layer's arguments to input rows, a dict of such functions by layer name, or None: the whole input, flattened.
        gather: use the rows of all processes of torch.distributed.
    """

    def __init__(self, name: str, module: nn.Module, rank: int, components: int, features: int, inputs: Inputs, gather: bool) -> None:
        self.name, self.module, self.rank, self.features, self.gather = name, module, rank, features, gather
        self.components = components
        self.prepare = inputs.get(name) if isinstance(inputs, Mapping) else inputs
        self.grouped = False
        self.leader = self
        self.pca = IncrementalPca(components)
        #: statistics of all layers that share the principal directions of this layer, this layer included
        self.group: list[LayerStatistics] = [self]
        self._waiting: list[Tensor] = []

    # ---- sharing --------------------------------------------------------------------------------------------------------
    def follow(self, leader: LayerStatistics) -> None:
        """Use the principal directions of `leader`, a layer that receives the same inputs (it may be this layer)."""
        self.grouped, self.leader = True, leader
        if leader is not self:
            leader.group.append(self)
            if self.components > leader.pca.components:
                leader.pca = IncrementalPca(self.components)

    @property
    def leads(self) -> bool:
        """Whether this layer computes its principal directions, instead of using those of another layer."""
        return self.leader is self

    # ---- data -----------------------------------------------------------------------------------------------------------
    def rows(self, args: Any, prepared: Any) -> Tensor:
        """Return the input rows (tokens, features) of one call of the layer, in float32.

        Raises:
            ConfigError: the rows are not finite, or do not have the shape (tokens, features).
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
        """Number of collected rows that have not been passed to the PCA yet."""
        return sum(len(rows) for rows in self._waiting)

    def take(self, args: Any, prepared: Any, tau: float) -> None:
        """Collect the input rows of one call; update the PCA when there are at least as many rows as components.

        Rows of smaller batches are collected until then, so that no row is dropped.
        """
        x = self.rows(args, prepared)
        self._waiting.append(gathered(x) if self.gather else x)
        if self.waiting >= self.pca.components:
            rows, self._waiting = torch.cat(self._waiting), []
            self.pca.update(rows, tau)

    # ---- results --------------------------------------------------------------------------------------------------------
    @property
    def wanted(self) -> int:
        """Number of directions needed: the largest rank among the layers that share the directions of this layer."""
        return max(stats.rank for stats in self.group)

    @property
    def settled(self) -> bool:
        """Whether all of the first `wanted` directions have converged."""
        return self.pca.rows > 0 and bool(self.pca.converged[: self.wanted].all())

    @property
    def converged(self) -> int:
        """How many of the first `rank` directions have converged."""
        return int(self.leader.pca.converged[: self.rank].sum())

    def result(self, whiten: bool) -> Tensor:
        """Return the first `rank` principal directions, (rank, features) in float32.

        With `whiten`, each is divided by the square root of its singular value.
        """
        pca = self.leader.pca
        rows = pca.directions[: self.rank]
        if whiten:
            rows = rows / pca.singular_values[: self.rank, None].sqrt()
        return rows.float()


def distribute(statistics: Sequence[LayerStatistics], budget: int) -> None:
    """Set the rank of each layer to its number of directions among the `budget` directions with the largest explained-variance ratios.

    The ratios of the directions of all layers are sorted together. No rank changes while a layer has no directions yet.
    """
    known = [stats for stats in statistics if stats.leader.pca.rows]
    if len(known) < len(statistics):  # some layers have not seen enough rows for a PCA
        return
    ratios = torch.cat([stats.leader.pca.ratios.cpu() for stats in statistics])
    owners = torch.cat([torch.full((stats.leader.pca.components,), i) for i, stats in enumerate(statistics)])
    chosen = owners[ratios.sort(descending=True, stable=True).indices[:budget]]
    for stats, count in zip(statistics, torch.bincount(chosen, minlength=len(statistics)).tolist(), strict=True):
        stats.rank = count


def digest(x: Tensor) -> tuple[Any, ...]:
    """Return a hash of a tensor: its shape and two checksums, computed on its device. Different tensors almost never have the same hash."""
    bits = x.contiguous().view(torch.int32).flatten().long()
    place = torch.arange(1, bits.numel() + 1, device=x.device)
    # multiplying by an odd number is invertible modulo 2⁶⁴, so no bit is lost; the sums may overflow and wrap around
    sums = [int((bits * (place * factor | 1)).sum()) for factor in (0x9E3779B97F4A7C1, 0xC2B2AE3D27D4EB5)]
    return (*x.shape, *sums)


def gathered(x: Tensor) -> Tensor:
    """Return the rows of all processes of the default process group, concatenated; `x` unchanged if there is only one process."""
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
