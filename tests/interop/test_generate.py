"""Greedy generation gives the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from interop.cases import BY_ID, Case, batch, ours, peer, saving, shake, using

NAMES = [
    *("lora-linear", "lora-embedding", "lora-saved", "lora-gpt2", "lora-t5", "lora-bart", "loha-linear", "loha-t5"),
    *("prompt-random", "prompt-gpt2", "prompt-saved"),
    *("prefix-plain", "prefix-gqa", "prefix-projection", "prefix-gqa-projection", "prefix-gpt2", "prefix-gpt2-projection"),
]


def generated(library: Any, model: Any, case: Case, **options: Any) -> Any:
    """Return tokens and scores for the rows without padding."""
    ids = batch(case.base)["input_ids"][[0, 2]]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    model.eval()
    with torch.no_grad(), using(library):
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{**settings, **options})


def assert_same(found: Any, expected: Any) -> None:
    """Tokens must be equal; and so must scores be, because a tiny model likes to say one thing again and again."""
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no-cache"])
@pytest.mark.parametrize("name", NAMES)
def test_same_tokens(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    case = BY_ID[name]
    model = case.make(ours)
    shake(model, size=0.3)
    with saving(ours, case):
        model.save_pretrained(tmp_path)
    found = generated(ours, model, case, **options)
    if options.get("use_cache") is False and name.startswith("prefix"):  # the peer can't (api.md §12.16)
        assert_same(found, generated(ours, model, case))
        return
    assert_same(found, generated(peer, case.load(peer, tmp_path), case, **options))
    with model.disable_adapter():
        plain = generated(ours, model, case, **options)
    # the first step: later ones need not have the same tokens before them
    assert float((found.scores[0] - plain.scores[0]).nan_to_num(neginf=0).abs().max()) > 1e-2, "the adapter has no effect"


@pytest.mark.parametrize("name", NAMES)
def test_same_samples(name: str, tmp_path: Path) -> None:
    case = BY_ID[name]
    model = case.make(ours)
    shake(model)
    with saving(ours, case):
        model.save_pretrained(tmp_path)
    found = []
    for library, one in ((ours, model), (peer, case.load(peer, tmp_path))):
        torch.manual_seed(5)
        found.append(generated(library, one, case, do_sample=True))
    assert_same(*found)


@pytest.mark.parametrize("name", ["lora-linear", "prompt-random", "prefix-gqa"])
def test_same_continuation_of_a_second_adapter(name: str, tmp_path: Path) -> None:
    """Switching adapters between calls leaves nothing of the first one behind."""
    case = BY_ID[name]
    model = case.make(ours)
    shake(model)
    model.add_adapter("other", case.make_config(ours))
    model.set_adapter("other")
    shake(model, seed=8)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    generated(ours, model, case)
    model.set_adapter("other")
    assert_same(generated(ours, model, case), generated(peer, case.load(peer, tmp_path, subfolder="other"), case))
