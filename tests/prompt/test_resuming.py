"""P-tuning and projected prefixes: what the networks compute, and training that goes on from a file exactly where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_core import (
    AdapterWeightsError,
    PeftModel,
    PeftWarning,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft_core.testing import tiny

N = 3
CONFIGS: dict[str, dict[str, Any]] = {
    "mlp": {"peft_type": "P_TUNING", "num_virtual_tokens": N, "encoder_hidden_size": 5},
    "lstm": {"peft_type": "P_TUNING", "num_virtual_tokens": N, "encoder_hidden_size": 5, "encoder_reparameterization_type": "LSTM"},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": N, "prefix_projection": True, "encoder_hidden_size": 5},
    "cpt": {"peft_type": "CPT", "cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 4]},
}
every_network = pytest.mark.parametrize("name", ["mlp", "lstm", "prefix"])
every_config = pytest.mark.parametrize("name", CONFIGS)


def made(name: str) -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny("llama"), get_peft_config({"task_type": "CAUSAL_LM", **CONFIGS[name]}))


def ids() -> Tensor:
    return torch.randint(2, 64, (2, 6), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids()).logits.clone()


def optimiser_of(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)


def train(model: Any, optimiser: torch.optim.Adam, steps: int) -> None:
    model.train()
    for _ in range(steps):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def linear(x: Tensor, module: nn.Module) -> Tensor:
    return x @ module.get_parameter("weight").double().T + module.get_parameter("bias").double()


def direction(x: Tensor, lstm: nn.Module, end: str, hidden: int) -> Tensor:
    """One direction of one layer of an LSTM, step by step."""
    weights = {name: lstm.get_parameter(f"{name}_{end}").double() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    h, c, found = torch.zeros(hidden).double(), torch.zeros(hidden).double(), []
    for step in x.flip(0) if end.endswith("_reverse") else x:
        i, f, g, o = (weights["weight_ih"] @ step + weights["bias_ih"] + weights["weight_hh"] @ h + weights["bias_hh"]).split(hidden)
        c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
        h = sigmoid(o) * torch.tanh(c)
        found.append(h)
    out = torch.stack(found)
    return out.flip(0) if end.endswith("_reverse") else out


def expected_table(name: str, encoder: Any) -> Tensor:
    with torch.no_grad():
        x = encoder.embedding.weight.double()
        if name == "prefix":
            return linear(torch.tanh(linear(x, encoder.transform[0])), encoder.transform[2])
        if name == "mlp":
            return linear(linear(linear(x, encoder.mlp_head[0]).clamp(min=0), encoder.mlp_head[2]).clamp(min=0), encoder.mlp_head[4])
        for layer in range(2):
            x = torch.cat([direction(x, encoder.lstm_head, f"l{layer}{end}", 5) for end in ("", "_reverse")], dim=1)
        return linear(linear(x, encoder.mlp_head[0]).clamp(min=0), encoder.mlp_head[2])


@every_network
def test_the_network(name: str) -> None:
    model = made(name)
    encoder = model.prompt_encoder["default"]
    train(model, optimiser_of(model), 1)
    expected = expected_table(name, encoder)
    torch.testing.assert_close(get_peft_model_state_dict(model)["prompt_embeddings"].double(), expected, rtol=1e-6, atol=1e-6)
    if name != "prefix":
        words = model.get_input_embeddings()(ids())
        sequence = torch.cat([expected.float().expand(2, -1, -1), words], dim=1)
        with torch.no_grad():
            torch.testing.assert_close(logits(model), tiny("llama")(inputs_embeds=sequence).logits, rtol=0, atol=1e-5)


@every_config
def test_training_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    straight = made(name)
    train(straight, optimiser_of(straight), 6)
    model = made(name)
    optimiser = optimiser_of(model)
    train(model, optimiser, 3)
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    resumed = optimiser_of(again)
    resumed.load_state_dict(optimiser.state_dict())
    train(again, resumed, 3)
    assert torch.equal(logits(again), logits(straight))
    assert not torch.equal(logits(again), logits(model)), "training does nothing: the test says nothing"


@every_network
@pytest.mark.parametrize("meta", [False, True])
def test_for_inference_only_the_table_is_built(name: str, meta: bool, tmp_path: Path) -> None:
    model = made(name)
    train(model, optimiser_of(model), 1)
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=meta)
    parameters = dict(loaded.prompt_encoder["default"].named_parameters())
    assert list(parameters) == ["embedding.weight"]
    assert not parameters["embedding.weight"].requires_grad
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert list(load_file(tmp_path / "again" / "adapter_model.safetensors")) == ["prompt_embeddings"]


@every_network
def test_a_file_with_the_table_alone(name: str, tmp_path: Path) -> None:
    """As other writers make it: the table stands for the network, and trains."""
    model = made(name)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(path)["prompt_embeddings"]}, path)
    loaded: Any = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    assert [key for key, p in loaded.named_parameters() if p.requires_grad] == ["prompt_encoder.default.embedding.weight"]
    assert torch.equal(logits(loaded), logits(model))
    train(loaded, optimiser_of(loaded), 1)
    assert not torch.equal(logits(loaded), logits(model))
    # and one that has become a table takes nothing else of a file any more
    set_peft_model_state_dict(loaded, get_peft_model_state_dict(model), strict=True)
    assert torch.equal(logits(loaded), logits(model))


@every_config
def test_a_file_with_part_of_the_network(name: str, tmp_path: Path) -> None:
    model = made(name)
    state = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    before = logits(model)
    key = [key for key in state if key != "prompt_embeddings"][-1]
    del state[key]
    with pytest.raises(AdapterWeightsError, match=key):
        set_peft_model_state_dict(model, {name: value + 1 for name, value in state.items()}, strict=True)
    assert torch.equal(logits(model), before)
    with pytest.raises(AdapterWeightsError, match="size mismatch"):
        set_peft_model_state_dict(model, {**state, key: torch.zeros(2, 2)}, strict=True)
    # not strict: the table is whole, so it counts
    state["prompt_embeddings"] += 0.5
    result = set_peft_model_state_dict(model, state, strict=False)
    assert result.missing_keys == [key]
    assert torch.equal(get_peft_model_state_dict(model)["prompt_embeddings"], state["prompt_embeddings"])


@every_network
def test_the_table_is_not_the_start_of_the_network(name: str) -> None:
    """A surplus key is still an error, also beside those that a table has no use for."""
    model = made(name)
    state = get_peft_model_state_dict(model)
    with pytest.raises(AdapterWeightsError, match="unexpected keys"):
        set_peft_model_state_dict(model, {**state, "prompt_encoder.nothing": torch.zeros(1)}, strict=True)


def test_the_config_in_the_file(tmp_path: Path) -> None:
    made("lstm").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    found = {name: fields[name] for name in fields if name.startswith("encoder_") or name in ("token_dim", "num_layers", "peft_type")}
    assert found == {
        "encoder_dropout": 0.0,
        "encoder_hidden_size": 5,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "LSTM",
        "num_layers": 2,
        "peft_type": "P_TUNING",
        "token_dim": 32,
    }


def test_the_mlp_says_that_layers_have_no_effect() -> None:
    config = get_peft_config({"task_type": "CAUSAL_LM", **CONFIGS["mlp"], "encoder_num_layers": 3})
    with pytest.warns(PeftWarning, match="encoder_num_layers=3 has no effect"):
        get_peft_model(tiny("llama"), config)


def test_dropout_is_between_the_layers_of_the_lstm() -> None:
    torch.manual_seed(0)
    config = get_peft_config({"task_type": "CAUSAL_LM", **CONFIGS["lstm"], "encoder_dropout": 0.5})
    encoder: Any = get_peft_model(tiny("llama"), config).prompt_encoder["default"]
    encoder.train()
    assert not torch.equal(encoder.tokens(), encoder.tokens())
    encoder.eval()
    assert torch.equal(encoder.tokens(), encoder.tokens())
