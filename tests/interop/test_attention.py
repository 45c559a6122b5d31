"""LoRA on MultiheadAttention against the peer: the same files and starts; the out-projection, which the peer counts twice, once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interop.cases import LIBRARIES, ours, peer, shake, using


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mha(x, x, x)[0])


def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return made.eval()


def adapted(library: Any, **options: Any) -> Any:
    base = net()
    with using(library):
        config = library.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["mha"], **options})
        torch.manual_seed(3)
        return library.get_peft_model(base, config)


def tensors(library: Any, model: Any) -> dict[str, Tensor]:
    with using(library):
        found: dict[str, Tensor] = library.get_peft_model_state_dict(model)
        return found


X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_the_same_values_from_the_same_seed(init: Any) -> None:
    mine, theirs = (tensors(library, adapted(library, init_lora_weights=init)) for library in LIBRARIES.values())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"bias": "lora_only"}, {"bias": "all"}], ids=["plain", "lora-bias", "lora-only", "all"])
def test_the_same_names_in_memory_and_in_files(options: dict[str, Any]) -> None:
    mine, theirs = adapted(ours, **options), adapted(peer, **options)
    assert {name for name, _ in mine.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    one = {key: tuple(tensor.shape) for key, tensor in tensors(ours, mine).items()}
    other = {key: tuple(tensor.shape) for key, tensor in tensors(peer, theirs).items()}
    if "bias" in options:  # the peer trains biases whose whole name is "bias", and this one not
        assert one.pop("base_model.model.mha.base_layer.in_proj_bias") == (18,)
    assert one == other


def test_the_in_projection_is_the_peers() -> None:
    mine, theirs = adapted(ours), adapted(peer)
    for model in (mine, theirs):
        shake(model)
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "out_proj.lora_B" in n).zero_()
    torch.testing.assert_close(mine(X), theirs(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_the_peer_counts_the_out_projection_twice_and_the_switch_does_so_too(merged: bool, tmp_path: Path) -> None:
    theirs = adapted(peer)
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    with using(peer), torch.no_grad():
        expected = (copy.deepcopy(theirs).merge_and_unload() if merged else theirs)(X)
    once = ours.PeftModel.from_pretrained(net(), tmp_path)
    config = ours.PeftConfig.from_pretrained(tmp_path)
    config.out_projection_twice = True
    twice = ours.PeftModel.from_pretrained(net(), tmp_path, config=config)
    torch.testing.assert_close((twice.merge_and_unload() if merged else twice)(X), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose((once.merge_and_unload() if merged else once)(X), expected, atol=1e-2)


def test_our_files_load_in_the_peer(tmp_path: Path) -> None:
    mine = adapted(ours, out_projection_twice=True)
    shake(mine)
    mine.save_pretrained(tmp_path)
    with using(peer), torch.no_grad():  # the peer warns that it does not know the switch, and does what it says
        theirs = peer.PeftModel.from_pretrained(net(), tmp_path)
        torch.testing.assert_close(mine(X), theirs(X), atol=1e-5, rtol=1e-5)
    saved = tensors(ours, mine)
    assert all(torch.equal(saved[key], value) for key, value in tensors(peer, theirs).items())


def test_lora_bias_of_the_in_projection_acts_where_the_peer_ignores_it() -> None:
    mine, theirs = adapted(ours, lora_bias=True), adapted(peer, lora_bias=True)
    plain = net()(X)
    for model in (mine, theirs):
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if n.endswith("mha.lora_B.default.bias")).fill_(1.0)
    assert not torch.allclose(mine(X), plain, atol=1e-2)
    torch.testing.assert_close(theirs(X), plain, atol=1e-5, rtol=1e-5)


def test_lora_bias_of_the_out_projection_trains_where_the_peers_gets_no_gradient() -> None:
    for library, expected in ((ours, True), (peer, False)):
        model = adapted(library, lora_bias=True)
        model(X).sum().backward()
        bias = next(p for n, p in model.named_parameters() if n.endswith("out_proj.lora_B.default.bias"))
        assert (bias.grad is not None and bool(bias.grad.abs().sum() > 0)) is expected


def test_an_out_projection_by_itself_acts_where_the_peers_does_not() -> None:
    for library, expected in ((ours, True), (peer, False)):
        model = adapted(library, target_modules=["out_proj"])
        shake(model)
        assert (not torch.allclose(model(X), net()(X), atol=1e-2)) is expected
