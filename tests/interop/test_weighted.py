"""Weighted adapters and hot-swapped ones: the same effects in both libraries, and what the peer lets pass or gets wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interop.cases import base, ours, peer, using

OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "down_proj"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "convolution": {"target_modules": ["body"]},
}
NAMES = ("one", "two", "three")


class Pictures(nn.Module):
    """A convolution that the peer knows how to merge."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 6, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found


def made(library: Any, kind: str, ranks: tuple[int, ...] = (3, 3, 3), **options: Any) -> Any:
    """Return a model of one library with adapters of the same weights."""
    model: Any = Pictures() if kind == "convolution" else base("llama" if kind == "embedding" else kind)
    with using(library):
        for number, (name, rank) in enumerate(zip(NAMES, ranks, strict=True)):
            config = library.LoraConfig(r=rank, lora_alpha=number + 2, **{**OPTIONS[kind], **options})
            if number:
                model.add_adapter(name, config)
            else:
                model = library.get_peft_model(model, config, name)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def deltas(model: Any, name: str) -> dict[str, Tensor]:
    found = {
        path: module.get_delta_weight(name).detach()
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and name in module.scaling
    }
    assert found
    return found


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for path, value in other.items():
        torch.testing.assert_close(
            one[path], value, rtol=0, atol=2e-5 * max(1.0, float(value.abs().max())), msg=lambda text, path=path: f"{path}: {text}"
        )


TYPES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {"svd_rank": 5},
    "ties": {"density": 0.4},
    "ties-frequency": {"density": 0.4, "majority_sign_method": "frequency"},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "magnitude_prune": {"density": 0.3},
    "ties_svd": {"density": 0.4},
    "dare_linear_svd": {"density": 0.6},
    "dare_ties_svd": {"density": 0.6},
    "magnitude_prune_svd": {"density": 0.3, "svd_rank": 4},
    "svd-clamped": {"svd_clamp": 0.9},
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", TYPES)
def test_same_combination(kind: str, name: str) -> None:
    found = []
    for library in (ours, peer):
        model = made(library, kind)
        torch.manual_seed(11)
        with using(library):
            model.add_weighted_adapter(list(NAMES), [0.7, -1.2, 0.4], "new", combination_type=name.partition("-")[0], **TYPES[name])
        found.append((deltas(model, "new"), model.peft_config["new"]))
    assert_close(found[0][0], found[1][0])
    fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "fan_in_fan_out", "use_rslora")
    assert [getattr(found[0][1], field) for field in fields] == [getattr(found[1][1], field) for field in fields]


def test_same_union_of_expressions_and_of_one_adapter() -> None:
    found = []
    for library in (ours, peer):
        model = made(library, "llama", target_modules=r".*\.q_proj")
        with using(library):
            model.add_adapter("other", library.LoraConfig(r=3, target_modules=r".*\.v_proj"))
            model.add_weighted_adapter(["one", "other"], [1.0, 1.0], "both", combination_type="cat")
            model.add_weighted_adapter(["one"], [-0.3], "single", combination_type="svd", svd_rank=1)
        found.append((model.peft_config["both"].target_modules, deltas(model, "both"), deltas(model, "single")))
    assert found[0][0] == found[1][0]
    assert_close(found[0][1], found[1][1])
    assert_close(found[0][2], found[1][2])


# ---- what the peer lets pass ----------------------------------------------------------------------------------------------


def test_a_name_that_is_taken_is_refused() -> None:
    model = made(peer, "llama")
    with using(peer):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "three", combination_type="cat")  # returns and has done nothing
    assert model.peft_config["three"].r == 3
    with pytest.raises(ours.AdapterNameError, match="already exists"):
        made(ours, "llama").add_weighted_adapter(["one", "two"], [1.0, 1.0], "three", combination_type="cat")


def test_weights_that_are_too_few_are_refused() -> None:
    model = made(peer, "llama")
    with using(peer):
        model.add_weighted_adapter(["one", "two"], [1.0], "new", combination_type="cat")  # forgets "two"
    assert_close(deltas(model, "new"), deltas(model, "one"))
    with pytest.raises(ours.ConfigError, match="2 adapters and 1 weights"):
        made(ours, "llama").add_weighted_adapter(["one", "two"], [1.0], "new", combination_type="cat")


def test_a_density_that_is_missing_leaves_nothing_half_made() -> None:
    model = made(peer, "llama")
    with using(peer), pytest.raises(Exception):  # noqa: B017, PT011
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "new", combination_type="ties")
    assert "new" in model.peft_config
    model = made(ours, "llama")
    with pytest.raises(ours.ConfigError, match="needs a density"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "new", combination_type="ties")
    assert "new" not in model.peft_config


@pytest.mark.parametrize("name", ["svd", "cat"])
def test_same_combination_of_ranks_by_pattern(name: str) -> None:
    found = []
    for library in (ours, peer):
        model = made(library, "llama", rank_pattern={"down_proj": 6}, alpha_pattern={"q_proj": 7})
        with using(library):
            model.add_weighted_adapter(["one", "two"], [1.0, 2.0], "new", combination_type=name)
        found.append(deltas(model, "new"))
    assert_close(*found)


def test_dora_is_not_combined_as_if_it_were_lora() -> None:
    options = {"use_dora": True, "target_modules": ["q_proj"]}
    wrong, right = made(peer, "llama", **options), made(ours, "llama", **options)
    outputs: dict[str, list[Tensor]] = {"peer": [], "ours": []}
    ids = torch.arange(3, 9)[None]
    for name, library, model in (("peer", peer, wrong), ("ours", ours, right)):
        with using(library), torch.no_grad():
            model.add_weighted_adapter(["one"], [1.0], "copied", combination_type="svd", svd_rank=16)
            for adapter in ("one", "copied"):
                model.set_adapter(adapter)
                outputs[name].append(model(input_ids=ids).logits)
    assert torch.allclose(*outputs["ours"], atol=1e-4)
    assert not torch.allclose(*outputs["peer"], atol=1e-2)


# ---- hot-swapping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 3, 6])
def test_a_file_of_the_peer_is_swapped_in(tmp_path: Path, rank: int) -> None:
    other = made(peer, "llama", (rank, 1, 1))
    with using(peer):
        other.save_pretrained(tmp_path, selected_adapters=["one"])
    other.set_adapter("one")
    model = made(ours, "llama")
    ours.prepare_model_for_compiled_hotswap(model, target_rank=6)
    ours.hotswap_adapter(model, tmp_path / "one", "one")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_after_a_swap_the_file_fits_its_config(tmp_path: Path) -> None:
    """The peer writes padded weights beside the rank that was there before: such a folder can't be loaded, or has another scale."""
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    small = made(ours, "llama", (2, 1, 1))
    small.save_pretrained(tmp_path / "small", selected_adapters=["one"])
    ids = torch.arange(3, 9)[None]
    for name, library, prepare, swap in (
        ("peer", peer, prepare_model_for_compiled_hotswap, hotswap_adapter),
        ("ours", ours, ours.prepare_model_for_compiled_hotswap, ours.hotswap_adapter),
    ):
        model = made(library, "llama")
        with using(library), torch.no_grad():
            prepare(model, target_rank=6)
            swap(model, str(tmp_path / "small" / "one"), adapter_name="one")
            expected = model(input_ids=ids).logits
            model.save_pretrained(tmp_path / name, selected_adapters=["one"])
            right = True
            try:
                again = library.PeftModel.from_pretrained(base("llama"), tmp_path / name / "one").eval()
                right = again(input_ids=ids).logits.allclose(expected, atol=1e-4)
            except Exception:
                right = False
        assert right is (library is ours)


def test_same_refusals_of_configs() -> None:
    from peft.utils.hotswap import check_hotswap_configs_compatible

    for options in ({}, {"r": 2}, {"lora_alpha": 3}, {"use_rslora": True}, {"lora_dropout": 0.1}, {"alpha_pattern": {"a": 3}}, {"use_dora": True}):
        answers = []
        for library, check in ((ours, ours.check_hotswap_configs_compatible), (peer, check_hotswap_configs_compatible)):
            try:
                check(library.LoraConfig(), library.LoraConfig(**options))
                answers.append(None)
            except ValueError:
                answers.append(ValueError)
        assert answers[0] == answers[1], options
