"""What each task means for a call with virtual tokens: which heads are saved, what happens to labels and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import TaskType
from .call import Output

IGNORED = -100


def _keep(inputs: dict[str, Any], extra: int) -> dict[str, Any]:
    return inputs


def _pad_labels(inputs: dict[str, Any], extra: int) -> dict[str, Any]:
    """Put `extra` labels that the loss ignores before `labels` (batch, tokens)."""
    labels = inputs.get("labels")
    if isinstance(labels, Tensor):
        padding = labels.new_full((labels.shape[0], extra), IGNORED)
        inputs["labels"] = torch.cat([padding, labels], dim=1)
    return inputs


def _shift_positions(inputs: dict[str, Any], extra: int) -> dict[str, Any]:
    """Move answer positions (batch,) behind the virtual tokens."""
    for name in ("start_positions", "end_positions"):
        if isinstance(inputs.get(name), Tensor):
            inputs[name] = inputs[name] + extra
    return inputs


@dataclass(frozen=True)
class TaskSpec:
    """One task.

    Args:
        name: as in `TaskType`.
        heads: names of heads that are trained and saved whole where the base has them.
        extend: adapts labels to virtual embeddings that lengthen the sequence.
        per_token: fields of the output with one entry per token, (batch, tokens, …), that are cut back to the caller's tokens.
        generates: the base must be able to generate.
    """

    name: str
    heads: tuple[str, ...] = ()
    extend: Callable[[dict[str, Any], int], dict[str, Any]] = _keep
    per_token: tuple[str, ...] = ()
    generates: bool = False

    def cut(self, output: Output, extra: int) -> Output:
        """Return `output` without the entries of `extra` leading virtual tokens."""
        if not extra or not self.per_token:
            return output
        for name in self.per_token:
            value = output.get(name) if isinstance(output, Mapping) else None
            if isinstance(value, Tensor):
                output[name] = value[:, extra:]
        return output


NO_TASK = TaskSpec("")

TASKS: Mapping[str, TaskSpec] = {
    task.name: task
    for task in (
        TaskSpec(TaskType.CAUSAL_LM.value, extend=_pad_labels, generates=True),
        TaskSpec(TaskType.SEQ_2_SEQ_LM.value, generates=True),
        TaskSpec(TaskType.SEQ_CLS.value, heads=("classifier", "score")),
        TaskSpec(TaskType.TOKEN_CLS.value, heads=("classifier", "score"), extend=_pad_labels, per_token=("logits",)),
        TaskSpec(TaskType.QUESTION_ANS.value, heads=("qa_outputs",), extend=_shift_positions, per_token=("start_logits", "end_logits")),
        TaskSpec(TaskType.FEATURE_EXTRACTION.value),
    )
}


def task_of(task_type: Any) -> TaskSpec:
    """Return the task for a config's `task_type`; `NO_TASK` for None."""
    return TASKS.get(str(task_type), NO_TASK) if task_type is not None else NO_TASK
