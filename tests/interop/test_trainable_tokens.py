"""Trained rows and tied weights beside the peer's: files go both ways, numbers are equal where it is right, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from interop.cases import _BERT, _LLAMA, base, batch, ours, peer, save, shake, using

TOKENS = [5, 30, 2]
TIED = {"tie_word_embeddings": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rows-tied": ("tied", {"trainable_token_indices": TOKENS}),
    "rows-untied": ("llama", {"trainable_token_indices": TOKENS}),
    "rows-named": ("llama", {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [7]}}),
    "rows-head-only": ("tied", {"trainable_token_indices": {"lm_head": [7]}}),
    "rows-parted": ("tied", {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [7]}}),
    "rows-gpt2": ("gpt2", {"trainable_token_indices": TOKENS, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "rows-t5": ("t5", {"trainable_token_indices": TOKENS, "target_modules": ["q"], "task_type": "SEQ_2_SEQ_LM"}),
    "saved": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "saved-head": ("tied", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "targets": ("tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "targets-head": ("tied", {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
}
ROWS = [name for name in CASES if name.startswith("rows")]


def model_of(kind: str) -> Any:
    if kind == "tied":
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA, **TIED)).eval()
    return base(kind)


def make(library: Any, case: str, **options: Any) -> Any:
    kind, fields = CASES[case]
    model = model_of(kind)
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM", **fields, **options}
    torch.manual_seed(3)
    with using(library):
        return library.get_peft_model(model, library.LoraConfig(**options)).eval()


def logits(library: Any, model: Any, case: str) -> Tensor:
    inputs = batch(CASES[case][0].replace("tied", "llama"))
    inputs["input_ids"][:, 1] = torch.tensor(TOKENS)
    with torch.no_grad(), using(library):
        found: Tensor = model(**inputs).logits
    return found


def load(library: Any, case: str, folder: Path, **kwargs: Any) -> Any:
    model = model_of(CASES[case][0])
    with using(library):
        return library.PeftModel.from_pretrained(model, str(folder), **kwargs).eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("embeddings", [False, True])
def test_files_go_both_ways(case: str, embeddings: bool, tmp_path: Path) -> None:
    for number, (writer, reader) in enumerate(((ours, peer), (peer, ours))):
        model = make(writer, case)
        shake(model)
        folder = save(writer, model, tmp_path / str(number), save_embedding_layers=embeddings)
        read = load(reader, case, folder)
        torch.testing.assert_close(logits(reader, read, case), logits(writer, model, case), atol=1e-5, rtol=1e-4)
        assert float((logits(writer, model, case) - logits(writer, model_of(CASES[case][0]), case)).abs().max()) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_the_same_keys_and_values_from_the_same_seed(case: str) -> None:
    found, expected = (library.get_peft_model_state_dict(make(library, case), save_embedding_layers=False) for library in (ours, peer))
    assert {key: tuple(value.shape) for key, value in found.items()} == {key: tuple(value.shape) for key, value in expected.items()}
    for key, value in expected.items():
        if case != "targets-head":  # for which the peer draws the output layer's factors before the embedding's
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize("case", ROWS)
def test_names_in_memory_are_the_same(case: str) -> None:
    found, expected = (make(library, case) for library in (ours, peer))
    assert [n for n, p in found.named_parameters() if p.requires_grad] == [n for n, p in expected.named_parameters() if p.requires_grad]
    assert {n for n in found.state_dict() if ".base_layer." not in n} == {n for n in expected.state_dict() if ".base_layer." not in n}


@pytest.mark.parametrize("case", ROWS)
def test_gradients_are_the_same(case: str, tmp_path: Path) -> None:
    model = make(peer, case)
    shake(model)
    folder = save(peer, model, tmp_path, save_embedding_layers=False)
    inputs = batch(CASES[case][0].replace("tied", "llama"), labels=True)
    inputs.setdefault("labels", inputs["input_ids"])
    gradients = []
    for library in (ours, peer):
        trained = load(library, case, folder, is_trainable=True)
        with using(library):
            trained(**inputs).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained.named_parameters() if "tokens_delta" in name})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-6)


# ---- what is wrong with the peer -----------------------------------------------------------------------------------------
def bert() -> Any:
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**_BERT)).eval()
    with torch.no_grad():
        model.cls.predictions.decoder.bias.normal_()
    return model


IDS = torch.tensor([[1, 5, 30, 2, 9]])


def test_the_peer_loses_the_bias_of_a_tied_output_layer() -> None:
    found = {}
    for library in (ours, peer):
        model = bert()
        with using(library), torch.no_grad():
            model = library.get_peft_model(model, library.LoraConfig(target_modules=["query"], trainable_token_indices=TOKENS)).eval()
            found[library is ours] = model(input_ids=IDS).logits
    with torch.no_grad():
        expected = bert()(input_ids=IDS).logits
    assert torch.equal(found[True], expected)
    assert float((found[False] - expected).abs().max()) > 1


def test_the_peer_takes_negative_indices_and_fails_when_they_are_used() -> None:
    for library in (ours, peer):
        model = model_of("tied")
        with using(library):
            model = library.get_peft_model(model, library.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[-1])).eval()
            if library is peer:
                with pytest.raises(IndexError):
                    model(input_ids=IDS)
            else:
                assert torch.equal(model(input_ids=IDS).logits, model_of("tied")(input_ids=IDS).logits)


def test_the_peer_takes_duplicates_of_which_one_counts() -> None:
    options = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 3]}
    with using(peer):
        peer.get_peft_model(model_of("tied"), peer.LoraConfig(**options))
    with pytest.raises(ValueError, match="given more than once"):
        ours.get_peft_model(model_of("tied"), ours.LoraConfig(**options))


def test_the_peer_steps_tied_factors_twice() -> None:
    """Parameters on one storage, each with its own gradient: SGD moves them by the sum and Adam by two steps, and they count twice."""
    counts = {}
    for library in (ours, peer):
        model = make(library, "targets", target_modules=["embed_tokens"])
        counts[library is ours] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts == {True: 3 * (32 + 16), False: 2 * 3 * (32 + 16)}


def test_the_peer_refuses_rows_of_an_embedding_that_lora_adapts() -> None:
    options = {"target_modules": ["embed_tokens"], "trainable_token_indices": TOKENS}
    model = ours.get_peft_model(base("llama"), ours.LoraConfig(**options)).eval()
    assert torch.equal(model(input_ids=IDS).logits, base("llama")(input_ids=IDS).logits)
    with using(peer), pytest.raises(TypeError, match="cannot be applied to modules of type"):
        peer.get_peft_model(base("llama"), peer.LoraConfig(**options))
