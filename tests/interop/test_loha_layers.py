"""LoHa on convolutions: equal where the peer is right, and each of the peer's faults shown to be one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interop.cases import LIBRARIES, ours, peer, saving, shake, using

LIBS = LIBRARIES.values()


class Net(nn.Module):
    """Convolutions of all kinds that the peer knows; the forward of each sums up."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 8, (3, 2), groups=2, dilation=2)
        self.point = nn.Conv2d(6, 8, 1)
        self.line = nn.Conv1d(6, 8, 3)
        self.dense = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        images = sum(layer(x).flatten(2).mean(-1) for layer in (self.flat, self.grouped, self.point))
        found: Tensor = images + self.line(x.flatten(2)).mean(-1) + self.dense(x.mean((2, 3)))
        return found


TARGETS = ["flat", "grouped", "point", "line", "dense"]


def make(library: Any, base: type[nn.Module] = Net, **options: Any) -> Any:
    torch.manual_seed(0)
    model = base()
    with using(library):
        torch.manual_seed(5)
        return library.get_peft_model(model, library.LoHaConfig(**{"r": 3, "alpha": 5, "target_modules": TARGETS, **options}))


def images() -> Tensor:
    return torch.randn(2, 6, 7, 8, generator=torch.Generator().manual_seed(1))


FORMS = pytest.mark.parametrize("effective", [False, True], ids=["flat", "effective"])


@FORMS
@pytest.mark.parametrize("init", [False, True])
def test_same_seed_same_weights_and_outputs(effective: bool, init: bool) -> None:
    models = [make(library, use_effective_conv2d=effective, init_weights=init) for library in LIBS]
    found, expected = (dict(model.named_parameters()) for model in models)
    assert list(found) == list(expected)
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]
    torch.testing.assert_close(*(model(images()) for model in models), rtol=0, atol=1e-5)


@FORMS
@pytest.mark.parametrize(("writer", "reader"), [(ours, peer), (peer, ours)], ids=["ours-to-peer", "peer-to-ours"])
def test_files_both_ways(effective: bool, writer: Any, reader: Any, tmp_path: Path) -> None:
    model = make(writer, use_effective_conv2d=effective)
    shake(model)
    with saving(writer):
        model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    with using(reader):
        loaded = reader.PeftModel.from_pretrained(Net(), tmp_path)
    plain = make(writer, use_effective_conv2d=effective)
    with torch.no_grad():
        expected = model.eval()(images())
        torch.testing.assert_close(loaded.eval()(images()), expected, rtol=0, atol=1e-5)
        assert float((plain(images()) - expected).abs().max()) > 1e-2


def gradients(effective: bool) -> list[dict[str, Tensor]]:
    found = []
    for library in LIBS:
        model = make(library, use_effective_conv2d=effective, init_weights=False)
        model(images()).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return found


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_same_gradients_in_the_flat_form() -> None:
    found, expected = gradients(False)
    assert found.keys() == expected.keys()
    assert max(distance(found[name], value) for name, value in expected.items()) < 1e-4


def test_gradients_of_the_effective_form_where_the_peer_takes_the_wrong_core() -> None:
    """Its gradients of B₁ and B₂ are made with the other product's core (methods.md §12); ours are checked by finite differences, too."""
    found, theirs = gradients(True)
    wrong = {name for name, value in theirs.items() if distance(found[name], value) > 0.1}
    tucker = [f"{layer}.hada_w{number}_a" for layer in ("flat", "grouped", "line") for number in (1, 2)]
    assert {name.removeprefix("base_model.model.").removesuffix(".default") for name in wrong} == set(tucker)
    right = theirs.keys() - wrong
    assert max(distance(found[name], theirs[name]) for name in right) < 1e-4
    for library, correct in ((ours, True), (peer, False)):
        model = make(library, use_effective_conv2d=True, init_weights=False).double()
        parameter = dict(model.named_parameters())["base_model.model.flat.hada_w1_a.default"]
        x = images().double()
        model(x).square().sum().backward()
        direction, step = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double(), 1e-6
        values = []
        with torch.no_grad():
            for move in (step, -2 * step):
                parameter.add_(direction, alpha=move)
                values.append(float(model(x).square().sum()))
        numeric = (values[0] - values[1]) / (2 * step)
        assert (abs(float((parameter.grad * direction).sum()) / numeric - 1) < 1e-5) is correct


class Reflecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.flat(x)
        return found


def test_padding_mode_which_the_peer_ignores() -> None:
    """Merged and unmerged are one function here, and two there (methods.md §12)."""
    differences = []
    for library in LIBS:
        model = make(library, Reflecting, init_weights=False, target_modules=["flat"])
        with torch.no_grad(), using(library):
            before = model(images())
            model.merge_adapter()
            differences.append(float((model(images()) - before).abs().max()))
    assert differences[0] < 1e-5
    assert differences[1] > 1e-2


def test_all_rows_dropped_which_is_nan_in_the_peer() -> None:
    finite = []
    for library in LIBS:
        model = make(library, init_weights=False, target_modules=["dense"], rank_dropout=0.97)
        model.train()
        torch.manual_seed(0)
        with torch.no_grad(), using(library):
            finite.append(all(bool(torch.isfinite(model(images())).all()) for _ in range(30)))
    assert finite == [True, False]


@pytest.mark.parametrize("kind", ["embedding", "conv3d", "conv1d"])
def test_layers_that_the_peer_refuses(kind: str) -> None:
    from transformers.pytorch_utils import Conv1D

    def base() -> nn.Module:
        layer = {"embedding": lambda: nn.Embedding(9, 8), "conv3d": lambda: nn.Conv3d(6, 8, 1), "conv1d": lambda: Conv1D(8, 6)}[kind]()
        return nn.ModuleDict({"target": layer})

    with using(peer), pytest.raises((TypeError, ValueError)):
        peer.get_peft_model(base(), peer.LoHaConfig(target_modules=["target"]))
    assert ours.get_peft_model(base(), ours.LoHaConfig(target_modules=["target"])).base_model.model["target"].adapters() == ("default",)


@pytest.mark.parametrize("effective", [False, True], ids=["flat", "effective"])
@pytest.mark.parametrize("option", ["rank_dropout", "module_dropout"])
def test_same_draws_of_dropout(effective: bool, option: str) -> None:
    outputs = []
    for library in LIBS:
        model = make(library, use_effective_conv2d=effective, init_weights=False, **{option: 0.3})
        model.train()
        torch.manual_seed(3)
        with torch.no_grad(), using(library):
            outputs.append(torch.stack([model(images()) for _ in range(4)]))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
