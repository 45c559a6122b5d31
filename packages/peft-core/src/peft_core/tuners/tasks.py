"""The settings of each task: which heads are saved, and how labels and outputs change in a call with virtual tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import TaskType
from .call import Output

IGNORED = -100


Lead = int | Tensor


def _keep(inputs: dict[str, Any], lead: Lead) -> dict[str, Any]:
    return inputs


def _shift_positions(inputs: dict[str, Any], lead: Lead) -> dict[str, Any]:
    """Add the number of virtual tokens, `lead`, to the answer positions (batch,)."""
    for name in ("start_positions", "end_positions"):
        if isinstance(inputs.get(name), Tensor):
            inputs[name] = inputs[name] + lead
    return inputs


@dataclass(frozen=True)
class TaskSpec:
    """The settings of one task.

    Args:
        name: the task's name, as in `TaskType`.
        heads: names of heads that are trained and saved as a whole if the base has them.
        token_labels: `labels` have one entry per token (batch, tokens): virtual tokens get `IGNORED`. None: decided by the labels' shape.
        shift: adapts other labels to the number of virtual embeddings before the text: one number, or one per row (batch,).
        per_token: fields of the output with one entry per token, (batch, tokens, …), that are cut back to the caller's tokens.
        generates: the base must be able to generate.
        pools: the output is one prediction for the whole text, which decoder models compute at the last token.
    """

    name: str
    heads: tuple[str, ...] = ()
    token_labels: bool | None = False
    shift: Callable[[dict[str, Any], Lead], dict[str, Any]] = _keep
    per_token: tuple[str, ...] = ()
    generates: bool = False
    pools: bool = False

    def labels_each_token(self, labels: Any, text: tuple[int, ...]) -> bool:
        """Return whether the labels of a call have one entry per token of its text (batch, tokens).

        Without a task, the answer is True if the labels have the shape of the text and are not floating-point: a classifier's floating-point
        labels (batch, classes) could have this shape by chance.
        """
        if not isinstance(labels, Tensor) or self.token_labels is not None:
            return isinstance(labels, Tensor) and bool(self.token_labels)
        return not labels.is_floating_point() and tuple(labels.shape) == text

    def cut(self, output: Output, lead: Lead, length: int) -> Output:
        """Return `output` with the entries for virtual tokens removed from the `per_token` fields.

        Args:
            output: the output of the base.
            lead: number of virtual tokens before the text: one number, or one per row (batch,).
            length: number of the caller's tokens.
        """
        if isinstance(lead, int) and not lead:
            return output
        for name in self.per_token:
            value = output.get(name) if isinstance(output, Mapping) else None
            if not isinstance(value, Tensor):
                continue
            if isinstance(lead, int):
                output[name] = value[:, lead : lead + length]
            else:
                at = lead.unsqueeze(1) + torch.arange(length, device=value.device)
                output[name] = value.gather(1, at.view(*at.shape, *[1] * (value.ndim - 2)).expand(*at.shape, *value.shape[2:]))
        return output


NO_TASK = TaskSpec("", token_labels=None)

TASKS: Mapping[str, TaskSpec] = {
    task.name: task
    for task in (
        TaskSpec(TaskType.CAUSAL_LM.value, token_labels=True, generates=True),
        TaskSpec(TaskType.SEQ_2_SEQ_LM.value, generates=True),
        TaskSpec(TaskType.SEQ_CLS.value, heads=("classifier", "score"), pools=True),
        TaskSpec(TaskType.TOKEN_CLS.value, heads=("classifier", "score"), token_labels=True, per_token=("logits",)),
        TaskSpec(TaskType.QUESTION_ANS.value, heads=("qa_outputs",), shift=_shift_positions, per_token=("start_logits", "end_logits")),
        TaskSpec(TaskType.FEATURE_EXTRACTION.value),
    )
}


def task_of(task_type: Any) -> TaskSpec:
    """Return the task for a config's `task_type`; `NO_TASK` for None."""
    return TASKS.get(str(task_type), NO_TASK) if task_type is not None else NO_TASK


#: the usual names of heads; a config may also list head names of other architectures
HEADS = tuple(dict.fromkeys(head for task in TASKS.values() for head in task.heads))
