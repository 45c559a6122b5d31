"""Counting what trains."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

import support
from peft_core import get_peft_model
from support import CueConfig, DenseConfig


def test_the_printed_line_has_exactly_this_form(capsys: pytest.CaptureFixture[str]) -> None:
    get_peft_model(support.net(width=64), DenseConfig(target_modules=["last", "up"])).print_trainable_parameters()
    total = 2 * (2 * (64 * 64 + 64) + 128) + 64 * 64 + 64 + 130 + 3 * 64 * 64
    expected = f"trainable params: 12,288 || all params: {total:,} || trainable%: {100 * 12288 / total:.4f}\n"
    assert capsys.readouterr().out == expected
    assert re.fullmatch(r"trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: \d+\.\d{4}\n", expected)


def test_saved_copies_are_counted_beside_their_originals() -> None:
    plain = get_peft_model(support.net(), DenseConfig(target_modules=["last"])).get_nb_trainable_parameters()
    saving = get_peft_model(support.net(), DenseConfig(target_modules=["last"], modules_to_save=["head"])).get_nb_trainable_parameters()
    assert (saving[0] - plain[0], saving[1] - plain[1]) == (10, 10)


def test_virtual_tokens_are_counted() -> None:
    base = support.llama()
    size = sum(p.numel() for p in base.parameters())
    assert get_peft_model(base, CueConfig(num_virtual_tokens=3)).get_nb_trainable_parameters() == (48, size + 48)


def test_tied_parameters_count_once() -> None:
    base = support.net()
    base.layers[0].down.weight = base.layers[0].up.weight
    _, total = get_peft_model(base, DenseConfig(target_modules=["last"])).get_nb_trainable_parameters()
    assert total == sum(p.numel() for p in support.net().parameters()) - 16 + 16


def test_a_sharded_parameter_counts_with_its_full_size() -> None:
    model: Any = get_peft_model(support.net(), DenseConfig(target_modules=["last"]))
    before = model.get_nb_trainable_parameters()[1]
    empty = nn.Parameter(model.get_base_model().head.weight.new_empty(0), requires_grad=False)
    empty.ds_numel = 8  # type: ignore[attr-defined]
    model.get_base_model().head.weight = empty
    assert model.get_nb_trainable_parameters()[1] == before


def test_a_model_without_parameters_is_no_division_by_zero() -> None:
    from peft_core.inspection.parameters import summary

    assert summary(nn.Identity()) == "trainable params: 0 || all params: 0 || trainable%: 0.0000"
