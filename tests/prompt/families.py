"""The model families and the prompt methods that the tests go through together."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import PeftModel, get_peft_config, get_peft_model
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise

N = 4  # virtual tokens


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        name: of the tiny model.
        task: its task.
        two: it has an encoder and a decoder.
        causal: it is a decoder alone.
    """

    name: str
    task: str
    two: bool = False
    causal: bool = False

    def bare(self) -> nn.Module:
        """Return the model without adapters."""
        return tiny(self.name)

    def inputs(self, rows: int = 2, tokens: int = 6) -> dict[str, Tensor]:
        """Return token ids, the same each time."""
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(2, 64, (rows, tokens), generator=generator)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.two:
            found["decoder_input_ids"] = torch.randint(2, 64, (rows, 5), generator=generator)
        return found

    def labels(self, rows: int = 2, tokens: int = 6) -> dict[str, Tensor]:
        """Return labels of the task."""
        generator = torch.Generator().manual_seed(4)
        if self.task == "SEQ_CLS":
            return {"labels": torch.tensor([2, 0])[:rows]}
        if self.task == "TOKEN_CLS":
            return {"labels": torch.randint(0, 3, (rows, tokens), generator=generator)}
        if self.task == "QUESTION_ANS":
            return {"start_positions": torch.tensor([1, 0])[:rows], "end_positions": torch.tensor([3, 5])[:rows]}
        return {"labels": torch.randint(2, 64, (rows, 5 if self.two else tokens), generator=generator)}


@dataclass(frozen=True)
class Method:
    """One way to learn virtual tokens.

    Args:
        config: entries of its config.
        keys_values: it offers keys and values, not embeddings.
        arguments: keywords of a call, for two rows.
        causal: it is for decoders alone.
        decoder: on models with an encoder and a decoder, it has tokens of its own for the decoder.
    """

    config: dict[str, Any]
    keys_values: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    causal: bool = False
    decoder: bool = False


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "CAUSAL_LM", causal=True),
        Family("gpt2", "CAUSAL_LM", causal=True),
        Family("gemma3", "CAUSAL_LM", causal=True),
        Family("llama-seq-cls", "SEQ_CLS"),
        Family("bert-seq-cls", "SEQ_CLS"),
        Family("roberta-seq-cls", "SEQ_CLS"),
        Family("bert-token-cls", "TOKEN_CLS"),
        Family("bert-qa", "QUESTION_ANS"),
        Family("bert", "FEATURE_EXTRACTION"),
        Family("t5", "SEQ_2_SEQ_LM", two=True),
        Family("bart", "SEQ_2_SEQ_LM", two=True),
    )
}
METHODS = {
    "prompt": Method({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": N}),
    "prefix": Method({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": N}, keys_values=True),
    "prefix-projected": Method(
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": N, "prefix_projection": True, "encoder_hidden_size": 12}, keys_values=True
    ),
    "p-tuning-mlp": Method({"peft_type": "P_TUNING", "num_virtual_tokens": N, "encoder_hidden_size": 12}),
    "p-tuning-lstm": Method(
        {
            "peft_type": "P_TUNING",
            "num_virtual_tokens": N,
            "encoder_hidden_size": 12,
            "encoder_reparameterization_type": "LSTM",
            "encoder_num_layers": 1,
        }
    ),
    "multitask": Method(
        {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": N, "num_tasks": 3, "num_ranks": 2},
        arguments={"task_ids": torch.tensor([2, 0])},
        decoder=True,
    ),
    "cpt": Method(
        {"peft_type": "CPT", "cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
        causal=True,
    ),
}


def fits(method: Method, family: Family) -> bool:
    """Return whether a method is for a family."""
    return family.causal or not method.causal


def made(method: str, family: str, **extra: Any) -> PeftModel:
    """Return a model with one adapter whose weights are not at their start."""
    torch.manual_seed(0)
    config = get_peft_config({"task_type": FAMILIES[family].task, **METHODS[method].config, **extra})
    model = get_peft_model(FAMILIES[family].bare(), config)
    randomise(model, "default", 5)
    return model.eval()


def reference(model: PeftModel, method: Method, family: Family, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Return the output of the bare base for what the virtual tokens and the text are together, built by hand from `get_prompt`."""
    bare: Any = family.bare()
    for head in ("classifier", "qa_outputs", "score"):  # trained whole, beside the virtual tokens
        if hasattr(bare, head):
            trained: Any = getattr(model.get_base_model(), head)
            getattr(bare, head).load_state_dict(trained.modules_to_save["default"].state_dict())
    rows = inputs["input_ids"].shape[0]
    prompt = model.get_prompt(rows, **{name: value[:rows] for name, value in method.arguments.items()})
    given = dict(inputs)
    ones = torch.ones(rows, N, dtype=torch.long)
    if method.keys_values:
        if not family.two:
            given["attention_mask"] = torch.cat([ones, given["attention_mask"]], dim=1)
        taken = inspect.signature(type(bare).forward).parameters
        if "past_key_values" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):  # transformers 4: the backbone's forward does
            backbone = next(bare.children())
            backbone.forward = functools.partial(backbone.forward, past_key_values=prompt)
            return bare(**given, **options)
        return bare(**given, **options, past_key_values=prompt)
    ids = given.pop("input_ids")
    given["inputs_embeds"] = torch.cat([prompt[:, :N], bare.get_input_embeddings()(ids)], dim=1)
    given["attention_mask"] = torch.cat([ones, given["attention_mask"]], dim=1)
    if family.two and method.decoder:
        words = bare.get_decoder().embed_tokens(given.pop("decoder_input_ids"))
        given["decoder_inputs_embeds"] = torch.cat([prompt[:, N:], words], dim=1)
    return bare(**given, **options)
