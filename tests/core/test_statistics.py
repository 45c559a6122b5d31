"""Running statistics of a base that was called in training mode: no adapter's file has them, and that is said."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_core import PeftModel, PeftWarning, get_peft_model
from support import dense

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def base(kind: type[nn.Module] = nn.BatchNorm1d, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), kind(4, **options), nn.Linear(4, 2))


def made(model: nn.Module, **fields: Any) -> Any:
    return get_peft_model(model, dense(target_modules=["0"], **fields))


def test_they_moved(tmp_path: Path) -> None:
    model = made(base()).train()
    model(X)
    with pytest.warns(PeftWarning, match=r"running statistics.*'1'.*modules_to_save") as said:
        model.save_pretrained(tmp_path)
    assert len(said) == 1


@pytest.mark.parametrize("how", ["evaluation", "before", "saved", "without", "fresh"])
def test_nothing_is_lost(how: str, tmp_path: Path) -> None:
    start = base(track_running_stats=False) if how == "without" else base()
    if how == "before":
        start(X)
    model = made(start, **({"modules_to_save": ["1"]} if how == "saved" else {}))
    model.train(how != "evaluation")
    if how not in ("before", "fresh"):
        model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)


def test_a_copy_and_a_loaded_model_count_from_their_own_start(tmp_path: Path) -> None:
    model = made(base()).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).train()
    loaded(X)
    with pytest.warns(PeftWarning, match="running statistics"):
        loaded.save_pretrained(tmp_path)
    with pytest.warns(PeftWarning, match="running statistics"):
        copy.deepcopy(loaded).save_pretrained(tmp_path)


def test_on_the_meta_device(tmp_path: Path) -> None:
    made(base().to("meta"))
