"""The same seed and data give the same training: losses, gradients, weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interop.cases import CASES, Case, batch, ours, peer, using


def trained(library: Any, case: Case, steps: int = 5) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = case.make(library)
    model.train()
    # a large eps: the bias of a key has no gradient but noise, of which Adam would make full steps
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)
    torch.manual_seed(17)
    losses = []
    with using(library):
        for step in range(steps):
            # every position counts for the loss of question answering, padding too
            inputs = batch(case.base, seed=step % 2, labels=True, padded=case.base != "bert-qa")
            if case.base == "bert":  # nothing to predict: learn to give small numbers
                inputs.pop("labels")
                loss = model(**inputs).last_hidden_state[:, :-2].square().mean()
            else:
                loss = model(**inputs).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", [case for case in CASES if "bf16" not in case.base], ids=lambda case: case.id)
def test_same_trajectory(case: Case) -> None:
    losses, weights = trained(ours, case)
    expected, there = trained(peer, case)
    assert losses == pytest.approx(expected, rel=0, abs=1e-5)
    assert losses[0] != losses[2], "nothing was learnt from the first batch"
    assert weights.keys() == there.keys()
    for name, value in there.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
