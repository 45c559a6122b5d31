"""Inside a cache scope a decoder's virtual tokens are computed once, with the same outputs as together with the text; outside in each call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_core import PeftModel, cached, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise
from peft_core.virtual_tokens import reuse
from peft_lora import LoraConfig
from peft_prompt import PromptTuningConfig
from prompt.families import FAMILIES, METHODS, made, reference


class Count:
    """How often the base runs on virtual tokens alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        original = reuse.VirtualKeysValues.__init__

        def counted(this: Any, *args: Any) -> None:
            self.times += 1
            original(this, *args)

        monkeypatch.setattr(reuse.VirtualKeysValues, "__init__", counted)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    return Count(monkeypatch)


def logits(model: PeftModel, **extra: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**{**FAMILIES["llama"].inputs(), **extra}).logits
    return found


def usual(model: PeftModel) -> Tensor:
    """Return the logits of a call that goes the usual way, because it keeps the hidden states."""
    return logits(model, output_hidden_states=True)


def test_once_for_all_calls(count: Count) -> None:
    model = made("prompt", "llama")
    expected = usual(model)
    assert count.times == 0
    with cached(model):
        for _ in range(3):
            torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
        assert count.times == 1
        inputs = FAMILIES["llama"].inputs(rows=1)
        found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert count.times == 1
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), found)
    assert count.times == 1, "a scope of one generate has no use for them"


def change_base(model: PeftModel) -> None:
    model.get_base_model().get_parameter("model.layers.1.mlp.up_proj.base_layer.weight").mul_(1.5)


def replace_base(model: PeftModel) -> None:
    layer: Any = model.get_base_model().get_submodule("model.layers.0.input_layernorm")
    layer.weight = torch.nn.Parameter(layer.weight * 2)


def load_state(model: PeftModel) -> None:
    model.load_state_dict({name: tensor * 0.5 for name, tensor in model.state_dict().items() if "prompt_encoder" in name}, strict=False)


def load_file(model: PeftModel) -> None:
    set_peft_model_state_dict(model, {"prompt_embeddings": get_peft_model_state_dict(model)["prompt_embeddings"] * 2})


def change_prompt(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "prompt_encoder" in name:
            parameter.add_(0.3)


def change_lora(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.mul_(-1)


def change_scaling(model: PeftModel) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.set_scale("lo", 3.0)


#: what may be done inside a scope
OURS: dict[str, Callable[[PeftModel], Any]] = {
    "a state dict": load_state,
    "an adapter's state dict": load_file,
    "its scaling": change_scaling,
    "without LoRA": lambda model: model.set_adapter("default"),
    "deleted": lambda model: model.delete_adapter("lo"),
    "merged": lambda model: model.merge_adapter(["lo"]),
}
#: what may be done between calls outside of one
CHANGES = {
    **OURS,
    "a weight of the base": change_base,
    "another weight in its place": replace_base,
    "through data": lambda model: model.get_base_model().get_parameter("model.norm.weight").data.mul_(0.5),
    "one row through data": lambda model: model.prompt_encoder["default"].embedding.weight.data[1].add_(1.0),
    "the prompt": change_prompt,
    "LoRA": change_lora,
    "in double": lambda model: model.double(),
}


@pytest.fixture
def both() -> PeftModel:
    """A prompt, and LoRA that acts on its tokens, too."""
    model = made("prompt", "llama")
    model.add_adapter("lo", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    randomise(model, "lo", 1)
    model.set_adapter(["default", "lo"])
    return model.eval()


@pytest.mark.parametrize("change", OURS)
def test_our_operations_inside_a_scope(both: PeftModel, change: str, count: Count) -> None:
    with cached(both):
        before = logits(both)
        assert torch.equal(logits(both), before)
        assert count.times == 1
        with torch.no_grad():
            OURS[change](both)
        found = logits(both)
    torch.testing.assert_close(found, logits(both), atol=1e-4, rtol=1e-3)
    assert change == "merged" or not torch.allclose(found, before, atol=1e-3)


@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(both: PeftModel, change: str) -> None:
    torch.testing.assert_close(logits(both), usual(both), atol=1e-5, rtol=1e-4)
    before = logits(both)
    with torch.no_grad():
        CHANGES[change](both)
    found = logits(both)
    torch.testing.assert_close(found, usual(both), atol=1e-5, rtol=1e-4)
    if change not in ("merged", "in double"):
        assert not torch.allclose(found, before, atol=1e-3)


def test_training_between(both: PeftModel) -> None:
    before = logits(both)
    optimiser = torch.optim.SGD([p for p in both.parameters() if p.requires_grad], lr=0.5)
    both.train()
    both(**FAMILIES["llama"].inputs(), **FAMILIES["llama"].labels()).loss.backward()
    optimiser.step()
    both.eval()
    found = logits(both)
    assert not torch.allclose(found, before, atol=1e-3)
    torch.testing.assert_close(found, usual(both), atol=1e-5, rtol=1e-4)


def test_copies_compute_their_own(both: PeftModel) -> None:
    expected = logits(both)
    twin = copy.deepcopy(both)
    with torch.no_grad():
        change_prompt(twin)
    assert not torch.allclose(logits(twin), expected, atol=1e-3)
    assert torch.equal(logits(both), expected)


def test_several_prompts_take_turns(count: Count) -> None:
    model = made("prompt", "gpt2")
    model.add_adapter("other", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    found = {}
    with cached(model):
        for _ in range(2):
            for name in ("default", "other"):
                with model.use_adapters(name):
                    found.setdefault(name, []).append(logits(model))
    for first, second in found.values():
        assert torch.equal(first, second)
    assert count.times == 2


def test_inference_mode_and_after_it() -> None:
    model = made("prompt", "llama")
    with cached(model):
        with torch.inference_mode():
            first = model(**FAMILIES["llama"].inputs()).logits.clone()
        torch.testing.assert_close(logits(model), first)
    model(**FAMILIES["llama"].inputs(), **FAMILIES["llama"].labels()).loss.backward()


def test_threads(both: PeftModel) -> None:
    names = [("default",), ("default", "lo")]
    expected = []
    for chosen in names:
        with both.use_adapters(*chosen):
            expected.append(usual(both))

    def work(number: int) -> None:
        chosen = number % 2
        for _ in range(20):
            with both.use_adapters(*names[chosen]):
                torch.testing.assert_close(logits(both), expected[chosen], atol=1e-5, rtol=1e-4)

    with cached(both), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


def test_half_precision() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama").to(torch.bfloat16), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    randomise(model, "default", 5)
    with cached(model):
        found = logits(model)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, usual(model), atol=0.1, rtol=0.1)


def test_hidden_states_have_all_tokens() -> None:
    model, kind = made("prompt", "llama"), FAMILIES["llama"]
    with torch.no_grad():
        found = model(**kind.inputs(), output_hidden_states=True)
        expected = reference(model, METHODS["prompt"], kind, kind.inputs(), output_hidden_states=True)
    torch.testing.assert_close(found.hidden_states[-1], expected.hidden_states[-1], atol=1e-5, rtol=1e-4)


def test_a_cache_holds_all_tokens() -> None:
    model, kind = made("prompt", "llama"), FAMILIES["llama"]
    with torch.no_grad(), cached(model):
        cache = model(**kind.inputs(), use_cache=True).past_key_values
    assert cache.get_seq_length() == 4 + 6
