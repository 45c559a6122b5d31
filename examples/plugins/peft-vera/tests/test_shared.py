"""VeRA against its formula in float64, and the two matrices that all layers share: in memory once, in a file once or not at all."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft_core import (
    ConfigError,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft_core.testing import tiny
from torch import Tensor, nn

from peft_vera import Projection, VeraConfig, VeraLayer


def model_of(r: int = 6, **fields) -> PeftModel:
    config = VeraConfig(task_type="CAUSAL_LM", r=r, target_modules=["q_proj", "down_proj"], **fields)
    model = get_peft_model(tiny(), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def layers(model: nn.Module) -> list[VeraLayer]:
    return [module for module in model.modules() if isinstance(module, VeraLayer)]


def storages(model: nn.Module, adapter: str = "default") -> set[tuple[int, int]]:
    """Addresses of A and B as the layers see them."""
    return {(layer.projections[adapter].A.data_ptr(), layer.projections[adapter].B.data_ptr()) for layer in layers(model)}


def assert_shared(model: nn.Module, adapter: str = "default") -> None:
    held = [module for module in model.modules() if isinstance(module, Projection)]
    assert len({id(module) for module in held}) == len(held), "a projection hangs in several places"
    assert len(storages(model, adapter)) == 1, "layers have projections of their own"
    assert all(layer.projections[adapter] in held for layer in layers(model)), (
        "the layers use another projection than the one that is moved and saved"
    )


@torch.no_grad()
@pytest.mark.parametrize("position", [0, 1])
def test_formula(position: int) -> None:
    """y[o] += b[o] Σ_k B[o, k] d[k] Σ_i A[k, i] x[i], with the first rows of B and the first columns of A."""
    model = model_of().double()
    layer = layers(model)[position]
    out, inp = layer.matrix_shape
    a, b_matrix = layer.projections["default"].A, layer.projections["default"].B
    d, b = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
    assert a.shape == (6, 48)
    assert b_matrix.shape == (32, 6)
    x = torch.randn(3, inp, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = layer.base_layer(x).clone()
    delta = torch.zeros(out, inp, dtype=torch.float64)
    for o in range(out):
        for k in range(6):
            delta[o] += b[o] * b_matrix[o, k] * d[k] * a[k, :inp]
    expected += x @ delta.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.delta_weight("default"), delta, rtol=1e-12, atol=1e-12)


def test_only_vectors_are_parameters() -> None:
    model = model_of()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(name.split(".")[-2] in ("vera_lambda_b", "vera_lambda_d") for name in trained)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (2 * (32 + 6))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m,
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to(torch.float64),
        lambda m: m.half().float(),
        lambda m: copy.deepcopy(m.double()),
    ],
    ids=["itself", "deepcopy", "pickle", "float64", "half-float", "moved-deepcopy"],
)
def test_in_memory_once(change) -> None:
    model = change(model_of())
    assert_shared(model)
    held = [name for name, _ in model.named_buffers(remove_duplicate=False) if "vera_projections" in name]
    assert held == ["vera_projections.default.A", "vera_projections.default.B"]


def test_a_copy_shares_nothing_with_the_original() -> None:
    model = model_of()
    assert not storages(model) & storages(copy.deepcopy(model))
    assert len(pickle.dumps(model.vera_projections)) < 2 * 4 * (6 * 48 + 32 * 6) + 4000


def test_meta_and_back(tmp_path: Path) -> None:
    model = model_of()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=True)
    assert_shared(loaded)
    assert not any(buffer.is_meta for buffer in loaded.buffers())


def test_once_in_a_state_dict() -> None:
    model = model_of()
    keys = [key for key in model.state_dict() if key.endswith((".A", ".B"))]
    assert keys == ["vera_projections.default.A", "vera_projections.default.B"]
    other = model_of(projection_prng_key=3)
    other.load_state_dict(model.state_dict())
    assert_shared(other)
    assert torch.equal(layers(other)[0].projections["default"].A, layers(model)[0].projections["default"].A)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("meta", [True, False])
def test_in_a_file_once_or_drawn_again(tmp_path: Path, saved: bool, meta: bool) -> None:
    ids = torch.arange(1, 7).view(1, 6)
    model = model_of(save_projection=saved, projection_prng_key=5)
    model.save_pretrained(tmp_path)
    keys = set(get_peft_model_state_dict(model))
    assert {key for key in keys if "lambda" not in key} == ({"base_model.vera_A", "base_model.vera_B"} if saved else set())
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=meta).eval()
    assert_shared(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_adapters_have_projections_of_their_own() -> None:
    model = model_of(projection_prng_key=1)
    model.add_adapter("other", VeraConfig(task_type="CAUSAL_LM", r=3, target_modules=["v_proj"], projection_prng_key=2))
    projections: dict[str, Tensor] = {name: module.A for name, module in model.vera_projections.items()}
    assert projections["default"].shape == (6, 48)
    assert projections["other"].shape == (3, 32)
    model.delete_adapter("other")
    assert list(model.vera_projections) == ["default"]
    assert not any("other" in layer.projections for layer in layers(model)), "a deleted adapter keeps its projection alive"
    model.delete_adapter("default")
    assert not any(layer.projections for layer in layers(model))


def test_a_failed_add_leaves_no_projection() -> None:
    model = model_of()
    with pytest.raises(RuntimeError, match="on purpose"):
        model.add_adapter("broken", _Broken(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "down_proj"]))
    assert list(model.vera_projections) == ["default"]
    assert not any("broken" in layer.projections for layer in layers(model))


class _Broken(VeraConfig):
    def shared_options(self):
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("meta", [True, False])
def test_in_a_model_that_keeps_its_class(meta: bool) -> None:
    """Injected, the projection hangs on the base itself, and goes with the last adapter."""
    ids = torch.arange(1, 7).view(1, 6)
    wrapped = model_of()
    tensors = get_peft_model_state_dict(wrapped)
    config = VeraConfig(r=6, target_modules=["q_proj", "down_proj"], projection_prng_key=9)
    model = inject_adapter_in_model(config, tiny(), state_dict=tensors, low_cpu_mem_usage=meta)
    set_peft_model_state_dict(model, tensors, strict=True)
    assert_shared(model)
    assert get_peft_model_state_dict(model).keys() == {key.removeprefix("base_model.model.") for key in tensors}
    with torch.no_grad():
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin.eval()(input_ids=ids).logits, wrapped(input_ids=ids).logits)
    with pytest.raises(RuntimeError, match="on purpose"):
        inject_adapter_in_model(_Broken(r=3, target_modules=["q_proj"]), model, "broken")
    assert list(model.vera_projections) == ["default"]
    with pytest.warns(match="already has adapters"):
        base = get_peft_model(model, VeraConfig(r=2, target_modules=["v_proj"]), "other").unload()
    assert base is model
    assert base.state_dict().keys() == tiny().state_dict().keys()


def test_the_seed_decides() -> None:
    first, again, other = (model_of(projection_prng_key=seed) for seed in (3, 3, 4))
    matrices = [layers(model)[0].projections["default"].A for model in (first, again, other)]
    assert torch.equal(matrices[0], matrices[1])
    assert not torch.equal(matrices[0], matrices[2])
    state = torch.get_rng_state()
    model_of()
    torch.set_rng_state(state)


def test_drawing_leaves_the_global_generator_alone() -> None:
    from peft_vera.formulas import draw

    before = torch.get_rng_state()
    a, b = draw(32, 48, 6, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert a.abs().max() <= (6 / 48) ** 0.5
    assert b.abs().max() <= 1.0


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    model = model_of(vera_dropout=0.5)
    layer = layers(model)[0]
    x = torch.ones(2, 32)
    assert torch.equal(layer(x), layer(x))
    model.train()
    assert not torch.equal(layer(x), layer(x))


def test_merged_while_the_model_is_copied() -> None:
    model = model_of()
    before = {id(layer): layer.weight.detach().clone() for layer in layers(model)}
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert all(torch.equal(layer.weight, kept) for layer, kept in zip(layers(twin), before.values(), strict=True))


@pytest.mark.parametrize(
    "fields",
    [{"r": 0}, {"projection_prng_key": 1.5}, {"bias": "some"}, {"vera_dropout": 1.0}, {"d_initial": float("nan")}, {"rank_pattern": {"q": 2}}],
)
def test_bad_values_are_refused(fields: dict) -> None:
    with pytest.raises(ConfigError):
        VeraConfig(**fields)


def test_biases_of_the_targets_train() -> None:
    model = get_peft_model(tiny("bert"), VeraConfig(r=4, target_modules=["query"], bias="vera_only"))
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"default", "bias"}
