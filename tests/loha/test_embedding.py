"""LoHa on embeddings: what the look-up adds, and what it must not touch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from loha.layers import adapted, close, flat_delta, weights
from peft_core import UnsupportedModuleError

IDS = torch.tensor([[0, 3, 10], [3, 7, 1]])


@pytest.mark.parametrize("training", [False, True])
def test_output_and_gradients_are_the_formulas(training: bool) -> None:
    model, layer = adapted(nn.Embedding(11, 5))
    model.train(training)
    w = weights(layer)
    assert {key: tuple(value.shape) for key, value in w.items()} == {"w1_a": (5, 3), "w1_b": (3, 11), "w2_a": (5, 3), "w2_b": (3, 11)}
    delta = layer.scaling["default"] * torch.einsum("oa,ob,ai,bi->io", w["w1_a"], w["w2_a"], w["w1_b"], w["w2_b"])
    expected = (layer.get_base_layer().weight + delta)[IDS]
    found = model(IDS)
    close(found, expected)
    ours, theirs = (torch.autograd.grad(y.pow(3).sum(), list(w.values())) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        close(one, other)
    close(layer.get_delta_weight("default"), flat_delta(layer).t())
    b, a = layer.low_rank_factors("default")
    close(b @ a, flat_delta(layer))


def test_merged() -> None:
    model, layer = adapted(nn.Embedding(11, 5), dtype=torch.float32)
    expected, before = model(IDS), layer.weight.clone()
    model.merge_adapter()
    close(model(IDS), expected, 1e-6)
    assert not torch.equal(layer.weight, before)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before)


def test_the_scale_of_the_base_scales_the_adapter_too() -> None:
    model, layer = adapted(Gemma3TextScaledWordEmbedding(11, 5, padding_idx=0, embed_scale=3.0))
    base = layer.get_base_layer()
    close(model(IDS), 3 * (base.weight + flat_delta(layer).t())[IDS])
    found = model(IDS)
    model.merge_adapter()
    close(model(IDS), found)


def test_padding_gets_no_gradient_and_a_frequent_id_no_more_than_its_share() -> None:
    model, layer = adapted(nn.Embedding(11, 5, padding_idx=0, scale_grad_by_freq=True))
    model(IDS).sum().backward()
    w = weights(layer)
    delta_sum = {key: value.detach().clone().requires_grad_() for key, value in w.items()}
    seen = IDS.unique()[1:]
    rows = (delta_sum["w1_a"] @ delta_sum["w1_b"] * (delta_sum["w2_a"] @ delta_sum["w2_b"]))[:, seen]
    (layer.scaling["default"] * rows).sum().backward()
    for key in ("w1_b", "w2_b"):
        assert w[key].grad is not None
        close(w[key].grad, delta_sum[key].grad)  # type: ignore[arg-type]
        assert not w[key].grad[:, 0].any()  # type: ignore[index]


def test_a_new_adapter_changes_nothing_and_does_not_start_small_in_a_large_vocabulary() -> None:
    model, layer = adapted(nn.Embedding(5000, 5), init_weights=True)
    assert torch.equal(model(IDS), layer.get_base_layer()(IDS))
    assert 0.9 < float(weights(layer)["w1_b"].detach().abs().max()) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, layer = adapted(nn.Embedding(11, 5), dtype=dtype)
    found = model(IDS)
    assert found.dtype is dtype
    close(found, (layer.get_base_layer().weight.double() + flat_delta(layer).t())[IDS], 4 * torch.finfo(dtype).eps)


def test_renormalised_rows_are_refused() -> None:
    with pytest.raises(UnsupportedModuleError, match="max_norm changes its rows"):
        adapted(nn.Embedding(11, 5, max_norm=1.0))
