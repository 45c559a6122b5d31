"""`target_parameters` against the peer: the same files, starts and outputs, and its faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interop.cases import LIBRARIES, ours, peer, shake, using


class Experts(nn.Module):
    def __init__(self, experts: int, *, transposed: bool, hidden: int = 6) -> None:
        super().__init__()
        flip = (lambda t: t.transpose(1, 2).contiguous()) if transposed else (lambda t: t)
        self.up = nn.Parameter(flip(torch.randn(experts, hidden, 8)))
        self.down = nn.Parameter(flip(torch.randn(experts, 8, hidden)))
        self.mix = nn.Parameter(torch.randn(8, 8))
        if transposed:
            self.is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w.transpose(1, 2) if getattr(self, "is_transposed", False) else w for w in (self.up, self.down))
        return sum(torch.tanh(x @ up[e].T) @ down[e].T for e in range(up.shape[0])) @ self.mix.T


class Net(nn.Module):
    def __init__(self, experts: int = 3, *, transposed: bool = False, hidden: int = 6) -> None:
        super().__init__()
        self.experts = Experts(experts, transposed=transposed, hidden=hidden)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(x))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
ALL = ["experts.up", "down", "mix"]


def net(**kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kwargs)


def adapted(library: Any, base: nn.Module, **options: Any) -> Any:
    with using(library):
        config = library.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_parameters": ALL, **options})
        torch.manual_seed(3)
        return library.get_peft_model(base, config)


def tensors(library: Any, model: Any) -> dict[str, Tensor]:
    with using(library):
        found: dict[str, Tensor] = library.get_peft_model_state_dict(model)
        return found


STARTS = {
    "true": {},
    "false": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "patterns": {"rank_pattern": {"experts.down": 4, "mix": 1}, "alpha_pattern": {"up": 5}},
}


@pytest.mark.parametrize("options", STARTS.values(), ids=list(STARTS))
@pytest.mark.parametrize("transposed", [False, True])
def test_the_same_names_values_and_outputs(transposed: bool, options: dict[str, Any]) -> None:
    models = {library: adapted(module, net(transposed=transposed), **options) for library, module in LIBRARIES.items()}
    mine, theirs = (tensors(module, models[library]) for library, module in LIBRARIES.items())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert {n for n, _ in models["ours"].named_parameters()} == {n for n, _ in models["peer"].named_parameters()}
    assert models["ours"].base_model.targeted_parameter_names == models["peer"].base_model.targeted_parameter_names
    for model in models.values():
        shake(model)
    torch.testing.assert_close(models["ours"](X), models["peer"](X), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("writer", "reader"), [("ours", "peer"), ("peer", "ours")])
def test_files_are_read_by_the_other(writer: str, reader: str, tmp_path: Path) -> None:
    model = adapted(LIBRARIES[writer], net(), target_modules=["last"])
    shake(model)
    model.save_pretrained(tmp_path)
    with using(LIBRARIES[reader]):
        again = LIBRARIES[reader].PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(model(X), again(X), atol=1e-4, rtol=1e-5)


def test_one_transposed_expert_is_right_where_the_peer_adds_the_transposed_delta() -> None:
    for library, expected in ((ours, True), (peer, False)):
        model = adapted(library, net(experts=1, transposed=True, hidden=8), target_parameters=["up"])
        shake(model)
        a, b = (tensors(library, model)[f"base_model.model.experts.lora_{f}.weight"] for f in "AB")
        plain = net(experts=1, transposed=True, hidden=8)
        with torch.no_grad():
            plain.experts.up[0] += (3 / 2 * b @ a).T
        assert torch.allclose(model(X), plain(X), atol=1e-4) is expected


def test_one_transposed_rectangular_expert_works_where_the_peer_raises() -> None:
    for library, expected in ((ours, True), (peer, False)):
        try:
            model = adapted(library, net(experts=1, transposed=True), target_parameters=["up"])
            works = bool(torch.isfinite(model(X)).all())
        except RuntimeError:
            works = False
        assert works is expected


def test_a_foreign_parametrisation_gives_the_same_in_each_call_where_the_peers_differ() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    for library, expected in ((ours, True), (peer, False)):
        base = net()
        parametrize.register_parametrization(base.experts, "mix", Doubled())
        try:
            model = adapted(library, base, target_parameters=["mix"] if library is ours else ["original", "mix"])
            shake(model)
            same = torch.equal(model(X), model(X))
        except Exception:
            same = False
        assert same is expected


# ---- adapters of experts, as they were before transformers 5 -------------------------------------------------------------------
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3)).eval()


def qwen() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 8, "num_experts": 3, "num_experts_per_tok": 2}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SIZES, **sizes)).eval()


def write(folder: Path, block: str, names: tuple[str, str, str], **fields: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = {"self_attn.q_proj": (16, 16)}
    for expert in range(3):
        sizes |= {f"{block}.experts.{expert}.{name}": shape for name, shape in zip(names, ((24, 16), (24, 16), (16, 24)), strict=True)}
    if fields.pop("router", False):
        sizes[f"{block}.gate"] = (3, 16)
    found = {}
    for path, (out, inp) in sizes.items():
        found[f"base_model.model.model.layers.0.{path}.lora_A.weight"] = torch.randn(2, inp, generator=generator) * 0.3
        found[f"base_model.model.model.layers.0.{path}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * 0.3
    safetensors.torch.save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", *names], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def read(library: Any, base: nn.Module, folder: Path) -> Any:
    with using(library):
        return library.PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("router", [False, True])
def test_old_mixtral_adapters_become_what_they_become_in_the_peer(router: bool, tmp_path: Path) -> None:
    targets = ["q_proj", "w1", "w2", "w3", *(["gate"] if router else [])]
    write(tmp_path, "block_sparse_moe", ("w1", "w3", "w2"), router=router, target_modules=targets)
    mine, theirs = read(ours, mixtral(), tmp_path), read(peer, mixtral(), tmp_path)
    for name in ("rank_pattern", "alpha_pattern", "target_modules"):
        assert getattr(mine.peft_config["default"], name) == getattr(theirs.peft_config["default"], name)
    assert set(mine.peft_config["default"].target_parameters) == set(theirs.peft_config["default"].target_parameters)
    one, other = tensors(ours, mine), tensors(peer, theirs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    torch.testing.assert_close(mine(input_ids=IDS).logits, theirs(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


def test_the_scale_of_old_rslora_adapters_is_kept_where_the_peers_grows(tmp_path: Path) -> None:
    write(tmp_path, "block_sparse_moe", ("w1", "w3", "w2"), use_rslora=True)
    mine, theirs = read(ours, mixtral(), tmp_path), read(peer, mixtral(), tmp_path)
    scale = mine.get_base_model().model.layers[0].mlp.experts.inside.scaling["default"]
    assert scale == pytest.approx(3 / 2**0.5)
    assert not torch.allclose(mine(input_ids=IDS).logits, theirs(input_ids=IDS).logits, atol=1e-2)


def test_old_qwen_adapters_keep_their_experts_where_the_peer_loses_them(tmp_path: Path) -> None:
    write(tmp_path, "mlp", ("gate_proj", "up_proj", "down_proj"))
    mine, theirs = read(ours, qwen(), tmp_path), read(peer, qwen(), tmp_path)
    assert any(".experts." in key for key in tensors(ours, mine))
    assert not any(".experts." in key for key in tensors(peer, theirs))


def qwen3() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 24, "num_experts": 3, "num_experts_per_tok": 2}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **sizes)).eval()


@pytest.mark.parametrize("base", [mixtral, qwen3])
@pytest.mark.parametrize(("writer", "reader"), [(ours, peer), (peer, ours)], ids=["ours", "peer"])
def test_all_linear_adapts_what_the_peer_adapts(writer: Any, reader: Any, base: Any, tmp_path: Path) -> None:
    made = [adapted(library, base(), target_parameters=None, target_modules="all-linear") for library in (ours, peer)]
    mine, theirs = (model.peft_config["default"] for model in made)
    assert (mine.rank_pattern, mine.alpha_pattern) == (theirs.rank_pattern, theirs.alpha_pattern)
    assert set(mine.target_parameters) == set(theirs.target_parameters)
    one, other = tensors(ours, made[0]), tensors(peer, made[1])
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in other.items()}
    model = made[0] if writer is ours else made[1]
    shake(model)
    with using(writer):
        model.save_pretrained(tmp_path)
    torch.testing.assert_close(read(reader, base(), tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
