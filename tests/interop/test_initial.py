"""A seed gives the same initial weights in both libraries."""

from __future__ import annotations

import pytest
import torch

from interop.cases import BY_ID, CASES, Case, assert_close, batch, difference, ours, outputs, peer, tolerance, using


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_same_seed_same_weights(case: Case) -> None:
    found = dict(case.make(ours).named_parameters())
    expected = dict(case.make(peer).named_parameters())
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_same_seed_same_outputs(case: Case) -> None:
    found, expected = (outputs(library, case.make(library), batch(case.base)) for library in (ours, peer))
    assert_close(found, expected, tolerance(case))


@pytest.mark.parametrize("name", ["lora-linear", "lora-embedding", "loha-linear", "prompt-vocabulary", "prefix-gqa-projection"])
def test_as_many_numbers_are_drawn(name: str) -> None:
    """What is drawn after the adapter (the order of the data, say) then is the same too."""
    after = []
    for library in (ours, peer):
        BY_ID[name].make(library)
        after.append(torch.rand(8))
    assert torch.equal(*after)


@pytest.mark.parametrize("name", ["lora-linear", "lora-no-init", "loha-linear", "prompt-random", "prefix-gqa"])
def test_second_adapter(name: str) -> None:
    case = BY_ID[name]
    models = []
    for library in (ours, peer):
        model = case.make(library)
        with using(library):
            torch.manual_seed(11)
            model.add_adapter("other", case.make_config(library))
        models.append(dict(model.named_parameters()))
    found, expected = models
    if not name.startswith("p"):  # the peer never freezes prompts (api.md §12.9)
        assert {k: v.requires_grad for k, v in found.items()} == {k: v.requires_grad for k, v in expected.items()}
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


def test_fan_in_fan_out_is_corrected() -> None:
    case = BY_ID["lora-gpt2"]
    options = {**case.options, "fan_in_fan_out": False}
    wrong = Case("wrong", case.base, case.config, options)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False"):
        model = wrong.make(ours)
    other = wrong.make(peer)
    assert model.peft_config["default"].fan_in_fan_out is other.peft_config["default"].fan_in_fan_out is True
    assert difference(outputs(ours, model, batch(case.base)), outputs(peer, other, batch(case.base))) < 1e-6
