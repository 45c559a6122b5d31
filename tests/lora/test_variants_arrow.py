"""Arrow: tokens are routed among adapters; general knowledge is subtracted as a delta, and no stored adapter changes."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import support
from peft_core import AdapterFileError, ConfigError, MergeError, PeftError, PeftModel, RoutingError, get_peft_model
from peft_core.testing import tiny
from peft_lora import ArrowConfig, LoraConfig, LoraLayer, create_arrow_model

IDS = torch.tensor([[1, 5, 6, 2, 5, 6, 3], [4, 8, 15, 16, 23, 42, 7]])


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six adapters in files."""
    root = tmp_path_factory.mktemp("adapters")
    for i in range(6):
        torch.manual_seed(i)
        config = LoraConfig(r=3, lora_alpha=2 + i, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(tiny(), config).save_pretrained(root / f"a{i}")
    return [root / f"a{i}" for i in range(6)]


def arrow(paths: list[Path], tasks: int = 3, general: int = 0, *, base: nn.Module | None = None, **settings: Any) -> PeftModel:
    options = {"top_k": 2, "use_gks": bool(general), **settings}
    return create_arrow_model(base or tiny(), paths[:tasks], ArrowConfig(**options), paths[tasks : tasks + general])


logits = partial(support.logits, input_ids=IDS)


def layers_of(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def delta(layer: LoraLayer, name: str) -> Tensor:
    return layer.get_delta_weight(name).detach().double()


def reference(layer: LoraLayer, x: Tensor, experts: list[str], general: list[str], k: int, temperature: float) -> Tensor:
    """Return Δ·t token by token, with whole matrices in float64."""
    shared = sum((delta(layer, name) for name in general), torch.zeros(layer.matrix_shape).double()) / max(len(general), 1)
    deltas = [delta(layer, name) - shared for name in experts]
    prototypes = [torch.linalg.svd(d)[2][0] for d in deltas]
    rows = []
    for t in x.double().reshape(-1, x.shape[-1]):
        scores = sorted(((abs(float(t @ p)), e) for e, p in enumerate(prototypes)), reverse=True)[:k]
        weights = torch.softmax(torch.tensor([score for score, _ in scores]).double() / temperature, 0)
        rows.append(sum(w * (deltas[e] @ t) for w, (_, e) in zip(weights, scores, strict=True)))
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("tasks", "general", "k", "temperature"), [(3, 0, 2, 1.0), (3, 0, 3, 0.5), (4, 2, 1, 1.0), (3, 1, 2, 2.0), (5, 1, 2, 1.0)])
def test_each_layer_adds_the_mixture(paths: list[Path], tasks: int, general: int, k: int, temperature: float, grad: bool) -> None:
    model = arrow(paths, tasks, general, top_k=k, router_temperature=temperature)
    for layer in layers_of(model):
        x = torch.randn(2, 5, layer.matrix_shape[1], generator=torch.Generator().manual_seed(7))
        with torch.set_grad_enabled(grad):
            found = layer(x) - layer.get_base_layer()(x)
        experts, minus = [f"task_{i}" for i in range(tasks)], [f"gks_{i}" for i in range(general)]
        expected = reference(layer, x, experts, minus, k, temperature)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_computing_all_or_only_the_selected_experts_is_the_same(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = arrow(paths, 5, 1, top_k=2)
    from peft_lora.variants import arrow as module

    found = []
    for sparse in (0, 100):
        monkeypatch.setattr(module, "SPARSE", sparse)
        found.append(logits(model))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_prototypes_are_exact_also_of_the_smallest_rank() -> None:
    from peft_lora.variants.arrow import prototype

    torch.manual_seed(0)
    for r in (1, 2, 7):
        a, b = torch.randn(r, 12).double(), torch.randn(9, r).double()
        if r > 2:
            b[:, 1] = b[:, 0]  # less than full rank
        expected = torch.linalg.svd(b @ a)[2][0]
        assert abs(float(prototype(a, b) @ expected)) == pytest.approx(1, abs=1e-12)
    assert torch.isfinite(prototype(a, torch.zeros(9, 7).double())).all()


def test_stored_adapters_stay_as_they_are(paths: list[Path], tmp_path: Path) -> None:
    model = arrow(paths, 3, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with model.use_adapters("task_1"):
        alone = PeftModel.from_pretrained(tiny(), paths[1])
        assert torch.equal(logits(model), logits(alone))


def test_more_adapters_are_more_experts(paths: list[Path]) -> None:
    model = arrow(paths, 2, 1)
    two = logits(model)
    model.load_adapter(paths[4], "another")
    three = logits(model)
    assert not torch.equal(two, three)
    assert torch.equal(three, logits(create_like(paths, [0, 1, 4], [2])))
    model.delete_adapter("another")
    assert torch.equal(logits(model), two)


def create_like(paths: list[Path], tasks: list[int], general: list[int]) -> PeftModel:
    return create_arrow_model(tiny(), [paths[i] for i in tasks], ArrowConfig(top_k=2, use_gks=True), [paths[i] for i in general])


def test_what_is_kept_follows_the_weights(paths: list[Path]) -> None:
    model = arrow(paths)
    before = logits(model)
    layer = layers_of(model)[0]
    with torch.no_grad():
        layer.factors("task_0")[1].mul_(3)
    after = logits(model)
    assert not torch.equal(before, after)
    x = torch.randn(1, 6, 32)
    expected = reference(layer, x, ["task_0", "task_1", "task_2"], [], 2, 1.0)
    torch.testing.assert_close((layer(x) - layer.get_base_layer()(x)).double(), expected, rtol=1e-4, atol=1e-4)
    layer.set_scale("task_1", 2.0)
    assert not torch.equal(logits(model), after)


def test_rows_may_use_the_router_or_an_adapter(paths: list[Path]) -> None:
    model = arrow(paths)
    found = logits(model, adapter_names=["arrow_router", "task_1"])
    torch.testing.assert_close(found[0], logits(model)[0])
    with model.use_adapters("task_1"):
        torch.testing.assert_close(found[1], logits(model)[1])


def test_nothing_trains_and_generate_works(paths: list[Path]) -> None:
    model = arrow(paths)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model._peft_index.call_tuners
    found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    ids = IDS
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)


def test_the_whole_model_can_be_saved_and_loaded(paths: list[Path], tmp_path: Path) -> None:
    model = arrow(paths, 3, 2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_stack(tiny(), tmp_path)), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_dropout_acts_on_the_mixture(paths: list[Path]) -> None:
    model = arrow(paths)
    layer = layers_of(model)[0]
    layer.lora_dropout["arrow_router"] = nn.Dropout(0.5)
    layer.train()
    x = torch.randn(1, 50, 32)
    change = layer(x) - layer.get_base_layer()(x)
    layer.eval()
    kept = layer(x) - layer.get_base_layer()(x)
    assert 0.3 < float((change.abs() < 1e-6).float().mean()) < 0.7
    torch.testing.assert_close(change[change.abs() > 1e-5], 2 * kept[change.abs() > 1e-5], rtol=1e-3, atol=1e-4)


def test_it_can_not_be_merged(paths: list[Path]) -> None:
    model = arrow(paths)
    for action in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="mixes adapters for each token"):
            action()
    assert not any(layer.merged for layer in layers_of(model))


# ---- what create_arrow_model refuses -----------------------------------------------------------------------------------
def refuses(error: type[PeftError], message: str, tasks: list[Any], general: list[Any] | None = None, **settings: Any) -> None:
    base = tiny()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    modules = [type(module) for module in base.modules()]
    with pytest.raises(error, match=message):
        create_arrow_model(base, tasks, ArrowConfig(**{"top_k": 1, **settings}), general)
    assert [type(module) for module in base.modules()] == modules
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_too_few_adapters(paths: list[Path]) -> None:
    refuses(ConfigError, "task_specific_adapter_paths is empty", [])
    refuses(ConfigError, "top_k=3, but there are 2 adapters", paths[:2], top_k=3)
    refuses(ConfigError, "use_gks=True, but general_adapter_paths is empty", paths[:2], use_gks=True)


def test_a_missing_folder(paths: list[Path], tmp_path: Path) -> None:
    refuses(PeftError, "Can't find", [paths[0], tmp_path / "nowhere"])
    assert issubclass(AdapterFileError, PeftError)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 2}, r"do not agree on .*q_proj'.*\(3, 32\).*\(2, 32\)"),
        ({"target_modules": ["q_proj"]}, "do not agree on .*down_proj'"),
        ({"use_dora": True}, "'task_1' is more than a product B·A"),
        ({"alora_invocation_tokens": [1]}, "'task_1' is more than a product B·A"),
    ],
)
def test_adapters_that_do_not_fit(paths: list[Path], tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    settings = {"r": 3, "target_modules": ["q_proj", "down_proj"], **fields}
    get_peft_model(tiny(), LoraConfig(**settings)).save_pretrained(tmp_path)
    refuses(ConfigError, message, [paths[0], tmp_path])


def test_experts_that_went_away(paths: list[Path]) -> None:
    model = arrow(paths)
    model.delete_adapter("task_0")
    logits(model)
    model.delete_adapter("task_1")
    with pytest.raises(RoutingError, match=r"top_k=2, but .* has 1 experts"):
        logits(model)


def test_a_subfolder_of_a_repository(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, dict[str, Any]]] = []

    def from_pretrained(base: nn.Module, place: Any, name: str, **options: Any) -> None:
        asked.append((place, options))
        raise ConfigError("enough")

    monkeypatch.setattr(PeftModel, "from_pretrained", from_pretrained)
    for place in ("user/repo", "user/repo/one/two", paths[0]):
        with pytest.raises(ConfigError, match="enough"):
            create_arrow_model(tiny(), [place], ArrowConfig(top_k=1), token="t")
    assert asked == [("user/repo", {"token": "t"}), ("user/repo", {"token": "t", "subfolder": "one/two"}), (paths[0], {"token": "t"})]
