"""Initialisations beside the peer's: equal where it is right, and what is wrong with it where it is not."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interop.cases import base, batch, difference, ours, outputs, peer, save, shake, using

peers_corda = importlib.import_module("peft.tuners.lora.corda")
peers_config = importlib.import_module("peft.tuners.lora.config")
pytestmark = pytest.mark.filterwarnings("ignore:lora with eva initialization")  # both say it
LLAMA = ["q_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj"]


def make(library: Any, init: Any, on: str = "llama", *, how: dict[str, Any] | None = None, **options: Any) -> Any:
    """Return a base with a new adapter; the same seed for both libraries."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": GPT2 if on == "gpt2" else LLAMA, "fan_in_fan_out": on == "gpt2", **options}
    model = base(on)
    with using(library):
        config = library.LoraConfig(init_lora_weights=init, **options)
        torch.manual_seed(3)
        return library.get_peft_model(model, config, **(how or {}))


def both(init: Any, on: str = "llama", **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters of both libraries' models by name."""
    found, expected = (dict(make(library, init, on, **options).named_parameters()) for library in (ours, peer))
    assert found.keys() == expected.keys()
    return found, expected


def signless(name: str, value: Tensor) -> Tensor:
    """Singular vectors have no sign of their own."""
    return value.detach().double().abs() if "lora_" in name else value.detach().double()


def load(library: Any, folder: Path, on: str = "llama") -> Any:
    model = base(on)
    with using(library):
        return library.PeftModel.from_pretrained(model, str(folder))


# ---- values ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_orthogonal_draws_the_same_values(on: str) -> None:
    found, expected = both("orthogonal", on)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("init", "on", "options"),
    [
        ("pissa", "llama", {}),
        ("pissa", "gpt2", {}),
        ("pissa", "llama", {"use_rslora": True}),
        ("olora", "llama", {}),
        ("olora", "llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 9}}),
        ("mica", "llama", {}),
        ("mica", "gpt2", {}),
        ("mica", "llama", {"target_modules": ["embed_tokens"]}),
        ("pissa", "llama", {"r": 20, "target_modules": ["v_proj"]}),
    ],
)
def test_the_same_factors_and_base(init: str, on: str, options: dict[str, Any]) -> None:
    found, expected = both(init, on, **options)
    for name, value in expected.items():
        torch.testing.assert_close(signless(name, found[name]), signless(name, value), atol=2e-6, rtol=1e-5, msg=name)
        assert found[name].requires_grad is value.requires_grad, name


@pytest.mark.parametrize("init", ["pissa", "olora", "mica", "orthogonal"])
def test_files_go_both_ways(init: str, tmp_path: Path) -> None:
    for writer, reader in ((ours, peer), (peer, ours)):
        model = make(writer, init)
        shake(model)
        folder = tmp_path / writer.__name__ if writer is peer else tmp_path / "ours"
        save(writer, model, folder)
        read = load(reader, folder)
        assert difference(outputs(reader, read, batch("llama")), outputs(writer, model, batch("llama"))) < 1e-5


# ---- saved for the original base -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 9}}])
def test_converted_adapters_are_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    for library, name in ((ours, "ours"), (peer, "peer")):
        model = make(library, "olora", **options)  # whose signs are the same on both sides
        save(library, model, tmp_path / name / "initial")
        shake(model)
        save(library, model, tmp_path / name / "plain", path_initial_model_for_weight_conversion=str(tmp_path / name / "initial"))
        expected = outputs(library, model, batch("llama"))
    configs = [json.loads((tmp_path / name / "plain" / "adapter_config.json").read_text()) for name in ("ours", "peer")]
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_rslora"):
        assert configs[0][field] == pytest.approx(configs[1][field]), field
    found = [ours.load_peft_weights(tmp_path / name / "plain") for name in ("ours", "peer")]
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, atol=1e-6, rtol=1e-5)
    for reader, name in ((ours, "peer"), (peer, "ours")):
        assert difference(outputs(reader, load(reader, tmp_path / name / "plain"), batch("llama")), expected) < 1e-5


def test_the_peer_writes_into_the_initial_folder(tmp_path: Path) -> None:
    for library in (ours, peer):
        folder = tmp_path / library.__name__ if library is peer else tmp_path / "ours"
        model = make(library, "pissa")
        save(library, model, folder)
        before = (folder / "adapter_config.json").read_bytes()
        save(library, model, folder / "plain", path_initial_model_for_weight_conversion=str(folder))
        assert ((folder / "adapter_config.json").read_bytes() == before) is (library is ours)


def test_the_peer_does_not_convert_rslora_with_patterns(tmp_path: Path) -> None:
    options = {"use_rslora": True, "rank_pattern": {"q_proj": 2}}
    model = make(peer, "olora", **options)
    save(peer, model, tmp_path / "initial")
    with pytest.raises(ValueError, match="rslora"):
        save(peer, model, tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    mine = make(ours, "olora", **options)  # the same initial folder
    shake(mine)
    save(ours, mine, tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert difference(outputs(peer, load(peer, tmp_path / "plain"), batch("llama")), outputs(ours, mine, batch("llama"))) < 1e-5


# ---- EVA ---------------------------------------------------------------------------------------------------------------
def batches() -> list[dict[str, Tensor]]:
    return [batch("llama", seed) for seed in range(6)]


def eva(library: Any, **options: Any) -> Any:
    settings = library.EvaConfig(**{"rho": 2.0, "tau": 0.9, **options.pop("eva", {})})
    return make(library, "eva", **{"r": 2, "eva_config": settings, "target_modules": ["q_proj", "v_proj", "down_proj", "gate_proj"], **options})


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_finds_the_same_directions_and_ranks(rho: float) -> None:
    found, expected = (library.get_eva_state_dict(eva(library, eva={"rho": rho}), batches(), show_progress_bar=False) for library in (ours, peer))
    ranks = {name: rows.shape[0] for name, rows in found.items()}
    assert sum(ranks.values()) == 2 * len(ranks)
    assert ranks == {name: expected[name].shape[0] if name in expected else 0 for name in ranks}
    for name, rows in expected.items():
        if rows.shape[0]:
            # one direction might be the other's neighbour where two variances are nearly equal: compare what they span
            cosines = torch.linalg.svdvals(found[name].double() @ rows.double().T)
            assert cosines[0] > 0.98, name


def test_eva_sets_up_the_same_adapter() -> None:
    rows = {}
    generator = torch.Generator().manual_seed(1)
    for name, layer in eva(ours).named_modules():
        if type(layer).__name__ == "Linear" and hasattr(layer, "lora_A"):
            rank = len(rows) % 4
            rows[name] = torch.randn(rank, layer.in_features, generator=generator)
    models = []
    for library in (ours, peer):
        model = eva(library)
        with using(library):
            library.initialize_lora_eva_weights(model, eva_state_dict={k: v.clone() for k, v in rows.items()}, show_progress_bar=False)
        models.append(model)
    found, expected = (dict(model.named_parameters()) for model in models)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) or "lora_" not in name, name
        assert found[name].shape == value.shape
        assert found[name].requires_grad is value.requires_grad
    mine, others = (model.peft_config["default"] for model in models)
    assert sorted(mine.target_modules) == sorted(others.target_modules)
    assert (mine.rank_pattern, mine.alpha_pattern) == (others.rank_pattern, others.alpha_pattern)


def test_the_peers_scaling_under_rslora_changes_with_the_rank() -> None:
    found = []
    for library in (ours, peer):
        model = eva(library, use_rslora=True, target_modules=["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"])
        layers = [module for name, module in model.named_modules() if name.endswith("q_proj")]
        before = layers[0].scaling["default"]
        names = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
        with using(library):
            rows = {names[0]: torch.ones(3, 16), names[1]: torch.ones(1, 16)}
            library.initialize_lora_eva_weights(model, eva_state_dict=rows, show_progress_bar=False)
        found.append(next(m for name, m in model.named_modules() if name == names[0]).scaling["default"] / before)
    assert found[0] == pytest.approx(1)
    assert found[1] == pytest.approx((3 / 2) ** 0.5)


# ---- CorDA -------------------------------------------------------------------------------------------------------------
def corda_config(library: Any, **settings: Any) -> Any:
    kind = peers_config.CordaConfig if library is peer else ours.CordaConfig
    with using(library):
        return library.LoraConfig(r=3, lora_alpha=6, target_modules=LLAMA, init_lora_weights="corda", corda_config=kind(**settings))


def corda(library: Any, data: list[Tensor] | None = None, **settings: Any) -> Any:
    model, config = base("llama"), corda_config(library, **settings)

    def run() -> None:
        for ids in data if data is not None else [torch.arange(3 + i, 20 + i)[None] for i in range(3)]:
            model(input_ids=ids)

    preprocess = peers_corda.preprocess_corda if library is peer else ours.preprocess_corda
    with using(library), torch.random.fork_rng():
        torch.manual_seed(0)
        preprocess(model, config, run_model=run)
        return library.get_peft_model(model, config)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_takes_the_same_part(method: str, tmp_path: Path) -> None:
    """Covariances are handed over: the peer divides by |max X|, ours by max |X|, which weighs calls otherwise."""
    file = str(tmp_path / "covariances.pt")
    expected = corda(peer, corda_method=method, covariance_file=file)
    found = dict(corda(ours, corda_method=method, covariance_file=file).named_parameters())
    for name, value in expected.named_parameters():
        if name.endswith("base_layer.weight"):
            torch.testing.assert_close(found[name], value, atol=5e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("writer", ["ours", "peer"])
def test_decompositions_go_both_ways(writer: str, tmp_path: Path) -> None:
    first, second = (ours, peer) if writer == "ours" else (peer, ours)
    file = str(tmp_path / "cache.pt")
    expected = dict(corda(first, cache_file=file).named_parameters())
    for name, value in corda(second, cache_file=file).named_parameters():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_the_peer_takes_one_row_at_a_time_for_corda() -> None:
    two = [torch.arange(3, 23).view(2, 10)]
    with pytest.raises(RuntimeError):
        corda(peer, two)
    assert difference(outputs(ours, corda(ours, two), batch("llama")), outputs(ours, base("llama"), batch("llama"))) < 1e-4


def test_the_peers_cache_needs_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        corda(peer, cache_file="cache.pt")
    corda(ours, cache_file="mine.pt")
    assert Path("mine.pt").is_file()


# ---- LoRA-GA -----------------------------------------------------------------------------------------------------------
def lora_ga(library: Any, on: str = "llama", like: str = "peft", **settings: Any) -> Any:
    model = base(on)
    options = {"r": 2, "lora_alpha": 6, "target_modules": GPT2 if on == "gpt2" else LLAMA, "fan_in_fan_out": on == "gpt2"}
    with using(library):
        config = library.LoraConfig(init_lora_weights="lora_ga", lora_ga_config=library.LoraGAConfig(**settings), **options)

    def step() -> None:
        for seed in range(2):
            model(**batch(on, seed, labels=True)).loss.backward()

    model.config.use_cache = False
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with using(library), torch.random.fork_rng():
        torch.manual_seed(0)
        library.preprocess_loraga(model, config, step, **({"like": like} if library is ours else {}))
        return library.get_peft_model(model, config)


@pytest.mark.parametrize("on", ["llama", "gpt2"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_like_the_peer(on: str, direction: str, scale: str) -> None:
    found, expected = (dict(lora_ga(library, on, direction=direction, scale=scale).named_parameters()) for library in (ours, peer))
    factors = [name for name in expected if "lora_" in name]  # the base differs: a direction in B may have another sign than its partner in A
    assert factors
    for name in factors:
        mine, others = (signless(name, parameters[name]) for parameters in (found, expected))
        if scale == "weight_svd" and "lora_B" in name:  # the peer's σ₁(W) is a randomised estimate, and too small
            assert 1 - 1e-5 < mine.norm() / others.norm() < 1.1
            mine, others = mine / mine.norm(), others / others.norm()
        torch.testing.assert_close(mine, others, atol=2e-3 * float(others.max()), rtol=0, msg=name)


def test_the_peers_lora_ga_is_not_the_papers() -> None:
    """B carries the gradient's singular values, so that its size follows the loss's; ours follows the paper unless told otherwise."""
    norms = []
    for library, like in ((ours, "paper"), (ours, "peft"), (peer, "")):
        found = [p.detach().norm() for name, p in lora_ga(library, like=like).named_parameters() if "lora_B" in name]
        norms.append(torch.stack(found))
    torch.testing.assert_close(norms[1], norms[2], rtol=1e-3, atol=1e-5)
    assert (norms[0] / norms[2]).max() / (norms[0] / norms[2]).min() > 1.5
    sizes = torch.tensor([16, 16, 16, 16]).double() ** 0.25 / 4 * 2**0.5  # out^¼ / √γ, two columns
    torch.testing.assert_close(norms[0].double(), sizes, rtol=1e-4, atol=0)


def test_the_peer_loads_lora_ga_onto_the_wrong_base(tmp_path: Path) -> None:
    for library in (peer, ours):
        model = lora_ga(library)
        expected = outputs(library, model, batch("llama"))
        save(library, model, tmp_path / library.__name__ if library is peer else tmp_path / "ours")
        if library is peer:
            loaded = load(peer, tmp_path / peer.__name__)
            assert difference(outputs(peer, loaded, batch("llama")), expected) > 1e-3
        else:
            with pytest.raises(ours.ConfigError, match="does not hold what the adapter took out"):
                load(ours, tmp_path / "ours")


# ---- the peer's other faults -------------------------------------------------------------------------------------------
class OneConv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = Conv1D(8, 8)
        nn.init.normal_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_the_peers_olora_changes_a_conv1d() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    errors = []
    for library in (ours, peer):
        model, expected = OneConv1D(), OneConv1D()(x)
        with using(library):
            config = library.LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], fan_in_fan_out=True, init_lora_weights="olora")
            errors.append(float((library.get_peft_model(model, config)(x) - expected).detach().abs().max()))
    assert errors[0] < 1e-5
    assert errors[1] > 0.1


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_peer_rounds_the_factors_after_the_residual_is_formed(init: str) -> None:
    """bfloat16 bases: ours is off by half a unit in the last place of the base at most."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)

    errors = []
    for library in (ours, peer):
        w = One().layer.weight.detach().double()
        with using(library):
            config = library.LoraConfig(r=8, lora_alpha=12, target_modules=["layer"], init_lora_weights=init)
            layer = library.get_peft_model(One(), config).base_model.model.layer
        a, b = (getattr(layer, part)["default"].weight.detach().double() for part in ("lora_A", "lora_B"))
        errors.append(float((layer.base_layer.weight.detach().double() + 1.5 * b @ a - w).abs().max()))
    assert errors[0] < 0.9 * errors[1]


def test_the_peers_orthogonal_factors_are_not_orthogonal_in_bfloat16() -> None:
    found = []
    for library in (ours, peer):
        layer = make(library, "orthogonal", "llama-bf16").base_model.model.model.layers[0].self_attn.q_proj
        a, b = (getattr(layer, part)["default"].weight.detach().double() for part in ("lora_A", "lora_B"))
        found.append(float((b @ a).abs().max()))
    assert found[0] < 1e-7
    assert found[1] > 1e-5


def test_the_peers_randomised_pissa_differs_from_seed_to_seed(tmp_path: Path) -> None:
    for library in (ours, peer):
        found = []
        for seed in (1, 2):
            model = base("llama")
            with using(library):
                config = library.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights="pissa_niter_1")
                torch.manual_seed(seed)
                found.append(library.get_peft_model(model, config).base_model.model.lm_head.base_layer.weight.detach())
        assert torch.equal(*found) is (library is ours)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_the_peer_starts_embeddings_otherwise_than_asked_without_a_word(init: str) -> None:
    model = make(peer, init, target_modules=["embed_tokens"])
    assert model.base_model.model.model.embed_tokens.lora_embedding_A["default"].abs().max() == 0
    with pytest.raises(ours.ConfigError, match=f"'{init}' can't start 'model.embed_tokens'"):
        make(ours, init, target_modules=["embed_tokens"])
