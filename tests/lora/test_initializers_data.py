"""Initialisations that look at data: EVA, CorDA, LoRA-GA, and LoftQ's corrections of a quantised base."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peft_lora
from peft_core import AdapterFileError, AdapterNotFoundError, ConfigError, PeftModel, PeftWarning, get_peft_model
from peft_core.testing import tiny
from peft_lora import CordaConfig, EvaConfig, LoraConfig, LoraGAConfig
from peft_lora import eva as eva_module
from peft_lora.corda import decompose
from peft_lora.eva_passes import Site, digest, distribute, gathered
from peft_lora.loftq import rounded_to_nf4
from peft_lora.pca import IncrementalPca
from support import Unchanged

pytestmark = pytest.mark.filterwarnings("ignore:lora with eva initialization")  # `eva` below looks for it


class Net(nn.Module):
    """x (…, 6) → a and b, which see the same, → a Conv1D: rectangular everywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(6, 8)
        self.c = Conv1D(5, 8)
        self.idle = nn.Linear(6, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(x) * self.b(x)))


def stretched(rows: int, seed: int, spectrum: tuple[float, ...] = (9, 5, 3, 1, 0.5, 0.1)) -> Tensor:
    """Rows whose principal directions are well apart, off the origin."""
    generator = torch.Generator().manual_seed(4)
    turned = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator)).Q
    x = torch.randn(rows, len(spectrum), generator=torch.Generator().manual_seed(seed)) * torch.tensor(spectrum)
    return x @ turned + 1.5


def config(init: str, targets: Any = ("a", "b", "c"), **options: Any) -> LoraConfig:
    options = {"r": 2, "lora_alpha": 3, "fan_in_fan_out": list(targets) == ["c"], **options}
    return LoraConfig(target_modules=list(targets), init_lora_weights=init, **options)


# ---- the analysis of components ------------------------------------------------------------------------------------------
def centred_svd(x: Tensor) -> tuple[Tensor, Tensor]:
    _, s, vt = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    return s, vt


def test_pca_in_batches_is_that_of_all_rows_at_once() -> None:
    batches = [stretched(rows, seed) for seed, rows in enumerate((7, 30, 6, 1, 50))]
    pca = IncrementalPca(6)
    for batch in batches:
        pca.update(batch)
    x = torch.cat(batches)
    s, vt = centred_svd(x)
    torch.testing.assert_close(pca.mean, x.double().mean(0))
    torch.testing.assert_close(pca.singular_values, s)
    torch.testing.assert_close(pca.directions.abs(), vt.abs(), atol=1e-9, rtol=0)
    torch.testing.assert_close(pca.ratios, s.square() / s.square().sum())
    assert bool((pca.directions.gather(1, pca.directions.abs().argmax(1, keepdim=True)) > 0).all())


def test_a_truncated_pca_finds_the_leading_directions() -> None:
    pca = IncrementalPca(3)
    batches = [stretched(20, seed) for seed in range(10)]
    for batch in batches:
        pca.update(batch, 0.99)
    _, vt = centred_svd(torch.cat(batches))
    assert bool(((pca.directions * vt[:3]).sum(1).abs() > 0.99).all())
    assert bool(pca.converged.all())
    torch.testing.assert_close(pca.directions @ pca.directions.T, torch.eye(3, dtype=torch.float64))


def test_pca_of_fewer_rows_than_directions_stays_orthonormal() -> None:
    pca = IncrementalPca(5)
    pca.update(stretched(5, 1))  # centred, they span four dimensions
    torch.testing.assert_close(pca.directions @ pca.directions.T, torch.eye(5, dtype=torch.float64), atol=1e-9, rtol=0)
    pca.update(torch.zeros(3, 6))
    assert torch.isfinite(pca.directions).all()


def test_ranks_go_where_the_variance_is() -> None:
    # methods.md 3.1: spectra [.5, .3, .12, .05], [.99, …], flat; r = 2
    sites = [Site(name, nn.Identity(), 2, 4, 4, None, False) for name in "xyz"]
    for site, ratios in zip(sites, ([0.5, 0.3, 0.12, 0.05], [0.99, 0.005, 0.003, 0.002], [0.25, 0.25, 0.25, 0.25]), strict=True):
        site.pca.rows, site.pca.ratios = 1, torch.tensor(ratios)
    distribute(sites, 6)
    assert [site.rank for site in sites] == [2, 1, 3]
    sites[2].pca.ratios = torch.tensor([0.11, 0.11, 0.1, 0.1])
    distribute(sites, 6)
    assert [site.rank for site in sites] == [3, 1, 2]


def test_digests_tell_tensors_apart() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    swapped = x.flip(0)
    nudged = x.clone()
    nudged[3, 4] = torch.nextafter(nudged[3, 4], torch.tensor(9.0))
    found = {digest(t) for t in (x, swapped, nudged, x.reshape(6, 40), -x, torch.zeros(40, 6))}
    assert len(found) == 6
    assert digest(x) == digest(x.clone())


def test_rows_of_all_processes_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes have different numbers of rows: shorter ones are padded on the way, and no padding arrives."""
    mine, others = torch.ones(2, 6), torch.full((5, 6), 2.0)
    sent: list[Tensor] = []

    def all_gather(into: list[Tensor], value: Tensor) -> None:
        sent.append(value)
        into[0].copy_(value)
        into[1].copy_(torch.tensor([5]) if value.dim() == 1 else others)

    assert gathered(mine) is mine
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    assert torch.equal(gathered(mine), torch.cat([mine, others]))
    assert [tuple(value.shape) for value in sent] == [(1,), (5, 6)]


# ---- EVA ----------------------------------------------------------------------------------------------------------------
BATCHES = [stretched(30, seed) for seed in range(8)]
PLAIN: dict[str, Any] = {
    "forward_fn": lambda model, x: model(x),
    "prepare_model_inputs_fn": None,
    "prepare_layer_inputs_fn": None,
    "show_progress_bar": False,
}


def eva(targets: Any = ("a", "b", "c"), settings: EvaConfig | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    with pytest.warns(PeftWarning, match="lora with eva initialization used with low_cpu_mem_usage=False"):
        return get_peft_model(Net(), config("eva", targets, eva_config=settings or EvaConfig(rho=3.0), **options))


def inputs_of(name: str) -> Tensor:
    """Everything that a layer sees of the data."""
    seen: list[Tensor] = []
    model = Net()
    getattr(model, name).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for batch in BATCHES:
        model(batch)
    return torch.cat(seen)


def test_eva_finds_the_principal_directions_of_the_inputs() -> None:
    found = peft_lora.get_eva_state_dict(eva(), BATCHES, **PLAIN)
    assert list(found) == ["base_model.model.a", "base_model.model.b", "base_model.model.c"]
    assert sum(rows.shape[0] for rows in found.values()) == 6
    spectra = {}
    for name, rows in found.items():
        s, vt = centred_svd(inputs_of(name.rpartition(".")[2]))
        spectra[name] = s.square() / s.square().sum()
        assert rows.dtype == torch.float32
        assert bool(((rows.double() * vt[: rows.shape[0]]).sum(1).abs() > 0.99).all()), name
    order = sorted(((float(ratio), name) for name, ratios in spectra.items() for ratio in ratios[:6]), reverse=True)[:6]
    assert {name: rows.shape[0] for name, rows in found.items()} == {name: sum(owner == name for _, owner in order) for name in found}


def test_eva_leaves_the_model_as_it_was() -> None:
    model = eva().train()
    model.base_model.model.b.eval()
    with Unchanged(model):
        peft_lora.get_eva_state_dict(model, BATCHES, **PLAIN)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_eva_of_a_plain_model_has_its_names() -> None:
    whole = config("eva", eva_config=EvaConfig(rho=3.0))
    with Unchanged(base := Net()):
        found = peft_lora.get_eva_state_dict(base, BATCHES, whole, **PLAIN)
    wrapped = peft_lora.get_eva_state_dict(eva(), BATCHES, **PLAIN)
    assert {f"base_model.model.{name}": rows.shape for name, rows in found.items()} == {name: rows.shape for name, rows in wrapped.items()}
    for name, rows in found.items():
        torch.testing.assert_close(rows, wrapped[f"base_model.model.{name}"])
    assert whole.target_modules == {"a", "b", "c"}


def test_eva_without_targets_looks_at_every_linear_layer() -> None:
    open_config = LoraConfig(r=2, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    base = Net()
    del base.idle
    found = peft_lora.get_eva_state_dict(base, BATCHES, open_config, **PLAIN)
    assert list(found) == ["a", "b", "c"]
    assert open_config.target_modules is None


def test_layers_with_equal_inputs_share_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[tuple[int, int]] = []
    update = IncrementalPca.update
    monkeypatch.setattr(IncrementalPca, "update", lambda self, x, cosine: (updates.append((x.shape[1], self.components)), update(self, x, cosine))[1])
    found = peft_lora.get_eva_state_dict(eva(("a", "b"), rank_pattern={"a": 1, "b": 3}), BATCHES, **PLAIN)
    assert set(updates) == {(6, 6)}  # as many directions as the greediest follows: 3 · 3, of which there are 6
    assert len(updates) < 2 * len(BATCHES)
    a, b = found.values()
    assert a.shape[0] >= b.shape[0]  # the one that carries the analysis gets the most
    assert torch.equal(a[: b.shape[0]], b)


def test_whitening_divides_by_the_root_of_the_singular_values() -> None:
    found = []
    for whiten in (False, True):
        model = eva(("a",), EvaConfig(rho=3.0, tau=0.0, whiten=whiten))
        found.append(peft_lora.get_eva_state_dict(model, BATCHES[:1], **PLAIN)["base_model.model.a"])
    s, _ = centred_svd(torch.cat([BATCHES[0], BATCHES[0]]))  # the second pass says that nothing has moved
    torch.testing.assert_close((found[0] / found[1]).double(), s[:2, None].sqrt().expand(2, 6), rtol=1e-4, atol=0)


def test_padding_and_masked_labels_are_left_out() -> None:
    ids = torch.randint(1, 30, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.clone()
    labels[:, :2] = -100
    seen: list[Tensor] = []

    def rows(args: Any, prepared: Any, name: str) -> Tensor:
        found = eva_module.prepare_layer_inputs_fn_language_modeling(args, prepared, name)
        seen.append(found)
        return found

    for settings, tokens in ((EvaConfig(rho=1.0), 4 * 7 - 4), (EvaConfig(rho=1.0, use_label_mask=False), 4 * 9 - 4)):
        model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=settings))
        seen.clear()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        peft_lora.get_eva_state_dict(model, [batch], prepare_layer_inputs_fn=rows, show_progress_bar=False, max_passes=99)
        assert {x.shape[0] for x in seen} == {tokens}


def test_tokens_that_are_too_few_wait_for_others() -> None:
    small = [row[None] for batch in BATCHES for row in batch]
    found = peft_lora.get_eva_state_dict(eva(("a",)), small, **PLAIN)["base_model.model.a"]
    _, vt = centred_svd(torch.cat(BATCHES))
    assert bool(((found.double() * vt[:2]).sum(1).abs() > 0.98).all())


@pytest.mark.filterwarnings("ignore:EVA. after:UserWarning")
@pytest.mark.parametrize(("use_rslora", "adjust"), [(False, True), (True, True), (False, False)])
def test_eva_redistributes_ranks(use_rslora: bool, adjust: bool, tmp_path: Path) -> None:
    model = eva(settings=EvaConfig(adjust_scaling_factors=adjust), use_rslora=use_rslora)
    scaling = model.base_model.model.a.scaling["default"]
    with torch.no_grad():
        expected = model(BATCHES[0])
    rows = {f"base_model.model.{name}": torch.randn(rank, width) for name, rank, width in (("a", 3, 6), ("b", 0, 6), ("c", 2, 8))}
    peft_lora.initialize_lora_eva_weights(model, eva_state_dict=rows, show_progress_bar=False)
    layers = model.base_model.model
    assert isinstance(layers.b, nn.Linear)  # a rank of 0: not even a wrapper
    assert torch.equal(layers.a.lora_A["default"].weight, rows["base_model.model.a"])
    assert torch.equal(layers.c.lora_A["default"].weight, rows["base_model.model.c"])
    if adjust:  # also under rslora, where the peer's scaling changes
        assert layers.a.scaling["default"] == pytest.approx(scaling)
    else:
        assert layers.a.scaling["default"] == pytest.approx(3 / 3)
    settled = model.peft_config["default"]
    assert settled.target_modules == ["a", "c"]
    assert settled.rank_pattern == {"a": 3}
    assert settled.alpha_pattern == ({"a": pytest.approx(3 * (3 / 2) ** (0.5 if use_rslora else 1))} if adjust else {})
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{name}.lora_{part}.default.weight" for name in ("a", "c") for part in "AB"
    }
    with torch.no_grad():
        torch.testing.assert_close(model(BATCHES[0]), expected)
        layers.a.lora_B["default"].weight.normal_()
        model.save_pretrained(tmp_path)
        other = PeftModel.from_pretrained(Net(), tmp_path)
        torch.testing.assert_close(other(BATCHES[0]), model(BATCHES[0]))
    assert model.unload().b is not None


def test_eva_from_data_and_layers_that_keep_their_rank() -> None:
    model = eva(("a",), EvaConfig(rho=1.0))
    before = model.base_model.model.a.lora_A["default"].weight
    peft_lora.initialize_lora_eva_weights(model, BATCHES, **PLAIN)
    after = model.base_model.model.a.lora_A["default"].weight
    assert after is before
    _, vt = centred_svd(torch.cat(BATCHES[:3]))
    assert bool(((after.detach().double() * vt[:2]).sum(1).abs() > 0.98).all())


def test_eva_fills_an_adapter_that_was_made_without_memory() -> None:
    model = get_peft_model(Net(), config("eva", ("a", "b", "c"), eva_config=EvaConfig()), low_cpu_mem_usage=True)
    assert model.base_model.model.a.lora_A["default"].weight.is_meta
    rows = {"base_model.model.a": torch.randn(2, 6), "base_model.model.c": torch.randn(3, 8)}
    with pytest.warns(PeftWarning, match="no directions for 'base_model.model.b'"):
        peft_lora.initialize_lora_eva_weights(model, eva_state_dict=rows)
    assert torch.equal(model.base_model.model.a.lora_A["default"].weight, rows["base_model.model.a"])
    assert 0 < model.base_model.model.b.lora_A["default"].weight.abs().max() <= 6**-0.5
    with torch.no_grad():
        torch.testing.assert_close(model(BATCHES[0]), Net()(BATCHES[0]))
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_eva_of_some_layers_warns_of_the_others() -> None:
    model = eva(("a", "b"))
    with pytest.warns(PeftWarning, match=r"no directions for 'base_model.model.b'"):
        peft_lora.initialize_lora_eva_weights(model, eva_state_dict={"base_model.model.a": torch.ones(2, 6)})


def wrong(**changes: Any) -> Callable[[], Any]:
    return lambda: peft_lora.initialize_lora_eva_weights(**{"model": eva(), "dataloader": BATCHES, **PLAIN, **changes})


@pytest.mark.filterwarnings("ignore:init_lora_weights is 'eva' but:UserWarning")
@pytest.mark.parametrize(
    ("act", "message"),
    [
        (wrong(model=Net()), "not a PeftModel"),
        (wrong(dataloader=None), "EVA needs data"),
        (wrong(dataloader=[]), "dataloader is empty"),
        (wrong(dataloader=iter(BATCHES[:1]), max_passes=3), "only once"),
        (wrong(dataloader=[BATCHES[0][:3]]), r"looks for 6 directions in the inputs of 'base_model.model.a', and the data has only 3"),
        (wrong(dataloader=[BATCHES[0] / 0]), "inputs of 'base_model.model.a' are not finite"),
        (wrong(eva_state_dict={"base_model.model.d": torch.ones(1, 6)}), "no layer of the adapter; did you mean 'base_model.model."),
        (wrong(eva_state_dict={"base_model.model.a": torch.ones(1, 7)}), r"\(1, 7\), and the layer takes \(rank, 6\)"),
        (wrong(adapter_name="other"), "no config for the adapter 'other'"),
        (wrong(prepare_model_inputs_fn=eva_module.prepare_model_inputs_fn_language_modeling), "not a dict"),
        (wrong(prepare_layer_inputs_fn=lambda args, prepared, name: args[0][0]), r"returned \(6,\)"),
        (wrong(model=eva(("a", "idle"))), "'base_model.model.idle' is not run"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_eva_refuses(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        act()


def test_eva_is_for_adapters_that_ask_for_it() -> None:
    model = get_peft_model(Net(), config("gaussian"))
    with pytest.raises(ConfigError, match="needs init_lora_weights='eva'"):
        peft_lora.initialize_lora_eva_weights(model, BATCHES, **PLAIN)


def test_eva_stops_after_some_passes() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(8, 6, generator=generator)]
    with pytest.warns(PeftWarning, match=r"after 1 passes.*'base_model.model.a'.* tau=1"):
        peft_lora.get_eva_state_dict(eva(("a",), EvaConfig(rho=1.0, tau=1.0)), noise, max_passes=1, **PLAIN)


# ---- CorDA ----------------------------------------------------------------------------------------------------------------
def corda(**settings: Any) -> LoraConfig:
    return config("corda", corda_config=CordaConfig(**settings))


def run(model: nn.Module, batches: list[Tensor] = BATCHES) -> Callable[[], None]:
    def call() -> None:
        for batch in batches:
            model(batch.view(2, -1, 6))

    return call


def covariance(name: str) -> Tensor:
    """The mean of XᵀX over the batches, each divided by its largest magnitude, in float64."""
    parts = [x.double() / x.abs().max() for x in inputs_of(name).split(30)]
    return torch.stack([x.T @ x for x in parts]).mean(0)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("name", ["a", "c"])
def test_corda(method: str, name: str) -> None:
    base, original = Net(), Net()
    settings = corda(corda_method=method)
    peft_lora.preprocess_corda(base, settings, run(base))
    model = get_peft_model(base, settings)
    layer = getattr(model.base_model.model, name)
    w = layer.ops.matrix(getattr(original, name).weight.detach()).double()
    c = covariance(name)
    damped = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    u, sigma, vt = torch.linalg.svd(w @ damped, full_matrices=False)
    chosen = slice(0, 2) if method == "ipm" else slice(len(sigma) - 2, len(sigma))
    expected = u[:, chosen] * sigma[chosen] @ (torch.linalg.inv(damped) @ vt[chosen].T).T
    a, b = (factor.detach().double() for factor in layer.factors("default"))
    s = layer.scaling["default"]
    torch.testing.assert_close(s * b @ a, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(layer.ops.matrix(layer.get_base_layer().weight).detach().double(), w - expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(a.norm(dim=1) / (sigma[chosen] / s).sqrt(), (torch.linalg.inv(damped) @ vt[chosen].T).norm(dim=0), rtol=1e-4, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(BATCHES[0]), original(BATCHES[0]), atol=1e-5, rtol=1e-5)


def test_corda_of_all_ranks_is_the_weight() -> None:
    generator = torch.Generator().manual_seed(1)
    w, x = torch.randn(7, 5, generator=generator), torch.randn(3, 5, generator=generator)
    found = decompose(w, x.T @ x, 5)  # a covariance of rank 3
    torch.testing.assert_close(found.U_WC * found.S_WC @ found.V_WC.T, w)


def test_what_corda_leaves_on_modules_goes_when_it_is_used() -> None:
    base = Net()
    settings = corda()
    peft_lora.preprocess_corda(base, settings, run(base))
    assert base.a.eigens.S_WC.shape == (2,)
    assert not hasattr(base.a, "covariance_matrix")
    broken = copy.copy(settings)
    broken.rank_pattern = {"c": 3}
    with Unchanged(base), pytest.raises(ConfigError, match=r"decomposition of 'c'.*\(5, 2\).*r=3 needs"):
        get_peft_model(base, broken)
    get_peft_model(base, settings)
    assert not any(hasattr(module, "eigens") for module in base.modules())


def test_corda_keeps_covariances_if_asked() -> None:
    base = Net()
    peft_lora.preprocess_corda(base, corda(prune_temporary_fields=False), run(base))
    torch.testing.assert_close(base.a.covariance_matrix.double(), covariance("a"), atol=1e-5, rtol=1e-5)


def test_corda_takes_any_shape_of_batch_and_weighs_calls_alike() -> None:
    found = []
    for batch in (BATCHES[0], BATCHES[0].view(2, 3, 5, 6), 100 * BATCHES[0]):
        base = Net()
        peft_lora.preprocess_corda(base, config("corda", ["a"], corda_config=CordaConfig()), lambda base=base, batch=batch: base(batch))
        found.append(base.a.eigens)
    for other in found[1:]:
        torch.testing.assert_close(other.V_WC.abs(), found[0].V_WC.abs(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_corda_divides_by_the_largest_magnitude(sign: int) -> None:
    """The peer divides by |max X|, which is no bound where the largest number is negative, and may be 0."""
    base = Net()
    x = torch.cat([-BATCHES[0].abs(), torch.zeros(2, 6)]) * sign
    peft_lora.preprocess_corda(base, config("corda", ["a"], corda_config=CordaConfig(prune_temporary_fields=False)), lambda: base(x))
    y = x.double() / x.abs().max()
    torch.testing.assert_close(base.a.covariance_matrix.double(), y.T @ y, atol=1e-5, rtol=1e-5)


def test_corda_files(tmp_path: Path) -> None:
    cache, covariances = str(tmp_path / "deep" / "cache.pt"), str(tmp_path / "covariances.pt")
    base = Net()
    peft_lora.preprocess_corda(base, corda(cache_file=cache, covariance_file=covariances), run(base))
    found = [base.a.eigens]
    for settings in (corda(cache_file=cache), corda(covariance_file=covariances)):
        base = Net()
        peft_lora.preprocess_corda(base, settings)
        found.append(base.a.eigens)
    for other in found[1:]:
        torch.testing.assert_close(vars(other), vars(found[0]), atol=1e-5, rtol=1e-5)
    assert set(torch.load(covariances)) == {"a", "b", "c"}
    assert {key for key in torch.load(cache) if key.startswith("a.")} == {"a.eigens.S_WC", "a.eigens.U_WC", "a.eigens.V_WC"}


def test_corda_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the peer fails: makedirs("")
    base = Net()
    peft_lora.preprocess_corda(base, corda(cache_file="cache.pt"), run(base))
    assert Path("cache.pt").is_file()


def test_corda_looks_at_another_model_if_asked() -> None:
    base, other = Net(), Net()
    peft_lora.preprocess_corda(base, corda(), run(other), hooked_model=other)
    assert hasattr(base.a, "eigens")
    assert not hasattr(other.a, "eigens")
    assert not other.a._forward_pre_hooks


@pytest.mark.parametrize("strict", [True, False])
def test_corda_from_a_file_needs_its_decomposition(strict: bool, tmp_path: Path) -> None:
    base, settings = Net(), corda()
    peft_lora.preprocess_corda(base, settings, run(base))
    model = get_peft_model(base, settings)
    with torch.no_grad():
        model.base_model.model.a.lora_B["default"].weight.add_(0.1)
        expected = model(BATCHES[0])
    model.save_pretrained(tmp_path)
    with Unchanged(base := Net()), pytest.raises(ConfigError, match=r"'corda': 'a' has not been decomposed.*path_initial_model"):
        PeftModel.from_pretrained(base, tmp_path, strict=strict)
    peft_lora.preprocess_corda(base, settings, run(base))
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path, strict=strict)(BATCHES[0]), expected, atol=1e-5, rtol=1e-5)


def broken_file(tmp_path: Path) -> str:
    (tmp_path / "broken").write_text("no tensors")
    return str(tmp_path / "broken")


@pytest.mark.parametrize(
    ("settings", "how", "error", "message"),
    [
        (corda(), {}, ConfigError, "no run_model"),
        (corda(), {"run_model": lambda: None}, ConfigError, "did not run 'a'"),
        (config("gaussian"), {"run_model": lambda: None}, ConfigError, "needs init_lora_weights='corda'"),
        (corda(), {"run_model": lambda: None, "hooked_model": nn.Linear(2, 2)}, ConfigError, "hooked_model lacks 'a'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_corda_refuses(settings: LoraConfig, how: dict[str, Any], error: type[Exception], message: str) -> None:
    with Unchanged(base := Net()), pytest.raises(error, match=message):
        peft_lora.preprocess_corda(base, settings, **how)


def test_corda_refuses_inputs_and_files_that_are_no_good(tmp_path: Path) -> None:
    base = Net()
    for batch, message in ((BATCHES[0] / 0, "not finite"), (torch.zeros(4, 6), "'a' were all zero")):
        with pytest.raises(ConfigError, match=message):
            peft_lora.preprocess_corda(base, corda(), lambda batch=batch: base(batch))
    with pytest.raises(AdapterFileError, match="can't be read"):
        peft_lora.preprocess_corda(base, corda(cache_file=broken_file(tmp_path)))
    torch.save({"a": torch.eye(7), "b": torch.eye(6), "c": torch.eye(8)}, tmp_path / "wide")
    with pytest.raises(ConfigError, match=r"covariance of 'a' is \(7, 7\), and its inputs have 6"):
        peft_lora.preprocess_corda(base, corda(covariance_file=str(tmp_path / "wide")))
    torch.save({"x": torch.eye(7)}, tmp_path / "other")
    with pytest.raises(ConfigError, match="lacks 'a', 'b', 'c'"):
        peft_lora.preprocess_corda(base, corda(covariance_file=str(tmp_path / "other")))


# ---- LoRA-GA ----------------------------------------------------------------------------------------------------------------
def loraga(targets: Any = ("a", "b", "c"), **settings: Any) -> LoraConfig:
    return config("lora_ga", targets, lora_ga_config=LoraGAConfig(**settings))


def step(model: nn.Module, times: int = 2) -> Callable[[], None]:
    def act() -> None:
        for batch in BATCHES[:times]:
            model(batch / 3).square().sum().backward()

    return act


def gradient(name: str, times: int = 2) -> Tensor:
    """The mean gradient of a weight as a matrix (out, in) in float64."""
    model = Net().double()
    for batch in BATCHES[:times]:
        model(batch.double() / 3).square().sum().backward()
    grad = getattr(model, name).weight.grad / times
    return grad.T if name == "c" else grad


INDICES = {"ArB2r": ([0, 1], [2, 3]), "A2rBr": ([2, 3], [0, 1]), "ArBr": ([1, 3], [0, 2])}


@pytest.mark.parametrize("direction", [*INDICES, "random"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("name", ["a", "c"])
def test_lora_ga(direction: str, scale: str, name: str) -> None:
    base, original = Net(), Net()
    settings = loraga([name], direction=direction, scale=scale, stable_gamma=4)
    peft_lora.preprocess_loraga(base, settings, step(base))
    model = get_peft_model(base, settings)
    layer = getattr(model.base_model.model, name)
    a, b = (factor.detach().double() for factor in layer.factors("default"))
    s, matrix = layer.scaling["default"], layer.ops.matrix
    w, now = matrix(getattr(original, name).weight).detach().double(), matrix(layer.get_base_layer().weight).detach().double()
    u, _, vt = torch.linalg.svd(gradient(name), full_matrices=False)
    factor = {
        "stable": w.shape[0] ** 0.25 / 2,  # out, also of a Conv1D
        "weight_svd": float((torch.linalg.svdvals(w)[:2] / s).sqrt().mean()),
        "gd_scale": 1 / s,
        "unit": 1.0,
    }[scale]
    if direction == "random":
        # which ones is not said, but no direction goes to both
        found = [(a / factor) @ vt[:4].T, (b / factor).T @ u[:, :4]]
        chosen = [{int(i) for i in part.abs().argmax(1)} for part in found]
        assert not chosen[0] & chosen[1]
        assert all(part.abs().amax(1).sub(1).abs().max() < 1e-4 for part in found)
    else:
        for_a, for_b = INDICES[direction]
        torch.testing.assert_close(a.abs(), (factor * vt[for_a]).abs(), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(b.abs(), (factor * u[:, for_b]).abs(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(now + s * b @ a, w, atol=1e-6, rtol=0)


def test_the_first_step_of_lora_ga_does_not_depend_on_the_scale_of_the_loss() -> None:
    """The peer multiplies B by the gradient's singular values."""
    found = []
    for loss_scale in (1.0, 1000.0):
        base, settings = Net(), loraga(["a"])
        peft_lora.preprocess_loraga(base, settings, lambda base=base, size=loss_scale: (base(BATCHES[0]).square().sum() * size).backward())
        found.append(get_peft_model(base, settings).base_model.model.a.lora_B["default"].weight)
    torch.testing.assert_close(found[0].abs(), found[1].abs(), atol=1e-5, rtol=1e-4)


def test_preprocessing_puts_everything_back() -> None:
    base = Net().eval()
    base.b.weight.requires_grad_(False)
    base.a.bias.grad = torch.ones(8)
    state, grad = {name: p.requires_grad for name, p in base.named_parameters()}, base.a.bias.grad
    modes = []

    def act() -> None:
        modes.append(base.training)
        assert [name for name, p in base.named_parameters() if p.requires_grad] == ["a.weight", "b.weight"]
        step(base)()

    peft_lora.preprocess_loraga(base, loraga(["a", "b"]), act)
    assert modes == [True]
    assert not base.training
    assert {name: p.requires_grad for name, p in base.named_parameters()} == state
    assert base.a.bias.grad is grad
    assert base.a.weight.grad is None
    assert not base.a._forward_hooks

    def failing() -> None:
        raise RuntimeError("out of data")

    with Unchanged(base), pytest.raises(RuntimeError, match="out of data"):
        peft_lora.preprocess_loraga(base, loraga(["a"]), failing)


def test_gradients_are_means_over_passes_through_the_module() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.tanh(self.a(x)))

    base = Twice()
    peft_lora.preprocess_loraga(base, loraga(["a"]), lambda: [base(batch).sum().backward() for batch in BATCHES[:3]])
    other = Twice()
    for batch in BATCHES[:3]:
        other(batch).sum().backward()
    torch.testing.assert_close(base.a._peft_loraga_grad, other.a.weight.grad / 6)


def test_lora_ga_files(tmp_path: Path) -> None:
    cache = str(tmp_path / "deep" / "gradients.pt")
    base = Net()
    peft_lora.preprocess_loraga(base, loraga(["a"]), step(base), cache)
    assert set(torch.load(cache)) == {"a._peft_loraga_grad"}
    other = Net()
    peft_lora.preprocess_loraga(other, loraga(["a"]), None, cache)
    assert torch.equal(other.a._peft_loraga_grad, base.a._peft_loraga_grad)
    with pytest.raises(ConfigError, match="no gradient for any target"):
        peft_lora.preprocess_loraga(other, loraga(["b"]), None, cache)


def test_lora_ga_from_a_file_needs_its_gradient(tmp_path: Path) -> None:
    base, settings = Net(), loraga()
    cache = str(tmp_path / "gradients.pt")
    peft_lora.preprocess_loraga(base, settings, step(base), cache)
    model = get_peft_model(base, settings)
    assert not hasattr(model.base_model.model.a.get_base_layer(), "_peft_loraga_grad")
    with torch.no_grad():
        model.base_model.model.a.lora_B["default"].weight.add_(0.1)
        expected = model(BATCHES[0])
    model.save_pretrained(tmp_path)
    with Unchanged(base := Net()), pytest.raises(ConfigError, match=r"does not hold what the adapter took out of 'a'.*preprocess_loraga"):
        PeftModel.from_pretrained(base, tmp_path)  # the peer loads it onto the wrong base without a word
    peft_lora.preprocess_loraga(base, settings, None, cache)
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(BATCHES[0]), expected, atol=1e-5, rtol=1e-5)


def test_layers_without_a_gradient_start_plainly_and_that_is_said() -> None:
    base, settings = Net(), loraga(["a", "idle"])
    with pytest.warns(PeftWarning, match="'idle' got no gradient"):
        peft_lora.preprocess_loraga(base, settings, step(base))
    layer = get_peft_model(base, settings).base_model.model.idle
    assert layer.lora_B["default"].weight.abs().max() == 0
    assert 0 < layer.lora_A["default"].weight.abs().max() <= 6**-0.5
    with pytest.warns(PeftWarning, match=r"'a' has no gradient from preprocess_loraga") as caught:
        get_peft_model(Net(), loraga(["a", "b"]))
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("settings", "act", "message"),
    [
        (config("gaussian"), step, "init_lora_weights='lora_ga'"),
        (loraga(), lambda base: None, "no train_step"),
        (loraga(), lambda base: lambda: None, "no targeted weight has a gradient"),
    ],
    ids=["config", "step", "gradient"],
)
def test_what_lora_ga_refuses(settings: LoraConfig, act: Callable[[nn.Module], Any], message: str) -> None:
    with Unchanged(base := Net()), pytest.raises(ConfigError, match=message):
        peft_lora.preprocess_loraga(base, settings, act(base))


def test_data_is_looked_at_before_the_adapter_is_added() -> None:
    model = get_peft_model(Net(), config("gaussian"))
    for act in (
        lambda: peft_lora.preprocess_loraga(model, loraga(), step(model)),
        lambda: peft_lora.preprocess_corda(model.base_model.model, corda(), run(model)),
    ):
        with Unchanged(model), pytest.raises(ConfigError, match="has adapters already; pass the base as it is before get_peft_model"):
            act()


def test_lora_ga_needs_two_directions_for_each_rank() -> None:
    base, settings = Net(), loraga(["c"])
    settings.r = 3
    peft_lora.preprocess_loraga(base, settings, step(base))
    with pytest.raises(ConfigError, match=r"needs 2r ≤ 5 on 'c', which is \(5, 8\), not r=3"):
        get_peft_model(base, settings)


def test_lora_ga_of_unknown_scaling_and_of_a_quantised_base() -> None:
    base = Net()
    with pytest.raises(ConfigError, match="like='pefd' is unknown; did you mean 'peft'"):
        peft_lora.preprocess_loraga(base, loraga(), step(base), like="pefd")
    base.a.weight = nn.Parameter(base.a.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="'a' is quantised"):
        peft_lora.preprocess_loraga(base, loraga(), step(base))


# ---- corrections of a base that is quantised already -------------------------------------------------------------------
class Coded(nn.Linear):
    """A Linear that keeps its weight as bytes, as libraries for quantisation do."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, device="meta")
        rounded = rounded_to_nf4(source.weight.detach())
        self.weight = nn.Parameter(rounded.view(torch.uint8), requires_grad=False)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.view(torch.float32), self.bias)


class Small(nn.Module):
    base_model_prefix = "backbone"

    def __init__(self, coded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 6)
        if coded:
            self.one, self.two = Coded(self.one), Coded(self.two)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def coded(tmp_path: Path, prefix: str = "", **options: Any) -> tuple[PeftModel, dict[str, Tensor]]:
    originals = {name: value.clone() for name, value in Small(coded=False).state_dict().items()}
    save_file({prefix + name: value for name, value in originals.items()}, tmp_path / "model.safetensors")
    return get_peft_model(Small(coded=True), LoraConfig(r=2, lora_alpha=6, target_modules=["one", "two"], **options)), originals


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_quantised_base_is_corrected(prefix: str, tmp_path: Path) -> None:
    model, originals = coded(tmp_path, prefix)
    peft_lora.replace_lora_weights_loftq(model, tmp_path / "model.safetensors")
    for name in ("one", "two"):
        layer = getattr(model.base_model.model, name)
        w = originals[f"{name}.weight"]
        rest = w - rounded_to_nf4(w)
        u, s, vt = torch.linalg.svd(rest)
        torch.testing.assert_close(layer.get_delta_weight("default"), u[:, :2] * s[:2] @ vt[:2], atol=1e-6, rtol=0)


def test_a_callback_decides_for_each_layer(tmp_path: Path) -> None:
    model, _ = coded(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def keep(told: PeftModel, name: str) -> bool:
        assert told is model
        assert model.base_model.model.get_submodule(name).get_delta_weight("default").abs().max() > 0
        seen.append(name)
        return name == "two"

    peft_lora.replace_lora_weights_loftq(model, tmp_path, callback=keep)
    assert seen == ["one", "two"]
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["base_model.model.two.lora_A.default.weight", "base_model.model.two.lora_B.default.weight"]


def test_the_original_may_be_in_parts(tmp_path: Path) -> None:
    model, originals = coded(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    places = {name: f"part{i % 2}.safetensors" for i, name in enumerate(originals)}
    for part in set(places.values()):
        save_file({name: value for name, value in originals.items() if places[name] == part}, tmp_path / part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    peft_lora.replace_lora_weights_loftq(model, tmp_path)
    assert model.base_model.model.one.get_delta_weight("default").abs().max() > 0


def test_what_replace_lora_weights_loftq_refuses(tmp_path: Path) -> None:
    model, originals = coded(tmp_path)
    replace = peft_lora.replace_lora_weights_loftq
    with Unchanged(model), pytest.raises(AdapterNotFoundError, match="'defalt' not found; did you mean 'default'"):
        replace(model, tmp_path, "defalt")
    with pytest.raises(ConfigError, match="no layer of the adapter 'default' has a quantised weight"):
        replace(get_peft_model(Small(coded=False), LoraConfig(target_modules=["one"])), tmp_path)
    with pytest.raises(ConfigError, match="pass model_path"):
        replace(model)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        replace(model, tmp_path / "absent.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        replace(model, tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="not in the cache of the Hub"):
        replace(model, "nobody/nothing")
    save_file({"one.weight": originals["one.weight"]}, tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match=r"no tensor 'two.weight'"):
        replace(model, tmp_path / "part.safetensors")
    save_file({"one.weight": torch.ones(3, 3), "two.weight": torch.ones(3, 3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(ConfigError, match=r"'one.weight' is \(3, 3\).*layer is \(8, 6\)"):
        replace(model, tmp_path / "wrong.safetensors")
