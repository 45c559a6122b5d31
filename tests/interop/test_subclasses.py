"""Subclasses with constructors of their own: the peer calls these, or changes what a layer returns; where it works, both agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peft
from lora.test_subclasses import CASES, adapted, base_of

CONVOLUTIONS = [name for name in CASES if name.startswith("conv")]
WORKING = ["linear", "linear-strict", "linear-dora", "embedding", "embedding-dora"]


def peers(name: str) -> peft.PeftModel:
    """The peer's model of a case; what it has no switch for is left out."""
    settings = {key: value for key, value in CASES[name].settings.items() if key != "grouped_convolutions"}
    return peft.get_peft_model(base_of(name), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["part"], **settings)).eval()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_peer_calls_the_constructor_of_a_convolution_and_ours_does_not(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        peers(name)
    assert torch.isfinite(adapted(name)(CASES[name].x)).all()


def test_the_peer_changes_what_an_attention_returns_and_ours_does_not() -> None:
    x = CASES["attention"].x
    assert isinstance(base_of("attention")(x), torch.Tensor)
    assert isinstance(peers("attention")(x), tuple)
    assert isinstance(adapted("attention")(x), torch.Tensor)


@pytest.mark.parametrize("name", WORKING)
def test_where_the_peer_works_its_outputs_are_ours(name: str, tmp_path: Path) -> None:
    ours = adapted(name)
    ours.save_pretrained(str(tmp_path))
    theirs = peft.PeftModel.from_pretrained(base_of(name), str(tmp_path), autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(theirs(CASES[name].x), ours(CASES[name].x), rtol=1e-5, atol=1e-6)
