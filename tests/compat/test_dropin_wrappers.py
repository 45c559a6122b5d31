"""Functions that take a model look through what others put around it: compiled, data-parallel, distributed. FSDP1: `test_dropin_crashes.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import peft
from compat.tiny import llama, outputs, randomise, worst

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": compiled,
    "distributed": DistributedDataParallel,
    "data-parallel": nn.DataParallel,
    "compiled distributed": lambda model: compiled(DistributedDataParallel(model)),
    "distributed compiled": lambda model: DistributedDataParallel(compiled(model)),
}
wrappers = pytest.mark.parametrize("wrapper", WRAPPERS)
ways = pytest.mark.parametrize("way", ["wrapped", "injected"])


def lora() -> Any:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def made(way: str, seed: int | None = None) -> Any:
    model = peft.get_peft_model(llama(), lora()) if way == "wrapped" else peft.inject_adapter_in_model(lora(), llama())
    return model if seed is None else randomise(model, seed=seed)


@wrappers
@ways
def test_the_status_of_a_wrapped_model(way: str, wrapper: str) -> None:
    model = WRAPPERS[wrapper](made(way))
    assert peft.get_model_status(model).num_adapter_layers == 4
    assert peft.get_model_status(model).base_model_type == "LlamaForCausalLM"
    assert len(peft.get_layer_status(model)) == 4


@wrappers
@ways
def test_the_state_dict_of_a_wrapped_model(way: str, wrapper: str) -> None:
    """The peer's names hold those of the wrapper, or it raises an `AttributeError`."""
    expected = peft.get_peft_model_state_dict(made(way, 5))
    found = peft.get_peft_model_state_dict(WRAPPERS[wrapper](made(way, 5)))
    assert set(found) == set(expected)
    assert all(worst(found[name], expected[name]) == 0 for name in expected)


@wrappers
@ways
def test_a_state_dict_is_put_into_a_wrapped_model(way: str, wrapper: str) -> None:
    source = made(way, 5)
    tensors, expected = peft.get_peft_model_state_dict(source), outputs(source)
    model = made(way)
    peft.set_peft_model_state_dict(WRAPPERS[wrapper](model), tensors)
    assert worst(outputs(model), expected) == 0


@wrappers
def test_the_state_dict_of_the_base_of_a_wrapped_model(wrapper: str) -> None:
    found = peft.get_base_model_state_dict(WRAPPERS[wrapper](made("wrapped", 5)))
    assert set(found) == set(llama().state_dict())


@pytest.mark.parametrize("wrapper", ["compiled", "distributed", "data-parallel"])
def test_a_base_that_is_wrapped_gets_an_adapter_under_its_own_names(wrapper: str, tmp_path: Path) -> None:
    plain = set(peft.get_peft_model_state_dict(made("wrapped")))
    base = WRAPPERS[wrapper](llama()) if wrapper != "distributed" else DistributedDataParallel(llama())
    model = randomise(peft.get_peft_model(base, lora()))
    assert set(peft.get_peft_model_state_dict(model)) == plain
    model.save_pretrained(tmp_path / "out")
    assert worst(outputs(peft.PeftModel.from_pretrained(llama(), tmp_path / "out")), outputs(model.get_base_model())) < 1e-6
