"""Multitask prompt tuning. Source: arXiv 2303.02861."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_core import BaseView, Call, InitOptions, Plan, RoutingError, Site, Slot, TunerBase, VirtualTokens

from . import dimensions
from .config import START_FIELDS, MultitaskPromptTuningConfig
from .encoders import Encoder
from .initial_values import Vocabulary, initial_table, needs_vocabulary
from .sources import read_source
from .tensor_names import COLS, ROWS, TABLE

ARGUMENT = "task_ids"
#: standard deviation of the initial values of the factors
STD = 0.02


class MultitaskPromptEmbedding(Encoder):
    """A prompt for each task: P ⊙ (C_t R_t), with P (tokens, hidden) shared, C (tasks, tokens, ranks), R (tasks, ranks, hidden), in float32.

    Parameters: `embedding.weight` is P, `prefix_task_cols` C, `prefix_task_rows` R.

    Args:
        config: how many tasks and ranks, and how P, C and R are initialised.
        size: (tokens, hidden) of P; with two submodules the tokens of the encoder, then those of the decoder.
        vocabulary: the base's vocabulary, for initial values; None: the initialisation does not use it.
        encoder_decoder: the base has an encoder and a decoder.
        init_options: whether initial values are needed.

    Raises:
        AdapterFileError, AdapterWeightsError: the source can't be used.
    """

    def __init__(
        self,
        config: MultitaskPromptTuningConfig,
        size: tuple[int, int],
        vocabulary: Vocabulary | None,
        encoder_decoder: bool,
        init_options: InitOptions,
    ) -> None:
        super().__init__()
        self.count = int(config.num_virtual_tokens or 0)
        self.tasks, ranks = config.num_tasks, config.num_ranks
        self.for_decoder = encoder_decoder and size[0] > self.count
        device = "meta" if init_options.meta else "cpu"
        table = torch.empty(size, device=device)
        cols, rows = torch.empty(self.tasks, size[0], ranks, device=device), torch.empty(self.tasks, ranks, size[1], device=device)
        if init_options.initialise and not init_options.meta:
            table = initial_table(table, config, vocabulary)
            for factor in (cols, rows):
                factor.normal_(std=STD)
                if config.preserve_scale:
                    factor.add_(ranks**-0.5)  # the entries of the product C_t R_t are then 1 plus small noise
            if config.starts_from_source and not config.inference_mode:
                source = read_source(config, size)
                table = source.table
                if source.cols is not None and source.rows is not None:
                    cols.copy_(source.cols)
                    rows.copy_(source.rows)
        self.prefix_task_cols, self.prefix_task_rows = nn.Parameter(cols), nn.Parameter(rows)
        self.embedding = nn.Embedding(*size, _weight=table)

    def tokens(self, task_ids: Tensor, same: int | None = None) -> tuple[tuple[Site, Tensor], ...]:
        """Return pairs (site, virtual tokens at this site); the virtual tokens are (rows, tokens, hidden).

        Args:
            task_ids: (rows,), at least one row.
            same: the task of all rows, if it is known that all rows have the same; the virtual tokens are then (tokens, hidden).
        """
        task_ids = task_ids.to(self.prefix_task_cols.device)
        if same is not None:
            return self._split(self._products(task_ids[:1])[0])
        return self._split(self._products(task_ids))

    def rows(self, indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """Return the virtual tokens (batch, n, hidden) of the tasks `task_ids` (batch,) at the indices `indices` (batch, n).

        Raises:
            RoutingError: `task_ids` is missing.
        """
        if task_ids is None:
            raise RoutingError("task_ids cannot be None: each row has the prompt of its task", hint="give a number per row")
        tokens = self._products(task_ids.to(self.prefix_task_cols.device))
        return tokens.gather(1, indices.to(tokens.device).unsqueeze(-1).expand(*indices.shape, tokens.shape[-1]))

    def _split(self, tokens: Tensor) -> tuple[tuple[Site, Tensor], ...]:
        first = tokens if tokens.shape[-2] == self.count else tokens[..., : self.count, :]
        return ((Site.INPUT, first), (Site.DECODER, tokens[..., self.count :, :])) if self.for_decoder else ((Site.INPUT, first),)

    def _products(self, tasks: Tensor | None = None) -> Tensor:
        cols: Tensor = self.prefix_task_cols
        rows: Tensor = self.prefix_task_rows
        if tasks is not None:
            cols, rows = cols[tasks], rows[tasks]
        return self.embedding.weight * torch.matmul(cols, rows)

    def slots(self) -> dict[str, Slot]:
        """Return the slots of the tensors in a file: the shared prompt, and both factors of all tasks."""
        return {TABLE: Slot.of(self.embedding, "weight"), COLS: Slot.of(self, COLS), ROWS: Slot.of(self, ROWS)}


class MultitaskPromptTuner(TunerBase):
    """Prepends to each row that uses the adapter the prompt of the row's task."""

    start_fields: ClassVar[frozenset[str]] = START_FIELDS | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"}

    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        """Plan a `MultitaskPromptEmbedding`, mounted beside the base.

        Raises:
            ConfigError, ModelError: the prompt's dimensions can't be read from the configs, or do not fit the base.
        """
        found = dimensions.resolve(base, config)
        vocabulary = Vocabulary.of(base) if needs_vocabulary(config) and not config.inference_mode else None
        build = partial(MultitaskPromptEmbedding, config, dimensions.size(config, found), vocabulary, dimensions.is_encoder_decoder(base))
        return Plan(mounts={"prompt_encoder": build}, resolved=found)

    def prepare(self, call: Call) -> Call:
        """Return the call with the prompts of the tasks `task_ids` (batch,) as virtual tokens; entries of rows without such an adapter are ignored.

        Raises:
            RoutingError: `task_ids` is missing, does not have one entry for each row, or contains a number that is not a task.
        """
        encoders: Mapping[str, Any] = self.mounted.get("prompt_encoder", {})
        task_ids: Tensor | None = None
        for adapter, rows in call.share(encoders):
            encoder = encoders[adapter]
            if task_ids is None:
                task_ids = _read(call, adapter)
            row_tasks = task_ids[rows] if isinstance(rows, Tensor) else task_ids
            same = None if torch.compiler.is_compiling() else _check(row_tasks, encoder.tasks, adapter)
            compute = partial(encoder, "tokens", row_tasks, same)
            for site, embeds in compute() if same is None else self.selection.cached_result("tokens", encoder, compute, key=same):
                call = call.adding(VirtualTokens(rows, site=site, embeds=embeds))
        return call


def _read(call: Call, adapter: str) -> Tensor:
    """Return `task_ids` as a tensor (batch,) of int64; in a step of `generate`, each entry is repeated for the beams of its row."""
    given = call.arguments.get(ARGUMENT)
    if given is None:
        raise RoutingError(
            f"task_ids cannot be None: each task of the adapter {adapter!r} has a prompt of its own", hint="pass task_ids=tensor of shape (batch,)"
        )
    ids = given if isinstance(given, Tensor) else torch.as_tensor(given)
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype is torch.bool:
        raise RoutingError(f"task_ids is {tuple(ids.shape)} of {ids.dtype}, not (batch,) of integers", hint="give one number per row")
    repeat, rest = divmod(call.batch, ids.shape[0]) if ids.shape[0] else (0, 1)
    if rest or (repeat != 1 and not (call.generating and repeat)):
        raise RoutingError(f"task_ids has {ids.shape[0]} entries, but the batch has {call.batch} rows", hint="give one number per row")
    ids = ids.to(device=call.device, dtype=torch.long)
    return ids if repeat == 1 else ids.repeat_interleave(repeat)


def _check(ids: Tensor, tasks: int, adapter: str) -> int | None:
    """Check that the task ids are below `tasks`, and return the task of all rows; None if the rows have different tasks."""
    found = set(ids.tolist())
    unknown = sorted(task for task in found if not 0 <= task < tasks)
    if unknown:
        raise RoutingError(
            f"task_ids names the task {unknown[0]}, but the adapter {adapter!r} has {tasks}", hint=f"give numbers from 0 to {tasks - 1}"
        )
    return int(found.pop()) if len(found) == 1 else None
