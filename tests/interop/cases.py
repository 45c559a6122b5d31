"""Tiny bases, and one adapter of each kind on them, made by either library from the same arguments."""

from __future__ import annotations

import contextlib
import copy
import importlib
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

peer = pytest.importorskip("peft", reason="the peer is installed by `nox -s interop` only")
assert peer.__version__ == "0.21.2", "the comparisons hold for this release"

ours = types.SimpleNamespace()
for _package in ("peft_core", "peft_lora", "peft_loha", "peft_prompt", "peft_tokens"):
    _module = importlib.import_module(_package)
    for _name in dir(_module):
        if not _name.startswith("_"):
            setattr(ours, _name, getattr(_module, _name))

LIBRARIES = {"ours": ours, "peer": peer}


@contextlib.contextmanager
def using(library: Any) -> Iterator[None]:
    """In the block the peer may warn about itself; ours may not (pytest turns its warnings into errors)."""
    if library is not peer:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- bases -----------------------------------------------------------------------------------------------------------
# Weights are larger than usual, so that a wrong adapter shows in the outputs.
_LLAMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # dropout stays at 0.1: the draws of both libraries then have to come in one order
}
_GPT2 = {
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_T5 = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "init_std": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA)),
    "llama-mha": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_LLAMA, "num_key_value_heads": 4})),
    "llama-bf16": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA)).to(torch.bfloat16),
    "llama-cls": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**_LLAMA, num_labels=3)),
    "llama-token": lambda: transformers.LlamaForTokenClassification(transformers.LlamaConfig(**_LLAMA, num_labels=3)),
    "llama-qa": lambda: transformers.LlamaForQuestionAnswering(transformers.LlamaConfig(**_LLAMA)),
    "llama-features": lambda: transformers.LlamaModel(transformers.LlamaConfig(**_LLAMA)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2)),
    "bert-cls": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**_BERT, num_labels=3)),
    "bert-token": lambda: transformers.BertForTokenClassification(transformers.BertConfig(**_BERT, num_labels=3)),
    "bert-qa": lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**_BERT)),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**_BERT)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**_BART)),
    "gpt2-cls": lambda: transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**_GPT2, num_labels=3)),
    "gpt2-token": lambda: transformers.GPT2ForTokenClassification(transformers.GPT2Config(**_GPT2, num_labels=3)),
    "gpt2-qa": lambda: transformers.GPT2ForQuestionAnswering(transformers.GPT2Config(**_GPT2)),
    "t5-cls": lambda: transformers.T5ForSequenceClassification(transformers.T5Config(**_T5, num_labels=3)),
    "t5-token": lambda: transformers.T5ForTokenClassification(transformers.T5Config(**_T5, num_labels=3)),
    "t5-qa": lambda: transformers.T5ForQuestionAnswering(transformers.T5Config(**_T5)),
    "t5-features": lambda: transformers.T5EncoderModel(transformers.T5Config(**_T5)),
    "bart-cls": lambda: transformers.BartForSequenceClassification(transformers.BartConfig(**_BART, num_labels=3)),
    "bart-qa": lambda: transformers.BartForQuestionAnswering(transformers.BartConfig(**_BART)),
    "bart-features": lambda: transformers.BartModel(transformers.BartConfig(**_BART)),
}


def base(name: str) -> nn.Module:
    """Return the base of this name; always the same weights."""
    torch.manual_seed(0)
    model = _BASES[name]()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):  # they start at zero, where a lost bias would not show
                parameter.normal_(std=0.1)
    return model.eval()


def batch(name: str, seed: int = 0, *, labels: bool = False, padded: bool = True) -> dict[str, Tensor]:
    """Return inputs for the base of this name: three rows, one of them padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 32, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 5:] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if name in ("t5", "bart"):
        target = torch.randint(3, 32, (3, 5), generator=generator)
        inputs |= {"labels": target} if labels else {"decoder_input_ids": target}
    elif labels and name.endswith("-cls"):
        inputs["labels"] = torch.randint(0, 3, (3,), generator=generator)
    elif labels and name.endswith("-token"):
        inputs["labels"] = torch.randint(0, 3, (3, 7), generator=generator).masked_fill(mask == 0, -100)
    elif labels and name.endswith("-qa"):
        inputs |= {key: torch.randint(0, 5, (3,), generator=generator) for key in ("start_positions", "end_positions")}
    elif labels:
        inputs["labels"] = ids.masked_fill(mask == 0, -100)
    return inputs


# ---- cases -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """One adapter on one base, for both libraries."""

    id: str
    base: str
    config: str
    options: dict[str, Any] = field(hash=False)
    #: arguments of `get_peft_model`
    how: dict[str, Any] = field(default_factory=dict, hash=False)

    def make_config(self, library: Any) -> Any:
        """Return the config as this library has it."""
        return getattr(library, self.config)(**copy.deepcopy(self.options))

    def make(self, library: Any, seed: int = 3, *, adapter: str = "default") -> Any:
        """Return a new base with a freshly initialised adapter."""
        model = base(self.base)
        with using(library):
            config = self.make_config(library)
            torch.manual_seed(seed)
            return library.get_peft_model(model, config, adapter, **self.how)

    def load(self, library: Any, folder: Any, **kwargs: Any) -> Any:
        """Return a new base with the adapter of a folder."""
        model = base(self.base)
        how = {key: value for key, value in self.how.items() if key == "autocast_adapter_dtype"}
        with using(library):
            return library.PeftModel.from_pretrained(model, folder, **how, **kwargs)


def lora(id: str, base: str, task: str | None = "CAUSAL_LM", *, how: dict[str, Any] | None = None, **options: Any) -> Case:
    options = {"r": 4, "lora_alpha": 6, "task_type": task, **options}
    return Case(id=f"lora-{id}", base=base, config="LoraConfig", options=options, how=how or {})


def loha(id: str, base: str, task: str | None = "CAUSAL_LM", **options: Any) -> Case:
    return Case(id=f"loha-{id}", base=base, config="LoHaConfig", options={"r": 3, "alpha": 5, "task_type": task, **options})


def prompt(id: str, base: str, task: str = "CAUSAL_LM", **options: Any) -> Case:
    return Case(id=f"prompt-{id}", base=base, config="PromptTuningConfig", options={"num_virtual_tokens": 4, "task_type": task, **options})


def prefix(id: str, base: str, task: str = "CAUSAL_LM", **options: Any) -> Case:
    return Case(id=f"prefix-{id}", base=base, config="PrefixTuningConfig", options={"num_virtual_tokens": 4, "task_type": task, **options})


_QV = ["q_proj", "v_proj"]
_ATTENTION = ["query", "value"]
LORA = [
    lora("linear", "llama", target_modules=_QV),
    lora("default-targets", "llama"),
    lora("all-linear", "llama", target_modules="all-linear"),
    lora("regex", "llama", target_modules=r".*\.(q|k)_proj"),
    lora("exclude", "llama", target_modules=["q_proj", "down_proj"], exclude_modules=["layers.0.self_attn.q_proj"]),
    lora("some-layers", "llama", target_modules=_QV, layers_to_transform=[1], layers_pattern="layers"),
    lora("no-init", "llama", target_modules=_QV, init_lora_weights=False),
    lora("gaussian", "llama", target_modules=_QV, init_lora_weights="gaussian"),
    lora("rslora", "llama", target_modules=_QV, use_rslora=True),
    lora(
        "patterns",
        "llama",
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 5},
        alpha_pattern={"v_proj": 9, "layers.0.self_attn.q_proj": 1},
    ),
    lora("rslora-patterns", "llama", target_modules=_QV, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 9}),
    lora("dropout", "llama", target_modules=_QV, lora_dropout=0.3),
    lora("embedding", "llama", target_modules=["embed_tokens", "q_proj"]),
    lora("embedding-no-init", "llama", target_modules=["embed_tokens"], init_lora_weights=False),
    lora("saved", "llama", target_modules=_QV, modules_to_save=["lm_head"]),
    lora("saved-embedding", "llama", target_modules=_QV, modules_to_save=["embed_tokens"]),
    lora("saved-composite", "llama", target_modules=["q_proj"], modules_to_save=["layers.1.mlp"]),
    lora("no-task", "llama", None, target_modules=_QV),
    lora("bf16", "llama-bf16", target_modules=_QV),
    lora("bf16-no-autocast", "llama-bf16", target_modules=_QV, how={"autocast_adapter_dtype": False}),
    lora("llama-cls", "llama-cls", "SEQ_CLS", target_modules=_QV),
    lora("gpt2", "gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    lora("gpt2-no-init", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False),
    lora("gpt2-gaussian", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights="gaussian"),
    lora("gpt2-bias-all", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True, bias="all"),
    lora("gpt2-embedding", "gpt2", target_modules=["wpe"]),
    lora("bert-bias-all", "bert-cls", "SEQ_CLS", target_modules=_ATTENTION, bias="all"),
    lora("bert-bias-lora-only", "bert-cls", "SEQ_CLS", target_modules=_ATTENTION, bias="lora_only"),
    lora("bert-cls", "bert-cls", "SEQ_CLS", target_modules=_ATTENTION),
    lora("bert-cls-all-linear", "bert-cls", "SEQ_CLS", target_modules="all-linear"),
    lora("bert-cls-dropout", "bert-cls", "SEQ_CLS", target_modules=_ATTENTION, lora_dropout=0.2),
    lora("bert-cls-saved", "bert-cls", "SEQ_CLS", target_modules=_ATTENTION, modules_to_save=["pooler"]),
    lora("bert-token", "bert-token", "TOKEN_CLS", target_modules=_ATTENTION),
    lora("bert-qa", "bert-qa", "QUESTION_ANS", target_modules=_ATTENTION),
    lora("bert-features", "bert", "FEATURE_EXTRACTION", target_modules=_ATTENTION),
    lora("bert-no-task", "bert", None, target_modules=_ATTENTION),
    lora("t5", "t5", "SEQ_2_SEQ_LM", target_modules=["q", "v"]),
    lora("t5-dropout", "t5", "SEQ_2_SEQ_LM", target_modules=["q", "v"], lora_dropout=0.1),
    lora("bart", "bart", "SEQ_2_SEQ_LM", target_modules=_QV),
    lora("bart-bias-all", "bart", "SEQ_2_SEQ_LM", target_modules=_QV, bias="all"),
]
LOHA = [
    loha("linear", "llama", target_modules=_QV),
    loha("no-init", "llama", target_modules=_QV, init_weights=False),
    loha("patterns", "llama", target_modules=_QV, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 9}),
    loha("saved", "llama", target_modules=["gate_proj"], modules_to_save=["lm_head"]),
    loha("rank-dropout", "llama", target_modules=_QV, rank_dropout=0.2),
    loha("module-dropout", "llama", target_modules=_QV, module_dropout=0.15),
    loha("bert-cls", "bert-cls", "SEQ_CLS", target_modules=_ATTENTION),
    loha("bert-qa", "bert-qa", "QUESTION_ANS", target_modules=_ATTENTION),
    loha("t5", "t5", "SEQ_2_SEQ_LM", target_modules=["q", "v"]),
]
PROMPT = [
    prompt("random", "llama", prompt_tuning_init="RANDOM"),
    prompt("vocabulary", "llama", prompt_tuning_init="SAMPLE_VOCAB"),
    prompt("gpt2", "gpt2"),
    prompt("gpt2-vocabulary", "gpt2", prompt_tuning_init="SAMPLE_VOCAB"),
    prompt("saved", "llama", modules_to_save=["lm_head"]),
    prompt("bert-cls", "bert-cls", "SEQ_CLS"),
    prompt("bert-features", "bert", "FEATURE_EXTRACTION"),
]
PREFIX = [
    prefix("plain", "llama-mha"),
    prefix("gqa", "llama"),
    prefix("zero", "llama", init_weights="zero"),
    prefix("projection", "llama-mha", prefix_projection=True, encoder_hidden_size=10),
    prefix("gqa-projection", "llama", prefix_projection=True),
    prefix("gpt2", "gpt2"),
    prefix("gpt2-projection", "gpt2", prefix_projection=True, encoder_hidden_size=10),
    prefix("bert-cls", "bert-cls", "SEQ_CLS"),
    prefix("bert-token", "bert-token", "TOKEN_CLS"),
    prefix("bert-qa", "bert-qa", "QUESTION_ANS"),
    prefix("bert-features", "bert", "FEATURE_EXTRACTION"),
]
CASES = [*LORA, *LOHA, *PROMPT, *PREFIX]
BY_ID = {case.id: case for case in CASES}


# ---- looking ---------------------------------------------------------------------------------------------------------
def shake(model: nn.Module, seed: int = 7, size: float = 0.1) -> None:
    """Move every trainable number, so that the adapter has an effect and a tensor lost on the way shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=size)


@contextlib.contextmanager
def saving(library: Any, case: Case | None = None) -> Iterator[None]:
    """Around whatever makes a file. Targeted embeddings are written too, of which ours warns as well (api.md §6.3)."""
    targets = (case.options.get("target_modules") or ()) if case else ()
    if library is ours and "embed_tokens" in targets:
        with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
            yield
    else:
        with using(library):
            yield


def save(library: Any, model: Any, folder: Path, **how: Any) -> Path:
    """Save into a folder and return it."""
    with using(library):
        model.save_pretrained(str(folder), **how)
    return folder


def saved(case: Case, library: Any, folder: Any, **kwargs: Any) -> Any:
    """Return a model with moved adapter weights, after saving it."""
    model = case.make(library)
    shake(model)
    with saving(library, case):
        model.save_pretrained(folder, **kwargs)
    return model


def outputs(library: Any, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors of the model's output that mean something to a user: those of padding tokens are zeroed.

    (Ours counts positions by the mask, so with virtual tokens padding has other ones than with the peer.)
    """
    model.eval()
    with torch.no_grad(), using(library):
        found = model(**inputs)
    names = ("loss", "logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    return {name: _real(found[name], inputs["attention_mask"]) for name in names if found.get(name) is not None}


def _real(value: Tensor, mask: Tensor) -> Tensor:
    extra = value.shape[1] - mask.shape[1] if value.dim() > 1 else -1
    if extra not in (0, 3, 4):  # neither per token, nor per token behind a prompt
        return value
    full = torch.cat([mask.new_ones(mask.shape[0], extra), mask], dim=1)
    return value.masked_fill((full == 0).view(*full.shape, *[1] * (value.dim() - 2)), 0)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Compare outputs by name, shape, dtype and value: as many units as the largest value is, but at least one."""
    assert found.keys() == expected.keys()
    assert found
    for name, value in expected.items():
        bound = tolerance * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[name], value, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


def tolerance(case: Case) -> float:
    """Return what two runs of this case may differ by.

    On half-precision bases ours computes in half, the peer in float32 copies of the activations (issue 5): as near to the truth, but not equal
    (tests/lora/test_half_precision.py).
    """
    return 1e-2 if "bf16" in case.base else 1e-6


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference of two outputs; infinite if shapes differ."""
    return max(float((one[k] - other[k]).abs().max()) if one[k].shape == other[k].shape else float("inf") for k in one)
