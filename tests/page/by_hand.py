"""What a model with virtual tokens must compute, put together by hand: the bare base, called with the prompt before the text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from page.making import EMBEDDINGS, LAYERS, TASK_IDS, N, inputs, tiny
from peft_core import PeftModel

IGNORED = -100
HEADS = ("classifier", "score", "qa_outputs")
CONTEXT_LABELS = [IGNORED, IGNORED, IGNORED, 8]  # CPT: the token of type 4 counts in the loss


def bare(model: PeftModel, base: str) -> Any:
    """Return the base without adapters, with the head that the adapter trained."""
    plain: Any = tiny(base)
    for name in HEADS:
        if hasattr(plain, name):
            trained: Any = getattr(model.get_base_model(), name)
            getattr(plain, name).load_state_dict(trained.modules_to_save["default"].state_dict())
    return plain


def prompt_of(model: Any, kind: str) -> Any:
    """Return the virtual tokens for the rows of `inputs`."""
    return model.get_prompt(2, **({"task_ids": TASK_IDS} if kind == "multitask" else {}))


def before(prompt: Tensor, text: Tensor) -> Tensor:
    """Return one sequence of virtual tokens and text."""
    return torch.cat([prompt, text], dim=1)


def whole(model: PeftModel, base: str, kind: str, **more: Any) -> Any:
    """Return the output for virtual tokens and text together, with those of the virtual tokens in it."""
    if kind in LAYERS:
        return model.get_base_model()(**inputs(base), **more)
    plain, given, prompt = bare(model, base), {**inputs(base), **more}, prompt_of(model, kind)
    two = base in ("t5", "bart")
    if kind not in EMBEDDINGS:
        if not two:
            given["attention_mask"] = before(torch.ones(2, N, dtype=torch.long), given["attention_mask"])
        return plain(**given, past_key_values=prompt)
    ids = given.pop("input_ids")
    given["inputs_embeds"] = before(prompt[:, :N], plain.get_input_embeddings()(ids))
    given["attention_mask"] = before(torch.ones(2, N, dtype=torch.long), given["attention_mask"])
    if two and kind == "multitask":
        given["decoder_inputs_embeds"] = before(prompt[:, N:], plain.get_input_embeddings()(given.pop("decoder_input_ids")))
    return plain(**given)


def labels_of(base: str) -> dict[str, Tensor]:
    """Return the labels of a task."""
    if base.endswith("seq-cls"):
        return {"labels": torch.tensor([2, 0])}
    if base == "bert-token-cls":
        return {"labels": torch.tensor([[0, 1, 2, IGNORED, 1, 0], [2, 2, 0, 1, IGNORED, 0]])}
    if base == "bert-qa":
        return {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([3, 5])}
    if base in ("t5", "bart"):
        return {"labels": torch.tensor([[7, 3, 2, 9], [4, 4, 8, IGNORED]])}
    return {"labels": torch.tensor([[3, 1, IGNORED, 1, 5, 9], [9, 2, 6, 5, 3, 5]])}


def loss(output: Any, base: str, kind: str) -> Tensor:
    """Return the loss of `labels_of`, given the output of `whole`."""
    labels, lead = labels_of(base), N if kind in EMBEDDINGS else 0
    if base == "bert-qa":
        start, end = (F.cross_entropy(output[f"{name}_logits"], labels[f"{name}_positions"] + lead) for name in ("start", "end"))
        return (start + end) / 2
    target, logits = labels["labels"], output.logits
    if base == "bert-token-cls":
        return F.cross_entropy(logits[:, lead:].flatten(0, 1), target.flatten())
    if base in ("t5", "bart"):
        return F.cross_entropy(logits[:, -target.shape[1] :].flatten(0, 1), target.flatten())
    if base.endswith("seq-cls"):
        return F.cross_entropy(logits, target)
    return loss_of(logits, target, CONTEXT_LABELS if kind == "cpt" else [IGNORED] * lead)


def loss_of(logits: Tensor, labels: Tensor, virtual: list[int] = CONTEXT_LABELS) -> Tensor:
    """Return the loss of the next token, given labels of the virtual tokens and of the text."""
    target = torch.cat([torch.tensor(virtual, dtype=torch.long).expand(2, -1), labels], dim=1)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())


def classified(plain: nn.Module, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return what a classifier makes of a text behind keys and values: its backbone by itself, then dropout and head."""
    output = plain.get_submodule("bert")(input_ids=ids, attention_mask=before(torch.ones(2, N, dtype=torch.long), mask), past_key_values=cache)
    states = output[1] if len(output) > 1 and output[1].ndim == 2 else output[0]
    head = next(getattr(plain, name) for name in HEADS if hasattr(plain, name))
    result: Tensor = head(plain.get_submodule("dropout")(states) if hasattr(plain, "dropout") else states)
    return result
