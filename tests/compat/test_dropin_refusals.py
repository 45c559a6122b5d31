"""What the peer does and this module refused without need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import peft
from compat.tiny import IDS, SIZES, llama, mixtral, net, outputs, randomise, rows, step, worst

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})


# ---- several adapters over the same tokens -----------------------------------------------------------------------------


def chats(rows_of_b: list[int]) -> Any:
    model = peft.get_peft_model(llama(), lora(trainable_token_indices=[3, 4]), "a")
    model.add_adapter("b", lora(trainable_token_indices=rows_of_b))
    for name, value in (("a", 0.5), ("b", -0.5)):
        model.set_adapter(name)
        with torch.no_grad():
            for path, p in model.named_parameters():
                if f"trainable_tokens_delta.{name}" in path:
                    p.fill_(value)
    return model


@pytest.mark.parametrize("rows_of_b", [[3, 4], [4, 9]], ids=["same", "overlapping"])
def test_two_adapters_that_train_the_same_tokens_are_used_one_at_a_time(rows_of_b: list[int]) -> None:
    model = chats(rows_of_b)
    found = {}
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        found.setdefault(name, []).append(outputs(model))
    assert worst(found["a"][0], found["a"][1]) == 0
    assert worst(found["a"][0], found["b"][0]) > 1e-3
    with model.disable_adapter():
        assert worst(outputs(model), outputs(llama())) == 0
    plain = llama()
    with torch.no_grad():
        plain.model.embed_tokens.weight[rows_of_b] = -0.5
    assert worst(outputs(model), outputs(plain)) > 1e-3  # "a" is in use
    model.set_adapter("b")
    assert worst(outputs(model), outputs(plain)) < 1e-6


def test_two_adapters_that_train_the_same_tokens_each_have_rows_of_a_batch() -> None:
    model = chats([3, 4])
    found = outputs(model, adapter_names=["a", "b"])
    for row, name in enumerate(("a", "b")):
        model.set_adapter(name)
        assert worst(found[row : row + 1], outputs(model, IDS[row : row + 1])) < 1e-6


def test_two_adapters_of_the_same_tokens_are_saved_and_loaded_beside_each_other(tmp_path: Path) -> None:
    model = chats([3, 4])
    model.set_adapter("b")
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="a")
    again.load_adapter(tmp_path / "b", "b")
    again.set_adapter("b")
    assert worst(outputs(again), expected) < 1e-6


def test_the_same_config_under_a_second_name_as_a_reference() -> None:
    """trl: `model.add_adapter("ref", model.peft_config["default"])`."""
    model = peft.get_peft_model(llama(), lora(trainable_token_indices={"embed_tokens": [3, 4]}))
    model.add_adapter("ref", model.peft_config["default"])
    for name, p in model.named_parameters():
        if ".default" in name:
            model.get_parameter(name.replace(".default", ".ref")).data.copy_(p.data)
    before = outputs(model)
    step(model)
    model.set_adapter("ref")
    assert worst(outputs(model), before) < 1e-6


@pytest.mark.parametrize("together", ["used", "merged"])
def test_using_or_merging_two_adapters_of_the_same_tokens_at_once_is_refused(together: str) -> None:
    model = chats([3, 4])

    def both() -> None:
        if together == "used":
            model.base_model.set_adapter(["a", "b"])
            outputs(model)
        else:
            model.merge_adapter(["a", "b"])

    with pytest.raises(ValueError, match=r"(?i)(token|ind)"):
        both()


# ---- which modules -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_all_linear_on_a_net_of_ones_own() -> None:
    """The peer asks for a transformers model here; every linear layer is meant."""
    model = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert sorted(model.targeted_module_names) == ["0", "2", "4"]
    assert worst(model(rows()), net()(rows())) > 1e-3


def test_all_linear_is_injected_into_a_net_of_ones_own() -> None:
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules="all-linear"), Block())
    assert {name.split(".lora")[0] for name, _ in model.named_parameters() if "lora_A" in name} == {"inner.0", "inner.2"}


def test_targets_that_match_nothing_beside_parameters_that_match() -> None:
    fields = {"target_modules": ["no_such_layer"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    with pytest.warns((UserWarning, RuntimeWarning), match=r"(?s)(no_such_layer|target_modules)"):
        model = peft.get_peft_model(mixtral(), peft.LoraConfig(r=2, **fields))
    assert any("experts.lora_A" in name for name, _ in model.named_parameters())


def test_parameters_that_match_nothing_beside_targets_that_match() -> None:
    fields = {"target_modules": ["q_proj"], "target_parameters": ["no_such_parameter"]}
    with pytest.warns((UserWarning, RuntimeWarning), match=r"(?s)(no_such_parameter|target_parameters)"):
        model = peft.get_peft_model(mixtral(), peft.LoraConfig(r=2, **fields))
    assert any("q_proj.lora_A" in name for name, _ in model.named_parameters())


# ---- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}], ids=["plain", "dora", "pissa", "bias"]
)
def test_one_adapter_is_merged_and_a_third_is_dropped(fields: dict[str, Any]) -> None:
    model = peft.get_peft_model(llama(), lora(), "p")
    model.add_adapter("q", lora())
    for name in ("p", "q"):
        randomise(model, name, seed=len(name))
    fields = {"target_modules": ["o_proj"], **fields}
    if "lora_bias" in fields:
        model = peft.get_peft_model(llama(attention_bias=True), lora(), "p")
        model.add_adapter("q", lora())
    model.add_adapter("third", lora(**fields))
    model.set_adapter("q")
    expected = outputs(model)
    merged = model.merge_and_unload(adapter_names=["q"])
    assert worst(outputs(merged), expected) < 1e-5


@pytest.mark.parametrize("in_use", [["third"], ["third", "q"]], ids=["third", "both"])
@pytest.mark.parametrize("third", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"])
def test_a_dora_is_merged_and_an_adapter_of_the_same_layers_that_is_in_use_is_dropped(third: dict[str, Any], in_use: list[str]) -> None:
    """`merge_and_unload(adapter_names=["q"])`: what is not named is gone afterwards, so that it can't be in the way."""
    model = peft.get_peft_model(llama(attention_bias=True), lora(**third), "third")
    model.add_adapter("q", lora(use_dora=True))
    randomise(model, "third", seed=5)
    randomise(model, "q")
    model.set_adapter("q")
    expected = outputs(model)
    model.base_model.set_adapter(in_use)
    merged = model.merge_and_unload(adapter_names=["q"])
    assert worst(outputs(merged), expected) < 1e-5


def test_a_plain_adapter_around_a_method_that_multiplies_is_merged_alone() -> None:
    """LoHa outside, DoRA inside and in use: unloading drops the DoRA."""
    model = peft.get_peft_model(llama(), lora(use_dora=True, task_type=None), "third", mixed=True)
    model.add_adapter("q", peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]))
    randomise(model, "third", seed=5)
    randomise(model, "q")
    model.set_adapter("q")
    expected = outputs(model)
    model.set_adapter(["third", "q"])
    merged = model.merge_and_unload(adapter_names=["q"])
    assert worst(outputs(merged), expected) < 1e-5


def test_one_adapter_is_merged_where_a_third_cannot_be() -> None:
    """An activated LoRA can't be merged; here it is dropped."""
    model = peft.get_peft_model(llama(), lora(), "q")
    model.add_adapter("third", lora(alora_invocation_tokens=[3, 4]))
    randomise(model, "q")
    expected = outputs(model)
    merged = model.merge_and_unload(adapter_names=["q"])
    assert worst(outputs(merged), expected) < 1e-5


def test_activated_adapters_are_combined() -> None:
    model = peft.get_peft_model(llama(), lora(alora_invocation_tokens=[4, 17]), "a")
    model.add_adapter("b", lora(alora_invocation_tokens=[4, 17]))
    randomise(model, "a")
    randomise(model, "b", seed=8)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", combination_type="linear")
    assert "both" in model.peft_config
    model.set_adapter("both")
    assert torch.isfinite(outputs(model)).all()


def test_activated_adapters_are_concatenated_exactly() -> None:
    model = peft.get_peft_model(llama(), lora(alora_invocation_tokens=[4, 17], target_modules=["q_proj"]), "a")
    model.add_adapter("b", lora(alora_invocation_tokens=[4, 17], target_modules=["q_proj"]))
    randomise(model, "a")
    randomise(model, "b", seed=8)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type="cat")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    expected = 0.7 * layer.get_delta_weight("a") + 0.3 * layer.get_delta_weight("b")
    assert worst(layer.get_delta_weight("both"), expected) < 1e-6
    assert list(model.peft_config["both"].alora_invocation_tokens) == [4, 17]


# ---- injecting, names --------------------------------------------------------------------------------------------------


def test_injecting_twice_under_one_name() -> None:
    """A cell that ran twice: the peer makes the adapter anew."""
    model = net()
    config = peft.LoraConfig(r=2, target_modules=["0"])
    peft.inject_adapter_in_model(config, model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["0"]), model)
    assert dict(model.named_parameters())["0.lora_A.default.weight"].shape == (4, 8)
    assert worst(model(rows()), net()(rows())) == 0


def test_injecting_the_same_config_twice_changes_no_names() -> None:
    model = net()
    config = peft.LoraConfig(r=2, target_modules=["0", "2"])
    peft.inject_adapter_in_model(config, model, "x")
    names = [name for name, _ in model.named_parameters()]
    peft.inject_adapter_in_model(config, model, "x")
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("name", ["lora_1", "my_lora_adapter", "a/b", "lora", "hada_x", "adapter-1"])
def test_names_of_adapters(name: str, tmp_path: Path) -> None:
    model = randomise(peft.get_peft_model(llama(), lora(), adapter_name=name), name)
    expected = outputs(model)
    assert worst(expected, outputs(llama())) > 1e-3
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=name)
    assert worst(outputs(again), expected) < 1e-6


# ---- hot-swapping, custom layers, encoders ------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 8])
def test_hotswapping_another_rank(rank: int, tmp_path: Path) -> None:
    """A larger one grows the adapter: where nothing is compiled there is no reason to refuse."""
    from peft.utils.hotswap import hotswap_adapter

    model = randomise(peft.get_peft_model(llama(), lora(r=rank)))
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    other = randomise(peft.get_peft_model(llama(), lora(r=4)), seed=9)
    hotswap_adapter(other, str(tmp_path), "default")
    assert worst(outputs(other), expected) < 1e-5


class Lstm(nn.Module):
    """A layer of one's own that the peer's config can be told of."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.scale = Scale(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale(self.first(x))


class Scale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.in_features = self.out_features = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def custom_layer() -> Any:
    """Return a layer as users of the peer write it: `(nn.Module, LoraLayer)`, with `update_layer` and a forward of its own."""
    from peft.tuners.lora.layer import LoraLayer

    class ScaleLora(nn.Module, LoraLayer):  # type: ignore[misc]
        def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any = None, r: int = 0, lora_alpha: int = 1, **kwargs: Any) -> None:
            super().__init__()
            LoraLayer.__init__(self, base_layer, **kwargs)
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.base_layer(x)
            for name in self.active_adapters:
                if name in self.lora_A:
                    found = found + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
            return found

    return ScaleLora


def test_a_custom_layer_at_the_config() -> None:
    model, config = Lstm(), peft.LoraConfig(r=2, target_modules=["scale"])
    config._register_custom_module({Scale: custom_layer()})
    found = peft.get_peft_model(model, config)
    assert type(found.get_base_model().scale).__name__ == "ScaleLora"
    x = torch.randn(3, 8)
    assert worst(found(x), Lstm_like(model)(x)) < 1e-6
    randomise(found)
    layer = found.get_base_model().scale
    y = model.first(x)
    expected = y * layer.base_layer.weight + y @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T * layer.scaling["default"]
    assert worst(found(x), expected) < 1e-5


def Lstm_like(model: Any) -> Any:
    return lambda x: model.first(x) * model.scale.base_layer.weight


def test_a_class_that_inherits_from_the_layer_of_lora_is_one() -> None:
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = custom_layer()
    assert issubclass(layer, LoraLayer)
    assert issubclass(layer, BaseTunerLayer)
    assert issubclass(layer, nn.Module)


def test_encoders_are_made_from_their_configs() -> None:
    """The peer's documentation makes them so."""
    prefix = peft.PrefixEncoder(
        peft.PrefixTuningConfig(
            num_virtual_tokens=5,
            token_dim=16,
            num_transformer_submodules=1,
            num_attention_heads=4,
            num_layers=2,
            encoder_hidden_size=16,
            task_type="CAUSAL_LM",
        )
    )
    assert prefix(torch.arange(5).unsqueeze(0)).shape == (1, 5, 2 * 2 * 16)
    encoder = peft.PromptEncoder(
        peft.PromptEncoderConfig(
            num_virtual_tokens=5,
            token_dim=16,
            num_transformer_submodules=1,
            num_attention_heads=4,
            num_layers=2,
            encoder_hidden_size=8,
            task_type="CAUSAL_LM",
        )
    )
    assert encoder(torch.arange(5).unsqueeze(0)).shape == (1, 5, 16)
    prompt = peft.PromptEmbedding(
        peft.PromptTuningConfig(
            num_virtual_tokens=5, token_dim=16, num_transformer_submodules=1, num_attention_heads=4, num_layers=2, task_type="CAUSAL_LM"
        ),
        nn.Embedding(9, 16),
    )
    assert prompt(torch.arange(5).unsqueeze(0)).shape == (1, 5, 16)


# ---- loading over an adapter -------------------------------------------------------------------------------------------


def test_loading_over_an_adapter_that_started_in_another_way(tmp_path: Path) -> None:
    """`init_lora_weights` says how tensors started: it says nothing of tensors that are read from a file."""
    model = randomise(peft.get_peft_model(llama(), lora(init_lora_weights=False)))
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    other = peft.get_peft_model(llama(), lora(init_lora_weights="gaussian"))
    other.load_adapter(str(tmp_path), "default")
    assert worst(outputs(other), expected) < 1e-6


def test_loading_over_a_loha_that_started_in_another_way(tmp_path: Path) -> None:
    def made(start: bool) -> Any:
        return peft.get_peft_model(llama(), peft.LoHaConfig(r=4, target_modules=["q_proj"], init_weights=start))

    model = randomise(made(False))
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    other = made(True)
    other.load_adapter(str(tmp_path), "default")
    assert worst(outputs(other), expected) < 1e-6


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_loading_over_an_adapter_whose_start_changed_the_base(init: str, tmp_path: Path) -> None:
    """The Trainer's best model: the file of a conversion recipe (`init_lora_weights = True`) over the model that wrote it."""
    model = peft.get_peft_model(llama(), lora(init_lora_weights=init))
    randomise(model)
    expected = outputs(model)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path)
    model.peft_config["default"].init_lora_weights = init
    randomise(model, seed=11)
    model.load_adapter(str(tmp_path), "default")
    assert worst(outputs(model), expected) < 1e-6


AUTO = {**SIZES, "num_hidden_layers": 1}


def test_auto_model_takes_an_import_allowlist(tmp_path: Path) -> None:
    """A base whose class is not of transformers (chronos): the caller names the package that may be imported."""
    import sys
    import textwrap

    (tmp_path / "my_forecaster.py").write_text(
        textwrap.dedent(
            """
            import transformers
            class Forecaster(transformers.LlamaForCausalLM):
                pass
            """
        )
    )
    sys.path.insert(0, str(tmp_path))
    try:
        import my_forecaster

        torch.manual_seed(0)
        my_forecaster.Forecaster(transformers.LlamaConfig(**AUTO)).save_pretrained(tmp_path / "base")
        base = my_forecaster.Forecaster.from_pretrained(tmp_path / "base")
        model = randomise(peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])))
        expected = outputs(model)
        model.save_pretrained(tmp_path / "adapter")
        with pytest.raises((ValueError, ImportError)):
            peft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
        found = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["my_forecaster"])
        assert type(found.get_base_model()).__name__ == "Forecaster"
        assert worst(outputs(found), expected) < 1e-6
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("my_forecaster", None)
