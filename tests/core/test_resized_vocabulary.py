"""Whether the embeddings of a base with a resized vocabulary go along is decided by the base's own config, also in the Hub's local cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from torch import nn

from peft_core import PeftWarning, get_peft_model, get_peft_model_state_dict
from support import dense, llama

NAME = "someone/tiny"
MAIN, OTHER = "0" * 40, "1" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two revisions of a base, one with a vocabulary of another size; nobody may ask the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def asked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked)
    place = tmp_path / "models--someone--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(MAIN)
    (place / "refs" / "v2").write_text(OTHER)
    size = llama().config.vocab_size
    for commit, found in ((MAIN, size), (OTHER, size + 8)):
        (place / "snapshots" / commit).mkdir(parents=True)
        (place / "snapshots" / commit / "config.json").write_text(json.dumps({"vocab_size": found}))
    return place


def embedded(base: nn.Module, **fields: Any) -> bool:
    base.name_or_path = fields.pop("name", NAME)  # type: ignore[assignment]
    model = get_peft_model(base, dense(target_modules=["q_proj"], **fields))
    return any("embed_tokens" in key for key in get_peft_model_state_dict(model))


def test_a_base_as_it_is_in_the_cache(hub: Path) -> None:
    assert not embedded(llama())


def test_a_resized_base(hub: Path) -> None:
    base = llama()
    base.resize_token_embeddings(base.config.vocab_size + 8)
    with pytest.warns(PeftWarning, match="was resized from"):
        assert embedded(base)


@pytest.mark.parametrize("how", ["config", "commit"])
def test_another_revision(hub: Path, how: str) -> None:
    base = llama()
    base.resize_token_embeddings(base.config.vocab_size + 8)
    if how == "commit":
        base.config._commit_hash = OTHER
    assert not embedded(base, **({"revision": "v2"} if how == "config" else {}))


@pytest.mark.parametrize("name", ["no/such", "not a name of a repository", "a/b/c"])
def test_bases_that_are_not_there(hub: Path, name: str) -> None:
    assert not embedded(llama(), name=name)
