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
from compat.tiny import IDS, llama, outputs, randomise, worst

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


def test_blocks_that_are_compiled_one_by_one_have_no_part_in_names(tmp_path: Path) -> None:
    """accelerate's `compile_regions`: before the adapter, or after it."""
    base = llama()
    for number, layer in enumerate(base.model.layers):
        base.model.layers[number] = compiled(layer)
    model = randomise(peft.get_peft_model(base, lora()))
    plain = made("wrapped")
    assert set(peft.get_peft_model_state_dict(model)) == set(peft.get_peft_model_state_dict(plain))
    assert [layer.name for layer in peft.get_layer_status(model)] == [layer.name for layer in peft.get_layer_status(plain)]
    model.save_pretrained(tmp_path)
    expected = outputs(peft.PeftModel.from_pretrained(llama(), tmp_path))
    assert worst(outputs(model), expected) < 1e-6
    for number, layer in enumerate(plain.get_base_model().model.layers):
        plain.get_base_model().model.layers[number] = compiled(layer)
    peft.set_peft_model_state_dict(plain, peft.get_peft_model_state_dict(model))
    assert worst(outputs(plain), expected) < 1e-6
    again = peft.PeftModel.from_pretrained(llama(), tmp_path)
    peft.set_peft_model_state_dict(again, peft.get_peft_model_state_dict(plain, state_dict=plain.state_dict()))
    assert worst(outputs(again), expected) < 1e-6


@pytest.mark.parametrize("wrapper", ["compiled", "distributed", "data-parallel"])
def test_files_that_have_the_names_of_a_wrapper_are_loaded(wrapper: str, tmp_path: Path) -> None:
    """The peer writes them for a base that was wrapped first."""
    from safetensors.torch import load_file, save_file

    model = made("wrapped", 5)
    model.save_pretrained(tmp_path)
    part = {"compiled": "_orig_mod."}.get(wrapper, "module.")
    path = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("base_model.model.", f"base_model.model.{part}"): value for name, value in load_file(path).items()}, path)
    assert worst(outputs(peft.PeftModel.from_pretrained(llama(), tmp_path, strict=True)), outputs(model)) < 1e-6


@pytest.mark.parametrize("wrapper", ["compiled", "distributed", "data-parallel", "compiled distributed"])
def test_a_wrapped_base_is_used_as_the_base_is(wrapper: str, tmp_path: Path) -> None:
    base = llama()
    held = WRAPPERS[wrapper](base)
    model = randomise(peft.get_peft_model(held, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")))
    assert model.config is base.config
    assert model.get_base_model() is held
    assert base.peft_config is model.peft_config
    found = model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False)
    assert found.shape == (2, IDS.shape[1] + 2)
    model.save_pretrained(tmp_path)
    expected = outputs(model)
    again = peft.PeftModel.from_pretrained(WRAPPERS[wrapper](llama()), tmp_path)
    assert worst(outputs(again), expected) < 1e-6
    again.load_adapter(str(tmp_path), "second")
    assert model.merge_and_unload() is held
    assert worst(outputs(held), expected) < 1e-5
    injected = llama()
    assert peft.inject_adapter_in_model(lora(), (holder := WRAPPERS[wrapper](injected))) is holder
    assert list(injected.peft_config) == ["default"]
    assert peft.get_model_status(holder).num_adapter_layers == 4


def test_an_average_of_a_model_has_its_own_tensors() -> None:
    """Whatever has the model as `module` counts as a wrapper where it has no adapters of its own: averages, engines of other libraries."""
    model = made("wrapped", 5)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    randomise(model, seed=6)
    found, expected = peft.get_peft_model_state_dict(average), peft.get_peft_model_state_dict(made("wrapped", 5))
    assert set(found) == set(expected)
    assert all(worst(found[name], expected[name]) == 0 for name in expected)


def test_a_model_of_ones_own_with_a_part_called_module_is_no_wrapper() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.module(x)

    model = peft.get_peft_model(Twice(), peft.LoraConfig(r=2, target_modules=["0"]))
    assert set(peft.get_peft_model_state_dict(model)) == {f"base_model.model.module.0.lora_{kind}.weight" for kind in "AB"}
