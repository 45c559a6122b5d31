"""`convert_to_lora`: what an adapter of any method does to each layer, as A and B."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import support
from peft_core import (
    AdapterFileError,
    AdapterLayer,
    AdapterNotFoundError,
    Capability,
    CapabilityError,
    ConfigError,
    LayerConfig,
    LayerTuner,
    MergeError,
    PeftModel,
    TunerSpec,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft_core.testing import tiny
from peft_core.testing.models import OneLayer
from peft_loha import LoHaConfig
from peft_lora import LoraConfig, convert_to_lora, save_as_lora, supports_lora_conversion
from peft_lora.tools.factorisation import svd_of_product

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return support.Net().eval()


def shaken(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model._peft_index.parameters_of("default"):
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(config: Any, base: nn.Module | None = None) -> Any:
    return shaken(get_peft_model(net() if base is None else base, config))


def reloaded(config: Any, tensors: dict[str, Tensor], base: nn.Module) -> Any:
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, tensors, strict=True)
    return model.eval()


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    found, expected = found.detach().double(), expected.detach().double()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


# ---- exact where the rank suffices ----------------------------------------------------------------------------------------

SAME = {
    "loha": (LoHaConfig(r=2, target_modules=["up", "last"]), 4),
    "lora": (LoraConfig(r=2, lora_alpha=5, target_modules=["up", "last"]), 2),
    "rslora-patterns": (LoraConfig(r=2, use_rslora=True, rank_pattern={"last": 3}, alpha_pattern={"up": 9}, target_modules=["up", "last"]), 3),
    "dora": (LoraConfig(r=2, use_dora=True, target_modules=["up", "last"]), 4),
    "lora_bias": (LoraConfig(r=2, lora_bias=True, lora_alpha=5, target_modules=["up", "last"]), 2),
    "saved-head": (LoHaConfig(r=1, target_modules=["up"], modules_to_save=["head"]), 1),
    "share": (LoHaConfig(r=2, target_modules=["up", "last"]), 1.0),
}


@pytest.mark.parametrize("name", SAME)
def test_the_converted_adapter_computes_the_same(name: str) -> None:
    config, rank = SAME[name]
    model = adapted(config)
    expected = model(X)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made, tensors = convert_to_lora(model, rank)
    assert_near(reloaded(made, tensors, net())(X), expected)
    assert not torch.allclose(expected, net()(X), atol=1e-2)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert made.lora_alpha == made.r
    assert made.use_dora is False


LAYERS: dict[str, tuple[Any, Tensor, dict[str, Any]]] = {
    "embedding": (lambda: nn.Embedding(7, 5), torch.arange(6), {}),
    "embedding-dora": (lambda: nn.Embedding(7, 5), torch.arange(6), {"use_dora": True}),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), torch.randn(2, 4, 8), {}),
    "conv2d": (lambda: nn.Conv2d(3, 6, (2, 3), stride=2), torch.randn(2, 3, 8, 8), {}),
    "conv2d-dora": (lambda: nn.Conv2d(3, 6, (2, 3), stride=2), torch.randn(2, 3, 8, 8), {"use_dora": True}),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 1, 2)), torch.randn(1, 2, 3, 3, 3), {}),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5), {"grouped_convolutions": True}),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_embeddings_and_convolutions(kind: str) -> None:
    layer, x, options = LAYERS[kind]

    def base() -> nn.Module:
        torch.manual_seed(2)
        return OneLayer(layer())

    model = adapted(LoraConfig(r=2, target_modules=["target"], **options), base())
    rank = 2 if "dora" not in kind else min(model.base_model.model.target.matrix_shape)
    made, tensors = convert_to_lora(model, rank)
    assert_near(reloaded(made, tensors, base())(x), model(x))


def test_transposed_linears() -> None:
    ids = torch.arange(1, 7)[None]
    model = adapted(LoraConfig(r=2, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True, task_type="CAUSAL_LM"), tiny("gpt2"))
    made, tensors = convert_to_lora(model, 32)
    assert made.fan_in_fan_out
    assert made.task_type == "CAUSAL_LM"
    assert_near(reloaded(made, tensors, tiny("gpt2"))(input_ids=ids).logits, model(input_ids=ids).logits, 1e-4)


def test_biases_are_not_rounded_to_the_dtype_of_the_base() -> None:
    torch.manual_seed(0)
    model = adapted(LoraConfig(r=2, lora_bias=True, target_modules=["target"]), OneLayer(nn.Linear(4, 4).bfloat16()))
    _, tensors = convert_to_lora(model, 2)
    layer = layer_of(model, "target")
    assert_near(tensors["base_model.model.target.lora_B.bias"], layer.scaling["default"] * layer.beta("default"), 1e-6)


def test_what_an_initialisation_took_out_of_the_base_is_part_of_it() -> None:
    model = adapted(LoraConfig(r=1, init_lora_weights="pissa", target_modules=["up", "last"]))
    made, tensors = convert_to_lora(model, 2)
    assert made.init_lora_weights is True
    assert_near(reloaded(made, tensors, net())(X), model(X))


def test_tuners_of_others_are_converted() -> None:
    with support.registered(support.DENSE):
        model = adapted(support.DenseConfig(target_modules=["up", "last"], alpha=2))
        made, tensors = convert_to_lora(model, 4)
        assert_near(reloaded(made, tensors, net())(X), model(X))


def test_effects_that_are_no_sum_are_converted() -> None:
    class Layer(AdapterLayer):
        containers = ("scale_rows",)
        additive = False

        def add(self, adapter: str, config: Any) -> None:
            self.new("scale_rows", adapter, (self.matrix_shape[0],), init=torch.Tensor.zero_)

        def merged_weight(self, adapter: str, weight: Tensor) -> Tensor:
            return weight * (1 + self.scale_rows[adapter])[:, None]

        def merged_bias(self, adapter: str, bias: Tensor | None) -> Tensor | None:
            return None if bias is None else bias * (1 + self.scale_rows[adapter]).to(bias.dtype)

        def contribute(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
            return y * (1 + self.scale_rows[adapter])

    class Config(LayerConfig):
        default_peft_type: ClassVar[str | None] = "ROWS"

    class Tuner(LayerTuner):
        layers = (Layer,)

    with support.registered(TunerSpec("ROWS", Config, Tuner, "scale_", capabilities=Capability.MERGE)):
        model = adapted(Config(target_modules=["up", "last"]))
        made, tensors = convert_to_lora(model, 4)
        assert made.lora_bias  # what it does to biases goes along
        assert_near(reloaded(made, tensors, net())(X), model(X))


def test_factors_are_not_all_of_an_effect_that_also_multiplies() -> None:
    class Layer(support.DenseLayer):
        additive = False

        def low_rank_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
            return self.delta_weight(adapter), torch.eye(self.matrix_shape[1])

        def weight_factor(self, adapter: str) -> Tensor | None:
            return torch.full((self.matrix_shape[0], 1), 3.0)

    class Tuner(support.DenseTuner):
        layers = (Layer,)

    with support.registered(replace(support.DENSE, tuner=Tuner)):
        model = adapted(support.DenseConfig(target_modules=["up"]))
        layer = layer_of(model, "layers.0.up")
        _, tensors = convert_to_lora(model, 4)
        a, b = (tensors[f"base_model.model.layers.0.up.lora_{factor}.weight"] for factor in "AB")
        assert_near(b @ a, 3 * (layer.weight + layer.delta_weight("default")) - layer.weight)


# ---- best where it does not -----------------------------------------------------------------------------------------------


def layer_of(model: Any, path: str) -> Any:
    return model.base_model.model.get_submodule(path)


@pytest.mark.parametrize("config", [LoHaConfig(r=2, target_modules=["up", "last"]), LoraConfig(r=2, use_dora=True, target_modules=["up", "last"])])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_matrix_of_that_rank_is_nearer(config: Any, rank: int) -> None:
    model = adapted(config)
    _, tensors = convert_to_lora(model, rank)
    for path in ("layers.0.up", "last"):
        delta = layer_of(model, path).get_delta_weight("default").detach().double()
        a, b = (tensors[f"base_model.model.{path}.lora_{factor}.weight"].double() for factor in "AB")
        lost = torch.linalg.svdvals(delta)[rank:].square().sum()
        assert_near((b @ a - delta).square().sum(), lost, 1e-4)
        assert_near(a @ a.T, torch.eye(rank))
        assert a.dtype == b.dtype


@pytest.mark.parametrize("share", [0.3, 0.8, 0.95, 0.9999])
def test_a_share_of_the_energy_gives_each_layer_its_rank(share: float) -> None:
    model = adapted(LoHaConfig(r=2, target_modules=["up", "last"]))
    made, tensors = convert_to_lora(model, share)
    assert made.r == 1
    for path in ("layers.0.up", "layers.1.up", "last"):
        delta = layer_of(model, path).get_delta_weight("default").detach().double()
        energies = torch.linalg.svdvals(delta).square().cumsum(0)
        rank = int(torch.searchsorted(energies / energies[-1], share)) + 1
        assert tensors[f"base_model.model.{path}.lora_A.weight"].shape[0] == rank
        assert made.rank_pattern.get(f"^{path}", 1) == made.alpha_pattern.get(f"^{path}", 1) == rank
    reloaded(made, tensors, net())


def test_half_of_the_energy_of_an_adapter_without_effect_is_rank_one() -> None:
    made, tensors = convert_to_lora(get_peft_model(net(), LoraConfig(target_modules=["up"])), 0.5)
    assert (made.r, made.rank_pattern) == (1, {})
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_factors_are_used_and_the_matrix_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    models = [
        adapted(config, OneLayer(nn.Linear(40, 30)))
        for config in (LoHaConfig(r=2, target_modules=["target"]), LoraConfig(r=3, target_modules=["target"]))
    ]
    for model in models:
        delta = layer_of(model, "target").get_delta_weight("default").detach()
        monkeypatch.setattr(type(layer_of(model, "target")), "delta_weight", lambda *_: pytest.fail("ΔW was formed"))
        _, tensors = convert_to_lora(model, 5)  # more than the adapter has: the rest is zero
        a, b = (tensors[f"base_model.model.target.lora_{factor}.weight"] for factor in "AB")
        assert (a.shape, b.shape) == ((5, 40), (30, 5))
        assert_near(b @ a, delta)


def test_svd_of_a_product() -> None:
    torch.manual_seed(0)
    for shapes in ((7, 3, 9), (2, 5, 9), (9, 5, 2)):
        b, a = torch.randn(shapes[0], shapes[1], dtype=torch.float64), torch.randn(shapes[1], shapes[2], dtype=torch.float64)
        u, s, vt = svd_of_product(b, a)
        assert_near(u @ s.diag() @ vt, b @ a, 1e-12)
        assert_near(s, torch.linalg.svdvals(b @ a)[: len(s)], 1e-12)
        assert_near(u.T @ u, torch.eye(len(s)), 1e-12)
        assert_near(vt @ vt.T, torch.eye(len(s)), 1e-12)


def test_low_rank_factors_are_the_delta() -> None:
    for config in (LoHaConfig(r=2, target_modules=["up"], alpha=3), LoraConfig(r=2, lora_alpha=3, target_modules=["up"])):
        layer = layer_of(adapted(config), "layers.0.up")
        b, a = layer.low_rank_factors("default")
        assert_near(b @ a, layer.delta_weight("default"), 1e-6)
    assert layer_of(adapted(LoraConfig(r=2, use_dora=True, target_modules=["up"])), "layers.0.up").low_rank_factors("default") is None


# ---- files and names ------------------------------------------------------------------------------------------------------


def test_a_file_that_anybody_can_load(tmp_path: Path) -> None:
    model = adapted(LoHaConfig(r=2, target_modules=["up", "last"], modules_to_save=["layers.1.down", "head"]))
    save_as_lora(tmp_path, model, 4)
    assert_near(PeftModel.from_pretrained(net(), tmp_path)(X), model(X))
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert "base_model.model.layers.1.down.weight" in file.keys()  # noqa: SIM118
        assert "base_model.model.head.weight" in file.keys()  # noqa: SIM118
    with pytest.raises(AdapterFileError, match="not a file"):
        save_as_lora(tmp_path / "adapter_config.json", model, 4)


def test_whole_modules_of_several_parts_keep_their_names() -> None:
    class Headed(support.Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))  # type: ignore[assignment]

    torch.manual_seed(0)
    model = adapted(LoHaConfig(r=1, target_modules=["up"], modules_to_save=["head"]), Headed())
    _, tensors = convert_to_lora(model, 1)
    assert {"base_model.model.head.0.weight", "base_model.model.head.1.weight"} <= tensors.keys()
    torch.manual_seed(0)
    assert_near(reloaded(*convert_to_lora(model, 1), Headed())(X), model(X))


def test_only_the_chosen_adapter_is_converted() -> None:
    model = adapted(LoHaConfig(r=1, target_modules=["up"]))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["down"], modules_to_save=["head"]))
    made, tensors = convert_to_lora(model, 2, adapter_name="other")
    assert made.modules_to_save == ["head"]
    assert not any(".up." in name for name in tensors)


def test_one_path_may_be_the_end_of_another() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"up": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.up(self.inner["up"](x))
            return found

    torch.manual_seed(0)
    base = Nested()
    with support.registered(support.DENSE):
        model = adapted(support.DenseConfig(target_modules=["up"]), base)
        with torch.no_grad():  # ranks 1 and 3
            layer_of(model, "up").dense_delta["default"].copy_(torch.ones(4, 4))
            layer_of(model, "inner.up").dense_delta["default"][3] = 0
        made, tensors = convert_to_lora(model, 1.0)
        torch.manual_seed(0)
        assert_near(reloaded(made, tensors, Nested())(X), model(X))


def test_injected_models_and_compiled_work() -> None:
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"], init_lora_weights=False), net())
    made, tensors = convert_to_lora(model.eval(), 2, compile_kwargs={"backend": "eager"}, progressbar=False)
    assert_near(reloaded(made, tensors, net())(X), model(X))


def test_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    convert_to_lora(adapted(LoraConfig(r=2, target_modules=["up"])), 2, progressbar=True)
    assert "converting: 100%" in capsys.readouterr().err


def test_rank_in_use_counts_not_the_room() -> None:
    from peft_lora import prepare_model_for_compiled_hotswap

    model = adapted(LoraConfig(r=1, target_modules=["up"]))
    expected = model(X)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    made, tensors = convert_to_lora(model, 1.0)
    assert made.r == 1
    assert made.rank_pattern == {}
    assert_near(reloaded(made, tensors, net())(X), expected)


# ---- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, "rank=0"),
        (-1, "rank=-1"),
        (0.0, "rank=0.0"),
        (1.5, "rank=1.5"),
        ("4", "is a str"),
        (True, "is a bool"),
        (5, r"rank=5 is more than .*\(4, 4\)"),
    ],
)
def test_ranks_that_are_none(rank: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        convert_to_lora(adapted(LoHaConfig(r=1, target_modules=["up"])), rank)


def test_what_can_not_be_converted_says_why() -> None:
    model = adapted(LoraConfig(target_modules=["up"], bias="all"))
    with pytest.raises(ConfigError, match="trains biases of the base"):
        convert_to_lora(model, 2)
    assert not supports_lora_conversion(model)
    with pytest.raises(AdapterNotFoundError, match="'zz' not found"):
        supports_lora_conversion(model, "zz")
    with pytest.raises(AdapterNotFoundError, match="No adapter layers"):
        convert_to_lora(net(), 2)
    assert supports_lora_conversion(adapted(LoraConfig(target_modules=["up"])))


def test_virtual_tokens_are_no_change_of_weights() -> None:
    with support.registered(support.CUE):
        model: Any = get_peft_model(tiny(), support.CueConfig(num_virtual_tokens=2))
        assert not supports_lora_conversion(model)
        with pytest.raises(CapabilityError, match="no change of weights"):
            convert_to_lora(model, 2)


def test_groups_that_see_all_inputs_have_no_kernel() -> None:
    torch.manual_seed(0)
    model = adapted(LoraConfig(r=2, target_modules=["target"]), OneLayer(nn.Conv2d(4, 6, 3, groups=2)))
    with pytest.raises(MergeError, match="there is no such kernel"):
        convert_to_lora(model, 2)


def test_a_bias_next_to_an_embedding_is_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up = nn.Embedding(5, 4), nn.Linear(4, 4)

    model = adapted(LoraConfig(r=2, target_modules=["table"]), Mixed())
    model.add_adapter("bias", LoraConfig(r=2, target_modules=["up"], lora_bias=True))
    convert_to_lora(model, 2, "bias")
    with pytest.raises(ConfigError, match="an embedding \\('table'\\) has none"):
        model.add_weighted_adapter(["default", "bias"], [1, 1], "both")
