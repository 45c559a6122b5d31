"""(IA)³ against its formula, done slowly in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft_core import ConfigError, MergeError, get_peft_model
from peft_core.testing import tiny
from torch import Tensor, nn

from peft_ia3 import IA3Config, IA3Layer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(5, 4)
        self.up = nn.Linear(4, 6, bias=False)
        self.down = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.key(x))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


CONFIG = {"target_modules": ["key", "down"], "feedforward_modules": ["down"]}


def adapted(*adapters: str):
    model = get_peft_model(net(), IA3Config(**CONFIG), adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, IA3Config(**CONFIG))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def slowly(base: Net, x: Tensor, vectors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Entry by entry: key's outputs (with their bias) and down's inputs are multiplied."""
    rows = []
    for row in x:
        key = [sum(float(base.key.weight[o, i]) * float(row[i]) for i in range(5)) + float(base.key.bias[o]) for o in range(4)]
        for l_key, _ in vectors:
            key = [value * float(l_key[o]) for o, value in enumerate(key)]
        up = torch.tanh(base.up.weight @ torch.tensor(key, dtype=torch.float64))
        for _, l_down in vectors:
            up = up * l_down
        rows.append(torch.stack([(base.down.weight[o] * up).sum() + base.down.bias[o] for o in range(3)]))
    return torch.stack(rows)


def vectors_of(model: nn.Module, *adapters: str) -> list[tuple[Tensor, Tensor]]:
    held = dict(model.named_parameters())
    prefix = "base_model.model."
    return [(held[f"{prefix}key.ia3_l.{name}"].view(-1), held[f"{prefix}down.ia3_l.{name}"].view(-1)) for name in adapters]


X = torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("adapters", [("a",), ("a", "b")])
def test_scales_outputs_and_inputs(adapters: tuple[str, ...]) -> None:
    model = adapted(*adapters)
    with model.use_adapters(*adapters):
        torch.testing.assert_close(model(X), slowly(net(), X, vectors_of(model, *adapters)), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_rows_with_several_adapters() -> None:
    model = adapted("a", "b")
    found = model(X, adapter_names=["b", "__base__", ["a", "b"]])
    for row, names in enumerate((["b"], [], ["a", "b"])):
        torch.testing.assert_close(found[row : row + 1], slowly(net(), X[row : row + 1], vectors_of(model, *names)), rtol=1e-12, atol=1e-12)
    assert torch.equal(X, torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)), "the caller's input changed"


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["itself", "deepcopy", "pickle"])
def test_merging_scales_the_bias_and_gives_it_back(duplicate) -> None:
    model = adapted("a", "b")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    with model.use_adapters("a", "b"):
        expected = model(X)
    model.merge_adapter(["a"])
    model.merge_adapter(["b"])
    model = duplicate(model)
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        assert name not in before or torch.equal(tensor, before[name]), f"{name} did not come back"


@torch.no_grad()
def test_half_precision_is_rounded_once() -> None:
    model = get_peft_model(tiny().to(torch.bfloat16), IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"))
    layer = next(module for module in model.modules() if isinstance(module, IA3Layer))
    layer.ia3_l["default"].normal_()
    expected = (layer.weight.double() * layer.ia3_l["default"].double()).to(torch.float32).to(torch.bfloat16)
    model.merge_adapter()
    error = (layer.weight.float() - expected.float()).abs()
    assert (error <= expected.float().abs() * 2**-8).all()


@torch.no_grad()
def test_there_is_no_delta_but_a_change_of_the_weight() -> None:
    model = adapted("a")
    layer = next(module for module in model.modules() if isinstance(module, IA3Layer))
    with pytest.raises(MergeError, match="there is no ΔW"):
        layer.delta_weight("a")
    torch.testing.assert_close(layer.get_delta_weight("a"), layer.weight * layer.ia3_l["a"] - layer.weight)


def test_feedforward_modules_are_targets() -> None:
    with pytest.raises(ConfigError, match=r"subset.*down_proj"):
        IA3Config(target_modules=["q_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(ConfigError, match="neither rank"):
        IA3Config(rank_pattern={"q_proj": 2})
    with pytest.raises(ConfigError, match="is a int"):
        IA3Config(feedforward_modules=3)
    with pytest.raises(ConfigError, match="no regular expression"):
        get_peft_model(tiny(), IA3Config(target_modules=["q_proj"], feedforward_modules="("))
    IA3Config(target_modules=["mlp.down_proj"], feedforward_modules=["down_proj"])


def test_defaults_are_written_into_the_config() -> None:
    model = get_peft_model(tiny(), IA3Config(task_type="CAUSAL_LM"))
    config = model.peft_config["default"]
    assert config.target_modules == {"k_proj", "v_proj", "down_proj"}
    assert config.feedforward_modules == {"down_proj"}
    named = get_peft_model(tiny(), IA3Config(target_modules=["q_proj"]))
    assert named.peft_config["default"].feedforward_modules == set(), "a config that could not be read again"
    gpt2 = get_peft_model(tiny("gpt2"), IA3Config(task_type="CAUSAL_LM"))
    assert gpt2.peft_config["default"].fan_in_fan_out


def test_keys_and_shapes_of_the_file() -> None:
    from peft_core import get_peft_model_state_dict

    model = get_peft_model(tiny(), IA3Config(task_type="CAUSAL_LM"))
    state = get_peft_model_state_dict(model)
    assert tuple(state["base_model.model.model.layers.0.self_attn.k_proj.ia3_l"].shape) == (16, 1)
    assert tuple(state["base_model.model.model.layers.0.mlp.down_proj.ia3_l"].shape) == (1, 48)
    written = model.peft_config["default"].to_dict()
    assert not {"rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"} & set(written)
