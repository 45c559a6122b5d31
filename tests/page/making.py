"""What the rows of the page are tried on: one small adapter of each kind, on tiny models."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import peft_core
from peft_core.testing import helpers, models
from peft_core.testing.helpers import tensor_of

N = 4  # virtual tokens
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [9, 2, 6, 5, 3, 5]])
TASK_IDS = torch.tensor([2, 0])
#: kind → its config; targets are the default ones of the base
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 2, "lora_alpha": 4},
    "loha": {"peft_type": "LOHA", "r": 2, "alpha": 3},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": N},
    "p-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": N, "encoder_hidden_size": 8},
    "multitask": {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": N, "num_tasks": 3, "num_ranks": 2},
    "cpt": {"peft_type": "CPT", "cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1] * N, "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": N},
    "prefix-projection": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": N, "prefix_projection": True, "encoder_hidden_size": 8},
}
TASKS: dict[str, str | None] = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "bert-seq-cls": "SEQ_CLS",
    "llama-seq-cls": "SEQ_CLS",
    "bert-token-cls": "TOKEN_CLS",
    "bert-qa": "QUESTION_ANS",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
    "bert": "FEATURE_EXTRACTION",
}
LAYERS = ("lora", "loha")
EMBEDDINGS = ("prompt", "p-tuning", "multitask", "cpt")
PROMPTS = (*EMBEDDINGS, "prefix")
#: one kind of each sort: weights in layers, embeddings, keys and values
SORTS = ("lora", "loha", "prompt", "prefix")
ALL = (*LAYERS, *PROMPTS)
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"], "t5": ["q", "v"], "bart": ["q_proj", "v_proj"]}

# what the base has, and the fields of a method's config, are in no type: models and configs are `Any` here
get_peft_config: Any = peft_core.get_peft_config
get_peft_model: Any = peft_core.get_peft_model
inject_adapter_in_model: Any = peft_core.inject_adapter_in_model
PeftModel: Any = peft_core.PeftModel


def tiny(name: str = "llama", seed: int = 0) -> Any:
    """Return a tiny model, with the same weights each time."""
    return models.tiny(name, seed)


def parameters_of(model: Any, adapter: str) -> dict[str, nn.Parameter]:
    """Return an adapter's parameters under unique names."""
    return helpers.parameters_of(model, adapter)


def randomise(model: Any, adapter: str, seed: int) -> None:
    """Give an adapter's parameters random values, the same for the same seed."""
    helpers.randomise(model, adapter, seed)


def trainability(model: nn.Module) -> dict[str, bool]:
    """Return which parameters train."""
    return helpers.trainability(model)


Check = TypeVar("Check", bound=Callable[..., None])


def over(*kinds: str) -> Callable[[Check], Check]:
    """Mark a check that takes `kind`: it is made for each of these."""

    def mark(check: Check) -> Check:
        check.kinds = kinds  # type: ignore[attr-defined]
        return check

    return mark


def config(kind: str = "lora", base: str = "llama", **more: Any) -> Any:
    """Return a fresh config of a kind, for the task of a base."""
    values = {**CONFIGS[kind], "task_type": TASKS[base], **more}
    if kind in LAYERS:
        values.setdefault("target_modules", list(TARGETS[base.split("-")[0]]))
        if base == "gpt2" and kind == "lora":
            values.setdefault("fan_in_fan_out", True)
    return get_peft_config(values)


def fresh(kind: str = "lora", base: str = "llama", name: str = "default", **more: Any) -> Any:
    """Return a model with one adapter as it is made."""
    torch.manual_seed(0)
    return get_peft_model(tiny(base), config(kind, base, **more), name)


def made(kind: str = "lora", base: str = "llama", name: str = "default", **more: Any) -> Any:
    """Return a model, for evaluation, with one adapter that does something."""
    model = fresh(kind, base, name, **more)
    randomise(model, name, 5)
    return model.eval()


def pair(kind: str = "lora", other: str | None = None, base: str = "llama", **more: Any) -> Any:
    """Return a model with the adapters ``a`` (in use) and ``b``, which do something."""
    model = made(kind, base, "a", **more)
    model.add_adapter("b", config(other or kind, base))
    randomise(model, "b", 6)
    return model.eval()


def mixed(*kinds: str, base: str = "llama") -> Any:
    """Return a mixed model with adapters that are named as their kinds."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(base), config(kinds[0], base), kinds[0], mixed=True)
    for kind in kinds[1:]:
        model.add_adapter(kind, config(kind, base))
    for number, kind in enumerate(kinds):
        randomise(model, kind, number)
    return model.eval()


def inputs(base: str = "llama", kind: str = "lora") -> dict[str, Tensor]:
    """Return the inputs of a call, the same each time."""
    found = {"input_ids": IDS.clone(), "attention_mask": torch.ones_like(IDS)}
    if base in ("t5", "bart"):
        found["decoder_input_ids"] = IDS[:, :4].clone()
    if kind == "multitask":
        found["task_ids"] = TASK_IDS
    return found


@torch.no_grad()
def run(model: Any, base: str = "llama", kind: str = "lora", **more: Any) -> Tensor:
    """Return what a model computes of the inputs, as one tensor."""
    return tensor_of(model(**inputs(base, kind), **more))


def same(left: Tensor, right: Tensor, *, atol: float = 1e-5) -> bool:
    """Return whether two tensors have one shape and nearly equal values."""
    return left.shape == right.shape and torch.allclose(left, right, atol=atol, rtol=1e-4)


def trains(model: Any, adapter: str) -> bool:
    """Return whether an adapter's parameters train; all must agree."""
    flags = {parameter.requires_grad for parameter in parameters_of(model, adapter).values()}
    assert len(flags) == 1, flags
    return flags.pop()


@contextmanager
def warned(match: str = "", times: int = 1) -> Iterator[None]:
    """Check that the block warns so many times with these words, and of nothing else."""
    import re

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    words = [str(entry.message) for entry in caught]
    assert len(words) == times, words
    assert all(re.search(match, text) for text in words), words


@contextmanager
def refused(kind: type[BaseException], match: str | None = None) -> Iterator[None]:
    """Check that the block raises the error that the page names; ours are also a `PeftError`."""
    from peft_core import PeftError

    with pytest.raises(kind, match=match) as caught:
        yield
    assert isinstance(caught.value, PeftError), repr(caught.value)
