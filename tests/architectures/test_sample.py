"""A sample of all architectures × methods, by seed: `nox -s architectures` runs all."""

from __future__ import annotations

import contextlib
import random

import pytest
import transformers

from architectures import building, checking

SAMPLE = 12
#: another one each time that transformers changes
SEED = transformers.__version__

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="the table is for transformers 5"),
]


def sample() -> list[list[building.Architecture]]:
    """Return lists of classes, at least one for each kind, in the order in which they are tried until one can be built."""
    by_kind: dict[str, list[building.Architecture]] = {}
    for architecture in building.architectures():
        by_kind.setdefault(architecture.kind, []).append(architecture)
    random_ = random.Random(SEED)
    for found in by_kind.values():
        random_.shuffle(found)
    kinds = [*by_kind, *random_.choices(list(by_kind), [len(found) for found in by_kind.values()], k=SAMPLE - len(by_kind))]
    counts = {kind: kinds.count(kind) for kind in by_kind}
    return [found[number :: counts[kind]] for kind, found in by_kind.items() for number in range(counts[kind])]


@pytest.mark.parametrize("candidates", sample(), ids=lambda candidates: str(candidates[0]))
def test_each_method_is_right_or_refused(candidates: list[building.Architecture]) -> None:
    for architecture in candidates:
        with contextlib.suppress(building.CanNotBuild):
            make = building.maker(architecture)
            break
    else:
        raise AssertionError(f"none of {candidates} can be built")
    for method in checking.methods_for(architecture):
        checking.check(architecture, make, method)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma4_text", "gpt_bigcode", "nemotron_h", "olmo_hybrid"])
def test_models_whose_layers_differ_are_right(model_type: str) -> None:
    architecture = next(one for one in building.architectures() if str(one) == f"causal-{model_type}")
    assert checking.check(architecture, building.maker(architecture), "prefix") == "right"


def test_a_method_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = next(one for one in building.architectures() if str(one) == "causal-llama")
    monkeypatch.setitem(checking.EXPECTED, "LoRA", lambda architecture, base, model: building.output(base, architecture))
    with pytest.raises(checking.Wrong, match="forward: off by"):
        checking.check(architecture, building.maker(architecture), "LoRA")
