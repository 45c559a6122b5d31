"""LoHa on convolutions, flat and effective: the base's own class with the weight W + s·ΔW is the truth."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loha.layers import adapted, close, flat_delta, weights

BASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "1d-grouped-dilated": (lambda: nn.Conv1d(4, 6, 2, groups=2, dilation=2), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0)), (2, 4, 6, 5)),
    "2d-grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=(1, 2)), (2, 4, 6, 5)),
    "2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1, bias=False), (2, 4, 6, 5)),
    "2d-same": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2), (2, 4, 6, 5)),
    "2d-reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 6, 5)),
    "2d-replicate": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="replicate"), (2, 4, 6, 5)),
    "2d-circular": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), (2, 4, 6, 5)),
    "2d-unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 5)),
    "2d-pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 3, 2)),
    "3d": (lambda: nn.Conv3d(4, 6, (2, 1, 3), padding=(1, 0, 1)), (2, 4, 3, 4, 5)),
    "3d-circular-grouped": (lambda: nn.Conv3d(4, 6, 2, groups=2, padding=1, padding_mode="circular"), (1, 4, 3, 4, 3)),
}
every_base = pytest.mark.parametrize("base", BASES)
both_forms = pytest.mark.parametrize("effective", [False, True], ids=["flat", "effective"])


def delta_of(layer: Any, shape: torch.Size, w: dict[str, Tensor]) -> Tensor:
    """Return s·ΔW in the kernel's shape, by sums over components."""
    if "t1" not in w:
        change = torch.einsum("oa,ob,ai,bi->oi", w["w1_a"], w["w2_a"], w["w1_b"], w["w2_b"])
    else:
        cores = (w[name].reshape(*w[name].shape[:2], -1) for name in ("t1", "t2"))
        one, two = (torch.einsum("abk,bc,ao->ock", t, w[f"w{n}_b"], w[f"w{n}_a"]) for n, t in enumerate(cores, 1))
        change = one * two
    return layer.scaling["default"] * change.reshape(shape)


def truth(layer: Any, x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Return what the base computes with W + s·ΔW."""
    base = layer.get_base_layer()
    weight = base.weight.detach() + delta_of(layer, base.weight.shape, w)
    found: Tensor = torch.func.functional_call(base, {"weight": weight}, (x,))
    return found


@every_base
@both_forms
def test_output_and_gradients_are_those_of_the_whole_weight(base: str, effective: bool) -> None:
    make, shape = BASES[base]
    model, layer = adapted(make(), use_effective_conv2d=effective)
    model.train()
    w = weights(layer)
    assert ("t1" in w) == (effective and base != "2d-pointwise")
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found, expected = model(x), truth(layer, x, w)
    close(found, expected)
    ours, theirs = (torch.autograd.grad(y.pow(3).sum(), (x, *w.values())) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        close(one, other, 1e-11)


@every_base
@both_forms
def test_merged_it_computes_the_same_and_unmerged_every_bit_is_back(base: str, effective: bool) -> None:
    make, shape = BASES[base]
    model, layer = adapted(make(), use_effective_conv2d=effective, dtype=torch.float32)
    x = torch.randn(shape)
    weight = layer.weight
    before, expected = weight.clone(), model(x)
    model.merge_adapter(safe_merge=True)
    close(model(x), expected, 1e-5)
    close(weight - before, layer.get_delta_weight("default"), 1e-5)
    model.unmerge_adapter()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("base", ["1d", "2d-grouped", "3d"])
def test_gradients_of_the_effective_form_agree_with_finite_differences(base: str) -> None:
    make, shape = BASES[base]
    _, layer = adapted(make(), use_effective_conv2d=True, r=2)
    x = torch.randn(shape, dtype=torch.float64)
    names = list(layer.parameters_of("default"))

    def output(*values: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, {f"{name}.default": value for name, value in zip(names, values, strict=True)}, (x,))
        return found

    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters_of("default").values())
    assert torch.autograd.gradcheck(output, values, fast_mode=True)


def test_shapes_are_those_of_the_format() -> None:
    shapes = {}
    for name, base in {"c2": nn.Conv2d(6, 8, 3), "c1": nn.Conv1d(6, 8, 3), "c3": nn.Conv3d(6, 8, (3, 1, 2)), "p": nn.Conv2d(6, 8, 1)}.items():
        for effective in (False, True):
            _, layer = adapted(base, r=4, use_effective_conv2d=effective)
            shapes[name, effective] = {key: tuple(value.shape) for key, value in weights(layer).items() if key[-1] != "2" and key[1] != "2"}
    assert shapes["c2", True] == {"w1_a": (4, 8), "w1_b": (4, 6), "t1": (4, 4, 3, 3)}
    assert shapes["c2", False] == {"w1_a": (8, 4), "w1_b": (4, 54)}
    assert shapes["c1", True] == {"w1_a": (4, 8), "w1_b": (4, 6), "t1": (4, 4, 3, 1)}
    assert shapes["c1", False] == {"w1_a": (8, 4), "w1_b": (4, 18)}
    assert shapes["c3", True] == {"w1_a": (4, 8), "w1_b": (4, 6), "t1": (4, 4, 3, 1, 2)}
    assert shapes["p", True] == shapes["p", False] == {"w1_a": (8, 4), "w1_b": (4, 6)}


@both_forms
def test_a_new_adapter_changes_nothing(effective: bool) -> None:
    model, layer = adapted(nn.Conv2d(4, 6, 3), init_weights=True, use_effective_conv2d=effective)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    assert torch.equal(model(x), layer.get_base_layer()(x))
    model(x).pow(2).sum().backward()
    assert {key for key, value in weights(layer).items() if value.grad is not None and bool(value.grad.any())} == {"w2_b"}


class Standardised(nn.Conv2d):
    """A convolution with a constructor and a forward of its own: it standardises its weight."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels + 2, 3, padding=1, bias=False)
        self.gain = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self._conv_forward(x, self.weight, None)


@both_forms
def test_a_subclass_keeps_its_own_forward(effective: bool) -> None:
    model, layer = adapted(Standardised(4), use_effective_conv2d=effective)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    close(model(x), truth(layer, x, weights(layer)))
    copied = copy.deepcopy(model)
    close(copied(x), model(x), 0)


def test_rows_with_adapters_of_their_own() -> None:
    model, layer = adapted(nn.Conv2d(4, 6, 3, padding_mode="reflect", padding=1))
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    found = model(x, adapter_names=["__base__", "default"])
    close(found[0], layer.get_base_layer()(x)[0])
    close(found[1], truth(layer, x, weights(layer))[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_forms
def test_half_precision(dtype: torch.dtype, effective: bool) -> None:
    model, layer = adapted(nn.Conv2d(4, 6, 3), dtype=dtype, use_effective_conv2d=effective)
    x = torch.randn(2, 4, 6, 5).to(dtype)
    found = model(x)
    assert found.dtype is dtype
    base = copy.deepcopy(layer.get_base_layer()).double()
    base.weight.data += delta_of(layer, base.weight.shape, {key: value.detach().double() for key, value in weights(layer).items()})
    close(found, base(x.double()), 4 * torch.finfo(dtype).eps)


def test_low_rank_factors() -> None:
    _, flat = adapted(nn.Conv2d(4, 6, (3, 2), groups=2))
    b, a = flat.low_rank_factors("default")
    close(b @ a, flat_delta(flat))
    close((b @ a).reshape(6, 2, 3, 2), flat.get_delta_weight("default"))
    _, effective = adapted(nn.Conv2d(4, 6, (3, 2)), use_effective_conv2d=True)
    assert effective.low_rank_factors("default") is None
