"""Rank dropout and module dropout, on every kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loha.layers import adapted, close, weights

IDS = torch.tensor([0, 3, 10, 7])
BASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "linear": (lambda: nn.Linear(6, 8), {}, lambda: torch.randn(4, 6, dtype=torch.float64)),
    "conv": (lambda: nn.Conv2d(4, 8, 3, groups=2), {}, lambda: torch.randn(2, 4, 6, 5, dtype=torch.float64)),
    "conv-effective": (lambda: nn.Conv2d(4, 8, 3), {"use_effective_conv2d": True}, lambda: torch.randn(2, 4, 6, 5, dtype=torch.float64)),
    "embedding": (lambda: nn.Embedding(11, 8), {}, lambda: IDS),
}
every_base = pytest.mark.parametrize("base", BASES)
observed = pytest.mark.parametrize("hook", [False, True], ids=["plain", "observed"])


def made(base: str, hook: bool = False, **options: Any) -> tuple[Any, Any, Tensor]:
    make, extra, x = BASES[base]
    model, layer = adapted(make(), **extra, **options)
    if hook:
        layer.base_layer.register_forward_hook(lambda *_: None)
    return model, layer, x()


def effect(model: Any, layer: Any, x: Tensor) -> Tensor:
    """Return what the adapter adds, with the output's features first."""
    change: Tensor = model(x) - layer.get_base_layer()(x)
    return (change.transpose(0, 1) if change.dim() == 4 else change.movedim(-1, 0)).flatten(1)


@every_base
@observed
def test_dropped_rows_add_nothing_and_the_others_share_out_the_whole(base: str, hook: bool) -> None:
    model, layer, x = made(base, hook, rank_dropout=0.4)
    model.eval()
    whole = effect(model, layer, x)
    model.train()
    for seed in range(8):
        torch.manual_seed(seed)
        torch.rand(1)
        stay = torch.rand(8) > 0.4
        torch.manual_seed(seed)
        found = effect(model, layer, x)
        share = float(stay.double().mean())
        close(found, whole * stay.unsqueeze(1) / share)


@every_base
@observed
def test_all_rows_dropped_is_no_effect_and_no_nan(base: str, hook: bool) -> None:
    model, layer, x = made(base, hook, rank_dropout=0.97)
    model.train()
    seen = 0
    for seed in range(30):
        torch.manual_seed(seed)
        found = effect(model, layer, x)
        assert torch.isfinite(found).all()
        seen += int(not found.any())
    assert seen > 5


@every_base
def test_components_are_dropped_as_in_an_adapter_of_lower_rank(base: str) -> None:
    model, layer, x = made(base, rank_dropout=0.3, rank_dropout_on="components", r=4)
    model.eval()
    model.train()
    torch.manual_seed(3)
    found = effect(model, layer, x)
    shape = (2, 4, 1) if base == "conv-effective" else (2, 4)
    torch.manual_seed(3)
    torch.rand(1)
    masks = (torch.rand(shape) > 0.3).double() / 0.7
    with torch.no_grad():
        for number, mask in zip("12", masks, strict=True):
            weights(layer)[f"w{number}_a"].mul_(mask)
    model.eval()
    close(found, effect(model, layer, x))


def test_components_on_average_are_the_whole() -> None:
    model, layer, x = made("linear", rank_dropout=0.3, rank_dropout_on="components")
    model.eval()
    with torch.no_grad():
        whole = effect(model, layer, x)
        model.train()
        torch.manual_seed(0)
        mean = torch.stack([effect(model, layer, x) for _ in range(3000)]).mean(0)
    assert float((mean - whole).norm() / whole.norm()) < 0.06


@every_base
@observed
def test_a_skipped_module_is_the_base_and_gets_no_gradient(base: str, hook: bool) -> None:
    model, layer, x = made(base, hook, module_dropout=0.5)
    model.eval()
    whole = effect(model, layer, x)
    model.train()
    seen = set()
    for seed in range(10):
        torch.manual_seed(seed)
        skipped = bool(torch.rand(1) <= 0.5)
        seen.add(skipped)
        torch.manual_seed(seed)
        found = effect(model, layer, x)
        close(found, torch.zeros_like(whole) if skipped else whole)
        if skipped:
            assert not found.requires_grad
    assert seen == {True, False}


@every_base
@observed
def test_in_evaluation_nothing_is_drawn(base: str, hook: bool) -> None:
    model, _, x = made(base, hook, module_dropout=0.5, rank_dropout=0.5)
    model.eval()
    state = torch.get_rng_state()
    close(model(x), model(x), 0)
    assert torch.equal(torch.get_rng_state(), state)


@every_base
def test_gradients_flow_through_the_rows_that_stay(base: str) -> None:
    model, layer, x = made(base, rank_dropout=0.4)
    model.train()
    torch.manual_seed(5)
    torch.rand(1)
    stay = torch.rand(8) > 0.4
    torch.manual_seed(5)
    effect(model, layer, x).square().sum().backward()
    for name in ("w1_a", "w2_a"):
        gradient = weights(layer)[name].grad
        assert gradient is not None
        by_row = (gradient if base != "conv-effective" else gradient.t()).abs().sum(1)
        assert torch.equal(by_row > 0, stay), name
