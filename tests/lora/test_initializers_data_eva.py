"""EVA: the analysis of components, what it finds in the inputs of layers, and how ranks are redistributed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_lora
from lora.data_net import BATCHES, Net, config, inputs_of, stretched
from peft_core import ConfigError, PeftModel, PeftWarning, get_peft_model
from peft_core.testing import tiny
from peft_lora import EvaConfig, LoraConfig
from peft_lora.initializers.eva import preparation as eva_module
from peft_lora.initializers.eva.passes import LayerStatistics, digest, distribute, gathered
from peft_lora.initializers.eva.pca import IncrementalPca
from support import Unchanged

pytestmark = pytest.mark.filterwarnings("ignore:lora with eva initialization")  # `eva` below looks for it


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
    statistics = [LayerStatistics(name, nn.Identity(), 2, 4, 4, None, False) for name in "xyz"]
    for stats, ratios in zip(statistics, ([0.5, 0.3, 0.12, 0.05], [0.99, 0.005, 0.003, 0.002], [0.25, 0.25, 0.25, 0.25]), strict=True):
        stats.pca.rows, stats.pca.ratios = 1, torch.tensor(ratios)
    distribute(statistics, 6)
    assert [stats.rank for stats in statistics] == [2, 1, 3]
    statistics[2].pca.ratios = torch.tensor([0.11, 0.11, 0.1, 0.1])
    distribute(statistics, 6)
    assert [stats.rank for stats in statistics] == [3, 1, 2]


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
        (wrong(model=eva(("a", "idle"))), "'base_model.model.idle' is not called"),
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
    with pytest.warns(PeftWarning, match=r"after 1 passes.*'base_model.model.a'.*\(tau=1"):
        peft_lora.get_eva_state_dict(eva(("a",), EvaConfig(rho=1.0, tau=1.0)), noise, max_passes=1, **PLAIN)


@pytest.mark.parametrize("strict", [True, "warn", False])
def test_a_file_needs_no_values_that_would_be_thrown_away(strict: Any, tmp_path: Path) -> None:
    with pytest.warns(PeftWarning, match="thrown away"):
        model = get_peft_model(Net(), config("eva", eva_config=EvaConfig()))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(Net(), tmp_path, strict=strict)
