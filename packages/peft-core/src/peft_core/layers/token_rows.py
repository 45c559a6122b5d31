"""Trainable rows of an embedding, applied to its output without copying the weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.ops import with_weight
from ..errors import ModelError, PeftError, RoutingError, listed
from ..merging.exact import Merge
from ..merging.layer import LayerMerging
from ..merging.rows import RowsChange, RowsFold
from ..selection.selection import AdapterSelection
from ..selection.switching import AuxiliaryTrainingWrapper
from ..tensor_names import TOKEN_ADAPTER, duplicates_of_token_adapter, join, restored_from_token_adapter
from .adapter_layer import AdapterLayer
from .slots import Slot
from .token_adapter import InitialRows, TokenAdapter

#: output layers of at most so many numbers are multiplied as a whole: that takes no longer, and scores have the bits that they have when merged
SMALL = 2**16


@dataclass(frozen=True)
class RowSettings:
    """The settings of one adapter's rows in one layer.

    Args:
        path: of the module in the base, for messages.
        indices: which rows; each once, from 0.
        source: the layer that holds them, where the module has its weight in common with another one; None: this one.
        partly_tied: the base's weight also belongs to a module that does not get these rows.
        random: the rows start as normal random numbers instead of the base's.
    """

    path: str
    indices: tuple[int, ...]
    source: TrainableRowsLayer | None = None
    partly_tied: bool = False
    random: bool = False


@dataclass(frozen=True)
class _Table:
    """The numbers of an adapter's rows, as look-ups need them.

    Args:
        indices: (n,), in the order of the rows.
        ascending: (n + 1,), sorted; the last is larger than every id.
        positions: (n + 1,), the row of each of `ascending`; n for the last.
    """

    indices: Tensor
    ascending: Tensor
    positions: Tensor

    @classmethod
    def of(cls, indices: Sequence[int]) -> _Table:
        order = sorted(range(len(indices)), key=indices.__getitem__)
        ascending = [*(indices[i] for i in order), torch.iinfo(torch.int64).max]
        return cls(torch.tensor(indices, dtype=torch.int64), torch.tensor(ascending), torch.tensor([*order, len(indices)]))

    def on(self, device: torch.device) -> _Table:
        return _Table(self.indices.to(device), self.ascending.to(device), self.positions.to(device))


class RowsMerging(LayerMerging):
    """Merging of trainable rows: they overwrite those of the base weight, also for modules that have the weight in common."""

    @property
    def adapters(self) -> list[str]:
        """The adapters whose rows are in the base weight, whether this layer or that with the same weight wrote them there."""
        written = super().adapters
        return [*written, *(adapter for adapter in self.layer.sources if adapter not in written and self.layer._is_merged_by_source(adapter))]

    def plan(self, adapters: Sequence[str]) -> Merge | None:
        """Return the merge of those `adapters` whose rows are not in the weight yet; None if there is nothing to do."""
        layer, mergeable = self.layer, self.mergeable(adapters)
        if not mergeable:
            return None
        base = layer.get_base_layer()
        partly_tied = any(layer.partly_tied[adapter] for adapter in mergeable)
        return Merge(base, mergeable, [RowsFold(base, layer.weight_name, self.change_of(mergeable), shared=partly_tied)])

    def change_of(self, adapters: Sequence[str]) -> RowsChange:
        """Return the change that writes the rows of `adapters`."""
        rows = [(adapter, self.layer.rows_of(adapter)) for adapter in adapters]
        return RowsChange([(self.layer.table(adapter, values.device).indices, values) for adapter, values in rows])


class TrainableRowsLayer(AdapterLayer):
    """E' = E with E'[T] = D: rows T of an embedding, or of the output layer that has its weight in common with it, are those of D.

    The base computes as ever; where its input is in T (of an output layer: where its output is), the result is overwritten. It is always
    the outermost wrapper, so that a row is what D says whatever other adapters do to the rest of the table.

    Shapes: `trainable_tokens_delta.<adapter>` (|T|, dim), in the order in which the indices were given.
    """

    base_types = (nn.Embedding, nn.Linear)
    additive: ClassVar[bool] = False
    merging_type = RowsMerging
    per_adapter: ClassVar[tuple[str, ...]] = ("scaling", "indices", "tables", "sources", "partly_tied")
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("trainable_tokens_delta",)
    other_param_names: ClassVar[tuple[str, ...]] = ("indices",)
    #: what files call the rows, behind the path of the module
    key: ClassVar[str] = "trainable_tokens_delta"
    #: whether files have rows that two modules have in common under the names of both
    written_twice: ClassVar[bool] = True

    def __init__(self, base_layer: nn.Module, selection: AdapterSelection) -> None:
        super().__init__(base_layer, selection)
        self.create_containers(base_layer)
        self.indices: dict[str, tuple[int, ...]] = {}
        self.tables: dict[str, _Table] = {}
        #: adapter → the layer that holds its rows, where it is another one
        self.sources: dict[str, TrainableRowsLayer] = {}
        self.partly_tied: dict[str, bool] = {}
        self._borrows = False

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """Adapter → the tokens whose rows it trains, in the order given."""
        return {adapter: list(indices) for adapter, indices in self.indices.items()}

    def create_containers(self, base_layer: nn.Module) -> None:
        """Create the empty containers for rows of `base_layer`."""
        self.trainable_tokens_delta = nn.ParameterDict()
        self.trainable_tokens_original = InitialRows()

    @property
    def container_module(self) -> Any:
        """The module that has the containers of the rows."""
        return self

    def put_inside(self, module: nn.Module) -> None:
        """Set the module whose output the rows overwrite: the base or a wrapper around it."""
        self._modules["base_layer"] = module

    # ---- weights ---------------------------------------------------------------------------------------------------
    def add(self, adapter: str, config: RowSettings) -> None:
        """Create an adapter's rows with the values of the base's, or use those of another layer.

        Others may have rows of the same tokens; only one of them can be in use at a time (`refuse_common_rows`).
        """
        self.indices[adapter], self.partly_tied[adapter] = config.indices, config.partly_tied
        container_module = self.container_module
        if config.source is not None:
            self.sources[adapter] = config.source
            if not container_module.trainable_tokens_delta:  # as in the reference implementation, both have the rows under their names
                self._borrows, container_module.trainable_tokens_delta = True, config.source.container_module.trainable_tokens_delta
            return
        if self._borrows:
            self._borrows, container_module.trainable_tokens_delta = False, nn.ParameterDict()
        self.tables[adapter] = _Table.of(config.indices)
        rows = self._initial_rows(adapter)
        start = rows.new_empty(rows.shape).normal_() if config.random and self.init_options.initialise else rows
        container_module.trainable_tokens_original.register_buffer(adapter, rows.clone(), persistent=False)
        container_module.trainable_tokens_delta[adapter] = self.init_options.parameter_of(start)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use these adapters in this module, as every layer.

        Raises:
            RoutingError: two of them have rows of the same tokens; nothing changes then.
        """
        if not isinstance(adapter_names, str):
            refuse_common_rows("this module", [self], adapter_names, RoutingError)
        super().set_adapter(adapter_names, inference_mode)

    def _initial_rows(self, adapter: str) -> Tensor:
        """Return the rows of the base (|T|, dim) as they were before this adapter's own initialisation changed the base."""
        weight = self.base_weight().detach()
        indices = self.tables[adapter].indices.to(weight.device)
        rows = weight[indices]
        inner = self._modules["base_layer"]
        while isinstance(inner, AdapterLayer):
            shift = inner.merging.shift_of(adapter)
            if shift is not None:
                rows = (rows + self.ops.to_weight_layout(shift)[indices].to(weight.device)).to(weight.dtype)
            inner = inner._modules["base_layer"]
        return rows

    def rows_of(self, adapter: str) -> Tensor:
        """Return D (|T|, dim)."""
        found: Tensor = self.sources.get(adapter, self).container_module.trainable_tokens_delta._parameters[adapter]
        return found

    def table(self, adapter: str, device: torch.device) -> _Table:
        """Return the numbers of the rows, on a device."""
        holder = self.sources.get(adapter, self)
        found = holder.tables[adapter]
        if found.indices.device != device:
            found = holder.tables[adapter] = found.on(device)
        return found

    def holders(self, adapter: str) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the file key, module, attribute) of the rows, if they are this layer's own."""
        if adapter in self.indices and (adapter not in self.sources or self.written_twice):
            yield self.key, self.sources.get(adapter, self).container_module.trainable_tokens_delta, adapter

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return what a file holds of the rows; those of another layer may be missing in it."""
        return {key: replace(slot, optional=adapter in self.sources) for key, slot in super().slots(adapter).items()}

    def further_slots(self, adapter: str) -> dict[str, Slot]:
        """Return what a file may hold besides: the reference implementation also writes rows for modules that have their weight in common."""
        source = self.sources.get(adapter)
        return {} if source is None else {self.key: Slot.of(source.container_module.trainable_tokens_delta, adapter)}

    def drop(self, adapter: str) -> None:
        """Take the adapter's rows out; a name that is not here is ignored."""
        container_module = self.container_module
        if adapter in self.tables:  # its own
            if adapter in container_module.trainable_tokens_delta:
                del container_module.trainable_tokens_delta[adapter]
            container_module.trainable_tokens_original._buffers.pop(adapter, None)
        super().drop(adapter)

    def _replicate_for_data_parallel(self) -> Any:
        if self.sources:
            raise ModelError(
                f"the token rows of {listed(self.sources)} are those of another layer with the same weight, which a replica does not find",
                hint="use DistributedDataParallel instead of nn.DataParallel",
                code="tied-replica",
            )
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]

    # ---- forward ---------------------------------------------------------------------------------------------------
    def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` with what the rows say: an embedding's where ids are in T, an output layer's in the columns T (with its bias)."""
        if self._is_merged_by_source(adapter):
            return y
        base: Any = self.get_base_layer()
        rows = self.rows_of(adapter).to(base.weight.dtype)
        table = self.table(adapter, x.device)
        if self.ops.kind == "embedding":
            padding = self.indices[adapter].index(base.padding_idx) if base.padding_idx in self.indices[adapter] else len(rows)
            return _looked_up(base, rows, table, padding, x, y)
        if base.weight.numel() <= SMALL:
            changed = F.linear(x, base.weight.index_copy(0, table.indices, rows), base.bias)[..., table.indices]
        else:
            changed = F.linear(x, rows, None if base.bias is None else base.bias[table.indices])
        return y.index_copy_(-1, table.indices, changed.to(y.dtype))

    def delta_weight(self, adapter: str) -> Tensor:
        """Return E' − E as a matrix (out, in), for E as it was when the adapter was made; all but the rows is 0."""
        original = self.sources.get(adapter, self).container_module.trainable_tokens_original._buffers[adapter]
        assert original is not None
        rows = self.rows_of(adapter) - original
        table = self.table(adapter, rows.device)
        return self.ops.matrix(rows.new_zeros(self.get_base_weight().shape).index_copy(0, table.indices, rows))

    @property
    def weight(self) -> Tensor:
        """The weight with the rows of the adapters in use written over it, as whoever multiplies with it by hand needs it; else the base's."""
        weight = self.get_base_weight()
        active = [
            adapter
            for adapter in self.selection.current().names
            if adapter in self.indices and not self.merged and not self._is_merged_by_source(adapter)
        ]
        for adapter in active:
            rows = self.rows_of(adapter)
            weight = weight.index_copy(0, self.table(adapter, weight.device).indices, rows.to(weight.dtype))
        return weight

    # ---- merging ---------------------------------------------------------------------------------------------------
    def base_weight(self) -> Tensor:
        """Return the base weight as it is when nothing is merged, by this layer or by that with the same weight; not to be written to."""
        source = next((source for adapter, source in self.sources.items() if self._is_merged_by_source(adapter)), None)
        return super().base_weight() if source is None else source.base_weight()

    def _is_merged_by_source(self, adapter: str) -> bool:
        """Return whether the layer that holds the rows has written them into the very weight that this layer uses."""
        source = self.sources.get(adapter)
        if source is None or not source.merged:
            return False
        weight = self.get_base_layer()._parameters.get(self.weight_name)
        folds = [fold for merge in source.merging.merges if adapter in merge.adapters for fold in merge.folds]
        return any(isinstance(fold, RowsFold) and fold.written is weight for fold in folds)


def refuse_common_rows(path: str, layers: Iterable[TrainableRowsLayer], adapters: Iterable[str], error: type[PeftError]) -> None:
    """Check that no two of some adapters have rows of the same tokens: they can't be in use at once, nor in one weight.

    Args:
        path: of a module of the base, for the message.
        layers: those around it.
        adapters: names.
        error: what is raised otherwise.
    """
    owners: dict[int, str] = {}
    for adapter in dict.fromkeys(adapters):
        indices = {index for layer in layers for index in layer.indices.get(adapter, ())}
        common = sorted(indices & owners.keys())
        if common:
            raise error(
                f"in {path!r} {owners[common[0]]!r} and {adapter!r} have rows of the same tokens {common}, of which one counts",
                hint="use or merge one of the two at a time, or use them for different rows of a batch by adapter_names",
            )
        owners |= dict.fromkeys(indices, adapter)


class TokenRows(TrainableRowsLayer, AuxiliaryTrainingWrapper):
    """Rows that a part of an adapter trains which every method may have (`trainable_token_indices`).

    Shapes: `token_adapter.trainable_tokens_delta.<adapter>` (|T|, dim), in the order in which the indices were given.
    """

    key = join(TOKEN_ADAPTER, TrainableRowsLayer.key)
    written_twice = False

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """Adapter → the tokens whose rows it trains, in the order given."""
        return {adapter: list(indices) for adapter, indices in self.indices.items()}

    def create_containers(self, base_layer: nn.Module) -> None:
        """Create the empty containers for rows, in a module around the base."""
        # in this order parameters get the names that begin with token_adapter
        del self._modules["base_layer"]
        self.token_adapter = TokenAdapter(base_layer, self)
        self._modules["base_layer"] = base_layer

    @property
    def container_module(self) -> Any:
        """The module that has the containers of the rows."""
        return self.token_adapter

    @property
    def original_module(self) -> nn.Module:
        """The module of the base."""
        return self.get_base_layer()

    def put_inside(self, module: nn.Module) -> None:
        """Set the module whose output the rows overwrite: the base, or a wrapper around it."""
        super().put_inside(module)
        self.token_adapter._modules["base_layer"] = module

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return key in an adapter's file → key in memory, both behind the path of this module; none for rows of another layer."""
        return {self.key: join(self.key, adapter_name)} if adapter_name in self.tables else {}

    # ---- names in state dicts: the base stands under token_adapter only ----------------------------------------------
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensors, each once, as the reference implementation names them."""
        found = super().state_dict(*args, **kwargs)
        for name in duplicates_of_token_adapter(found, kwargs.get("prefix", "")):
            del found[name]
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.update({outside: state_dict[inside] for inside, outside in restored_from_token_adapter(state_dict, prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _looked_up(base: Any, rows: Tensor, table: _Table, padding: int, ids: Tensor, y: Tensor) -> Tensor:
    """Return `y` with the rows where `ids` (…) has their numbers: looked up as the base does it, out of a table of |T| + 1 rows.

    The last row stands for all other ids, `padding` is the one that gets no gradient.
    """
    at = torch.searchsorted(table.ascending, ids)
    hit = table.ascending[at] == ids
    positions = torch.where(hit, table.positions[at], len(rows))
    small = F.pad(rows, (0, 0, 0, 1))
    if type(base) is nn.Embedding:
        found = F.embedding(positions, small, padding, base.max_norm, base.norm_type, base.scale_grad_by_freq)
    else:  # with a scale, or whatever else the class does
        found = with_weight(base, small, padding_idx=padding, sparse=False)(positions)
    return torch.where(hit.unsqueeze(-1), found.to(y.dtype), y)
