"""Trainable rows of an embedding matrix. They overwrite parts of the module's output, so that the weight is not copied."""

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

#: an output layer whose weight has at most this many entries is multiplied as a whole: this is as fast, and logits equal the merged ones bit for bit
SMALL = 2**16


@dataclass(frozen=True)
class RowSettings:
    """The settings of one adapter's trainable rows in one layer.

    Args:
        path: path of the module in the base model, for error messages.
        indices: row indices, counted from 0, without duplicates.
        source: the layer that stores the rows, if this module's weight is tied to the weight of that layer's module; None: this layer stores them.
        partly_tied: the base weight is also used by a module that does not get these trainable rows.
        random: initialise the rows with standard normal random numbers instead of the values of the base weight.
    """

    path: str
    indices: tuple[int, ...]
    source: TrainableRowsLayer | None = None
    partly_tied: bool = False
    random: bool = False


@dataclass(frozen=True)
class _Table:
    """The row indices of an adapter as tensors, prepared for looking up token ids.

    Args:
        indices: (n,), row indices in the order of the adapter's trainable rows.
        ascending: (n + 1,), the same indices sorted; the last entry is a sentinel that is larger than every token id.
        positions: (n + 1,), for each entry of `ascending` its position in `indices`; n for the sentinel.
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
    """Merging of trainable rows: they overwrite rows of the base weight. Modules that are tied to the same weight see the new rows, too."""

    @property
    def adapters(self) -> list[str]:
        """The adapters whose rows are merged into the base weight, by this layer or by the layer that has the same (tied) weight."""
        written = super().adapters
        return [*written, *(adapter for adapter in self.layer.sources if adapter not in written and self.layer._is_merged_by_source(adapter))]

    def plan(self, adapters: Sequence[str]) -> Merge | None:
        """Return the `Merge` of those `adapters` whose rows are not merged into the weight yet; None if no such adapter is left."""
        layer, mergeable = self.layer, self.mergeable(adapters)
        if not mergeable:
            return None
        base = layer.get_base_layer()
        partly_tied = any(layer.partly_tied[adapter] for adapter in mergeable)
        return Merge(base, mergeable, [RowsFold(base, layer.weight_name, self.change_of(mergeable), shared=partly_tied)])

    def change_of(self, adapters: Sequence[str]) -> RowsChange:
        """Return the `RowsChange` that writes the rows of `adapters` into a weight."""
        rows = [(adapter, self.layer.rows_of(adapter)) for adapter in adapters]
        return RowsChange([(self.layer.table(adapter, values.device).indices, values) for adapter, values in rows])


class TrainableRowsLayer(AdapterLayer):
    """E' = E with E'[T] = D: replaces the rows T of an embedding matrix, or of the output layer that is tied to it, by the trainable rows D.

    The base module runs unchanged. Then its output is overwritten: for an embedding, at the positions whose token id is in T; for an output
    layer, in the columns T. This layer is always the outermost wrapper, so that the rows T equal D whatever other adapters add to the weight.

    Shapes: `trainable_tokens_delta.<adapter>` (|T|, dim), in the order in which the indices were given.
    """

    base_types = (nn.Embedding, nn.Linear)
    additive: ClassVar[bool] = False
    merging_type = RowsMerging
    per_adapter: ClassVar[tuple[str, ...]] = ("scaling", "indices", "tables", "sources", "partly_tied")
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("trainable_tokens_delta",)
    other_param_names: ClassVar[tuple[str, ...]] = ("indices",)
    #: key of the rows in adapter files, after the path of the module
    key: ClassVar[str] = "trainable_tokens_delta"
    #: whether a file stores rows that two tied modules share twice, under the names of both modules
    written_twice: ClassVar[bool] = True

    def __init__(self, base_layer: nn.Module, selection: AdapterSelection) -> None:
        super().__init__(base_layer, selection)
        self.create_containers(base_layer)
        self.indices: dict[str, tuple[int, ...]] = {}
        self.tables: dict[str, _Table] = {}
        #: adapter → the layer that stores its rows, for adapters whose rows are stored in another (tied) layer
        self.sources: dict[str, TrainableRowsLayer] = {}
        self.partly_tied: dict[str, bool] = {}
        self._borrows = False

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """Adapter → the token ids whose rows it trains, in the order in which they were given."""
        return {adapter: list(indices) for adapter, indices in self.indices.items()}

    def create_containers(self, base_layer: nn.Module) -> None:
        """Create the empty containers for trainable rows of `base_layer`, and for their initial values."""
        self.trainable_tokens_delta = nn.ParameterDict()
        self.trainable_tokens_original = InitialRows()

    @property
    def container_module(self) -> Any:
        """The module that stores the trainable rows and their initial values."""
        return self

    def put_inside(self, module: nn.Module) -> None:
        """Set `module` as the module whose output the rows overwrite: the base module or a wrapper around it."""
        self._modules["base_layer"] = module

    # ---- weights ---------------------------------------------------------------------------------------------------
    def add(self, adapter: str, config: RowSettings) -> None:
        """Create an adapter's trainable rows as copies of the base weight's rows, or use the rows of the layer `config.source`.

        Several adapters may have rows for the same tokens; only one of these adapters can be active at a time (`refuse_common_rows`).
        """
        self.indices[adapter], self.partly_tied[adapter] = config.indices, config.partly_tied
        container_module = self.container_module
        if config.source is not None:
            self.sources[adapter] = config.source
            if not container_module.trainable_tokens_delta:  # as in the reference implementation, both modules show the rows under their names
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
        """Make these adapters the active ones in this module, as in every adapter layer.

        Raises:
            RoutingError: two of the adapters have rows for the same tokens; nothing is changed then.
        """
        if not isinstance(adapter_names, str):
            refuse_common_rows("this module", [self], adapter_names, RoutingError)
        super().set_adapter(adapter_names, inference_mode)

    def _initial_rows(self, adapter: str) -> Tensor:
        """Return the rows T of the base weight, (|T|, dim), as they were before the initialisation of this adapter shifted the base weight."""
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
        """Return the trainable rows D of the adapter, (|T|, dim)."""
        found: Tensor = self.sources.get(adapter, self).container_module.trainable_tokens_delta._parameters[adapter]
        return found

    def table(self, adapter: str, device: torch.device) -> _Table:
        """Return the adapter's row indices (`_Table`) on `device`; the result is stored for the next call."""
        holder = self.sources.get(adapter, self)
        found = holder.tables[adapter]
        if found.indices.device != device:
            found = holder.tables[adapter] = found.on(device)
        return found

    def holders(self, adapter: str) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the file key, module, attribute) of the rows; nothing for rows of another layer, unless `written_twice` is set."""
        if adapter in self.indices and (adapter not in self.sources or self.written_twice):
            yield self.key, self.sources.get(adapter, self).container_module.trainable_tokens_delta, adapter

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return the slots of the rows in a file; slots of rows that another layer stores are optional."""
        return {key: replace(slot, optional=adapter in self.sources) for key, slot in super().slots(adapter).items()}

    def further_slots(self, adapter: str) -> dict[str, Slot]:
        """Return slots that a file may contain in addition: the reference implementation writes shared rows for each of the tied modules."""
        source = self.sources.get(adapter)
        return {} if source is None else {self.key: Slot.of(source.container_module.trainable_tokens_delta, adapter)}

    def drop(self, adapter: str) -> None:
        """Remove the adapter's rows; a name without rows in this layer is ignored."""
        container_module = self.container_module
        if adapter in self.tables:  # this layer stores the rows
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
        """Return `y` overwritten by the rows: of an embedding at the ids in T, of an output layer in the columns T (with its bias)."""
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
        """Return E' − E as a matrix (out, in), with E as it was when the adapter was created; all entries outside the rows T are 0."""
        original = self.sources.get(adapter, self).container_module.trainable_tokens_original._buffers[adapter]
        assert original is not None
        rows = self.rows_of(adapter) - original
        table = self.table(adapter, rows.device)
        return self.ops.matrix(rows.new_zeros(self.get_base_weight().shape).index_copy(0, table.indices, rows))

    @property
    def weight(self) -> Tensor:
        """A copy of the base weight with the rows of the active adapters, for code that uses the weight directly; else the base weight itself."""
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
        """Return the base weight without anything merged by this layer or by the layer with the same (tied) weight; read-only."""
        source = next((source for adapter, source in self.sources.items() if self._is_merged_by_source(adapter)), None)
        return super().base_weight() if source is None else source.base_weight()

    def _is_merged_by_source(self, adapter: str) -> bool:
        """Return whether another layer stores the adapter's rows and has merged them into the same weight tensor that this layer uses."""
        source = self.sources.get(adapter)
        if source is None or not source.merged:
            return False
        weight = self.get_base_layer()._parameters.get(self.weight_name)
        folds = [fold for merge in source.merging.merges if adapter in merge.adapters for fold in merge.folds]
        return any(isinstance(fold, RowsFold) and fold.written is weight for fold in folds)


def refuse_common_rows(path: str, layers: Iterable[TrainableRowsLayer], adapters: Iterable[str], error: type[PeftError]) -> None:
    """Raise `error` if two of the `adapters` have rows for the same tokens: such adapters can't be active, or merged, at the same time.

    Args:
        path: path of a module of the base model, for the error message.
        layers: the trainable-rows layers around this module.
        adapters: names of the adapters to check.
        error: class of the exception to raise.
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
    """Trainable rows that a config of any method can ask for with `trainable_token_indices`, in addition to the method itself.

    Shapes: `token_adapter.trainable_tokens_delta.<adapter>` (|T|, dim), in the order in which the indices were given.
    """

    key = join(TOKEN_ADAPTER, TrainableRowsLayer.key)
    written_twice = False

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """Adapter → the token ids whose rows it trains, in the order in which they were given."""
        return {adapter: list(indices) for adapter, indices in self.indices.items()}

    def create_containers(self, base_layer: nn.Module) -> None:
        """Create the empty containers for trainable rows in a `TokenAdapter` around `base_layer`."""
        # token_adapter is registered first: named_parameters() gives a shared tensor the name of its first occurrence
        del self._modules["base_layer"]
        self.token_adapter = TokenAdapter(base_layer, self)
        self._modules["base_layer"] = base_layer

    @property
    def container_module(self) -> Any:
        """The module that stores the trainable rows and their initial values."""
        return self.token_adapter

    @property
    def original_module(self) -> nn.Module:
        """The wrapped module of the base model."""
        return self.get_base_layer()

    def put_inside(self, module: nn.Module) -> None:
        """Set `module` as the module whose output the rows overwrite: the base module or a wrapper around it."""
        super().put_inside(module)
        self.token_adapter._modules["base_layer"] = module

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return {key in an adapter's file: key in memory}, both relative to this module's path; empty if another layer stores the rows."""
        return {self.key: join(self.key, adapter_name)} if adapter_name in self.tables else {}

    # ---- names in state dicts: the base module is listed under token_adapter only -----------------------------------
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict with each tensor once, under the name that the reference implementation uses."""
        found = super().state_dict(*args, **kwargs)
        for name in duplicates_of_token_adapter(found, kwargs.get("prefix", "")):
            del found[name]
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.update({outside: state_dict[inside] for inside, outside in restored_from_token_adapter(state_dict, prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _looked_up(base: Any, rows: Tensor, table: _Table, padding: int, ids: Tensor, y: Tensor) -> Tensor:
    """Return `y` (…, dim), overwritten by trainable rows where `ids` (…) are in T. The look-up works as in the base, in a table of |T| + 1 rows.

    The last row of this table is a dummy for all ids outside T; `padding` is the position of the row that gets no gradient.
    """
    at = torch.searchsorted(table.ascending, ids)
    hit = table.ascending[at] == ids
    positions = torch.where(hit, table.positions[at], len(rows))
    small = F.pad(rows, (0, 0, 0, 1))
    if type(base) is nn.Embedding:
        found = F.embedding(positions, small, padding, base.max_norm, base.norm_type, base.scale_grad_by_freq)
    else:  # a subclass may scale its output or do anything else: run its own forward
        found = with_weight(base, small, padding_idx=padding, sparse=False)(positions)
    return torch.where(hit.unsqueeze(-1), found.to(y.dtype), y)
