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


def generated(library: Any, model: Any, case: Case, **options: Any) -> torch.Tensor:
    ids = batch(case.base)["input_ids"][[0, 2]]  # the rows without padding
    model.eval()
    with torch.no_grad(), using(library):
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **{"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
        )


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no-cache"])
@pytest.mark.parametrize("name", NAMES)
def test_same_tokens(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    case = BY_ID[name]
    if options.get("use_cache") is False and name.startswith("prefix"):
        pytest.skip("the peer can't (api.md §12.16)")
    model = case.make(ours)
    shake(model, size=1.0)
    with saving(ours, case):
        model.save_pretrained(tmp_path)
    found = generated(ours, model, case, **options)
    other = case.load(peer, tmp_path)
    assert torch.equal(found, generated(peer, other, case, **options))
    with model.disable_adapter():
        plain = generated(ours, model, case, **options)
    assert not torch.equal(found, plain), "the adapter has no effect: the comparison says nothing"


@pytest.mark.parametrize("name", ["lora-linear", "prompt-random", "prefix-gqa"])
def test_same_samples(name: str, tmp_path: Path) -> None:
    case = BY_ID[name]
    model = case.make(ours)
    shake(model, size=1.0)
    with saving(ours, case):
        model.save_pretrained(tmp_path)
    found = []
    for library, one in ((ours, model), (peer, case.load(peer, tmp_path))):
        torch.manual_seed(5)
        found.append(generated(library, one, case, do_sample=True))
    assert torch.equal(*found)
