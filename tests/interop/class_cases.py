"""The cells of the table class x tuner: every task class with every adapter, made by either library from the same arguments.

`CELLS` has what the peer can train, save and load; `REFUSED` has the rest, with the peer's words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interop.cases import Case, batch, outputs, peer, using

N = 4  # virtual tokens
TOKENS = [5, 30, 9]
#: task -> bases on which its class is tried: an encoder and a decoder; encoder-decoders that count positions in either way
BASES: dict[str | None, tuple[str, ...]] = {
    None: ("llama", "bert"),
    "SEQ_CLS": ("bert-cls", "llama-cls"),
    "TOKEN_CLS": ("bert-token", "llama-token"),
    "QUESTION_ANS": ("bert-qa", "llama-qa"),
    "CAUSAL_LM": ("llama", "gpt2"),
    "SEQ_2_SEQ_LM": ("t5", "bart"),
    "FEATURE_EXTRACTION": ("bert", "llama-features"),
}
#: more bases, of which the peer has not all adapters: test_class_others.py
OTHER_BASES: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("gpt2-cls", "t5-cls", "bart-cls"),
    "TOKEN_CLS": ("gpt2-token", "t5-token"),
    "QUESTION_ANS": ("gpt2-qa", "t5-qa", "bart-qa"),
    "FEATURE_EXTRACTION": ("t5-features", "bart-features"),
}
CLASS_OF: dict[str | None, str] = {None: "PeftModel", **{task: cls.__name__ for task, cls in peer.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()}}
TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "gpt2": ["c_attn"], "t5": ["q", "v"], "bart": ["q_proj", "v_proj"]}
#: a module in the middle, saved whole
SAVED = {"llama": "down_proj", "bert": "intermediate.dense", "gpt2": "mlp.c_proj", "t5": "wo", "bart": "fc2"}
_LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6}
_CONTEXT = {"cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1] * N, "cpt_tokens_type_mask": [1, 2, 3, 4], "opt_projection_epsilon": 0.5}
#: tuner -> its config class and options; `...` stands for the module that is saved whole
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", _LORA),
    "dora": ("LoraConfig", {**_LORA, "use_dora": True}),
    "lora-saved": ("LoraConfig", {**_LORA, "modules_to_save": ...}),
    "lora-tokens": ("LoraConfig", {**_LORA, "trainable_token_indices": TOKENS}),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "loha-saved": ("LoHaConfig", {"r": 3, "alpha": 5, "modules_to_save": ...}),
    "tokens": ("TrainableTokensConfig", {"token_indices": TOKENS}),
}
#: virtual tokens that are embeddings: outputs are longer
EMBEDDINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "prompt-saved": ("PromptTuningConfig", {"modules_to_save": ...}),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 6}),
    "p-tuning-lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
    "cpt": ("CPTConfig", _CONTEXT),
}
PREFIXES: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("PrefixTuningConfig", {}),
    "prefix-projection": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 6}),
    "prefix-saved": ("PrefixTuningConfig", {"modules_to_save": ...}),
}
TUNERS = {**LAYERS, **EMBEDDINGS, **PREFIXES}


def cell(task: str | None, base: str, tuner: str, **more: Any) -> Case:
    """Return one cell: this adapter in the class of this task, on this base."""
    family = base.split("-")[0]
    config, options = TUNERS[tuner]
    options = {"task_type": task, **options}
    if tuner in LAYERS and tuner != "tokens":
        options["target_modules"] = TARGETS[family]
        if family == "gpt2" and config == "LoraConfig":
            options["fan_in_fan_out"] = True
    if tuner not in LAYERS and config != "CPTConfig":
        options["num_virtual_tokens"] = N
    if options.get("modules_to_save") is ...:
        options["modules_to_save"] = [SAVED[family]]
    return Case(id=f"{CLASS_OF[task]}-{base}-{tuner}", base=base, config=config, options={**options, **more})


def task_of(case: Case) -> str | None:
    """Return the task of a cell."""
    task: str | None = case.options["task_type"]
    return task


def is_embedding(case: Case) -> bool:
    """Return whether the adapter's virtual tokens are embeddings."""
    return case.config in {config for config, _ in EMBEDDINGS.values()}


def virtual_tokens(case: Case) -> int:
    """Return how many virtual tokens the adapter of a cell has."""
    given = case.options.get("num_virtual_tokens") or len(case.options.get("cpt_token_ids", ()))
    return int(given)


#: config class -> what the second adapter of a model has otherwise
SECOND: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2, "lora_alpha": 7},
    "LoHaConfig": {"r": 2, "alpha": 7},
    "TrainableTokensConfig": {"token_indices": [7, 11]},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
    "PromptEncoderConfig": {"num_virtual_tokens": 3},
    "MultitaskPromptTuningConfig": {"num_virtual_tokens": 3},
    "CPTConfig": {"cpt_token_ids": [9, 8, 7], "cpt_mask": [1] * 3, "cpt_tokens_type_mask": [1, 2, 4]},
}


def second(case: Case) -> Case:
    """Return the case of a second adapter of the same kind."""
    other = dict(SECOND[case.config])
    if "trainable_token_indices" in case.options:
        other["trainable_token_indices"] = [7, 11]  # rows of two adapters in use at once must not overlap
    return Case(id=f"{case.id}-second", base=case.base, config=case.config, options={**case.options, **other})


def refusal(task: str | None, base: str, tuner: str) -> tuple[type[Exception], str] | None:
    """Return what the peer says of a cell that it does not have when the model is made; None if it has it."""
    if tuner == "cpt" and task != "CAUSAL_LM":
        return ValueError, "CPTConfig only supports task_type = CAUSAL_LM"
    if task is None and tuner not in LAYERS:
        return KeyError, "None"
    if tuner in ("loha", "loha-saved") and base.startswith("gpt2"):
        return TypeError, "Target module of type .*Conv1D'> not supported"
    if tuner == "tokens" and task in ("TOKEN_CLS", "QUESTION_ANS"):
        return TypeError, "'NoneType' object is not iterable"  # heads are added to a list that this config does not have
    return None


def rows_without_head(task: str | None, tuner: str) -> bool:
    """Return whether the peer, which builds the cell, saves no head with it, as ours does."""
    return tuner == "tokens" and task == "SEQ_CLS"


def refused_call(task: str | None, tuner: str) -> tuple[type[Exception], str] | None:
    """Return what the peer says when it is called, of a cell which it builds and saves."""
    if tuner == "multitask" and task in ("QUESTION_ANS", "FEATURE_EXTRACTION"):
        return ValueError, "task_ids cannot be None"  # though they are given
    return None


_TABLE = [(task, base, tuner) for task, bases in BASES.items() for base in bases for tuner in TUNERS]
CELLS = [
    cell(*place) for place in _TABLE if not refusal(*place) and not refused_call(place[0], place[2]) and not rows_without_head(place[0], place[2])
]
REFUSED = {case.id: (case, error) for place in _TABLE for case, error in [(cell(*place), refusal(*place))] if error}
REFUSED_CALLS = {case.id: (case, error) for place in _TABLE for case, error in [(cell(*place), refused_call(place[0], place[2]))] if error}


# ---- inputs and outputs ----------------------------------------------------------------------------------------------
def is_bare(case: Case) -> bool:
    """Return whether the base has no head, and so no labels."""
    return case.base == "bert" or case.base.endswith("-features")


def has_labels(case: Case) -> bool:
    """Return whether both libraries make the same loss of labels: not for features; not behind embeddings where labels have places (§12.11)."""
    places = task_of(case) in ("TOKEN_CLS", "QUESTION_ANS")
    return not is_bare(case) and not (places and is_embedding(case))


def bears_padding(case: Case) -> bool:
    """Return whether both libraries make the same of padding.

    A decoder that classifies reads a pad behind embeddings in the peer, and the last token in ours.
    """
    return not (case.base in ("llama-cls", "gpt2-cls") and is_embedding(case))


def inputs_of(case: Case, *, seed: int = 0, labels: bool = False, padded: bool = False) -> dict[str, Tensor]:
    """Return inputs for the base of a cell; one token of each row is among the trained ones."""
    inputs = batch(case.base, seed, labels=labels, padded=padded)
    inputs["input_ids"][:, 1] = torch.tensor(TOKENS)
    if case.base in ("t5-cls", "bart-cls"):  # these classify by the end of the text
        ends = inputs["attention_mask"].sum(dim=1) - 1
        inputs["input_ids"][torch.arange(len(ends)), ends] = 2
    if is_bare(case):
        inputs.pop("labels", None)
    if case.config == "MultitaskPromptTuningConfig":
        inputs["task_ids"] = torch.tensor([2, 0, 1])
    return inputs


def shown(library: Any, model: Any, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's outputs; those of the peer are cut where it leaves those of virtual tokens in front (api.md §12.11)."""
    found = outputs(library, model, inputs)
    if library is peer and is_embedding(case) and task_of(case) in ("TOKEN_CLS", "QUESTION_ANS"):
        length = inputs["input_ids"].shape[1]
        for name, value in found.items():
            if value.dim() > 1:
                n = virtual_tokens(case)
                assert value.shape[1] == n + length
                found[name] = value[:, n:]
    return found


def views(library: Any, model: Any, case: Case) -> dict[str, Tensor]:
    """Return all that a cell is compared by: outputs with padding, and without it those with the loss."""
    found = {}
    seq2seq_tasks = case.config == "MultitaskPromptTuningConfig" and case.base in ("t5", "bart")
    if bears_padding(case):  # the peer needs labels of encoder-decoders to know the decoder's tokens, if there are tasks
        padded = shown(library, model, case, inputs_of(case, padded=True, labels=seq2seq_tasks))
        found |= {f"padded {name}": value for name, value in padded.items()}
    whole = shown(library, model, case, inputs_of(case, seed=1, labels=has_labels(case) or seq2seq_tasks))
    assert ("loss" in whole) == has_labels(case)
    return {**found, **whole}


def train(library: Any, model: nn.Module, case: Case, steps: int = 2) -> list[float]:
    """Take steps on batches of their own, and return the losses; without labels, half of the features are to become small."""
    model.train()
    torch.manual_seed(17)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, eps=1e-3)
    losses = []
    for step in range(steps):
        inputs = inputs_of(case, seed=step, labels=has_labels(case))
        with using(library):
            found = model(**inputs)
            loss = found["loss"] if has_labels(case) else _size(found, inputs["input_ids"].shape[1])
            loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def _size(found: Any, length: int) -> Tensor:
    """Return the mean square of half of the outputs of the text (half: what is normalised has the same size whatever is learnt)."""
    values = [found[name] for name in ("logits", "start_logits", "end_logits", "last_hidden_state") if found.get(name) is not None]
    return torch.stack([value[:, -length:, ...][..., ::2].square().mean() for value in values]).sum()
