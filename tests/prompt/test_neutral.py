"""A neutral prefix: the first output is the base's, and it learns from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from peft_core import CapabilityError, PeftModel, get_peft_model
from peft_core.testing import tiny
from peft_core.testing.helpers import randomise
from peft_prompt import PrefixTuningConfig
from prompt.families import FAMILIES

OLD = transformers.__version__.startswith("4.")
#: encoders of transformers 4 take no mask with numbers: a typed error, tested below
WITH_CACHE = [name for name in FAMILIES if name != "bart" and not (OLD and "bert" in name)]


def config(family: str, **extra: Any) -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type=FAMILIES[family].task, num_virtual_tokens=8, init_weights="neutral", **extra)


def first(output: Any) -> Tensor:
    names = ("logits", "start_logits", "last_hidden_state")
    return next(output[name] for name in names if isinstance(output.get(name), Tensor))


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", WITH_CACHE)
def test_the_first_output_is_the_bases(family: str, projection: bool) -> None:
    torch.manual_seed(0)
    kind = FAMILIES[family]
    inputs = kind.inputs()
    with torch.no_grad():
        expected = first(kind.bare()(**inputs))
        model = get_peft_model(kind.bare(), config(family, prefix_projection=projection)).eval()
        torch.testing.assert_close(first(model(**inputs)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_so_is_what_it_generates(family: str, cache: dict[str, Any]) -> None:
    if family == "gemma3" and "cache_implementation" in cache and transformers.__version__.startswith("4.56."):
        pytest.skip("static sliding layers of transformers 4.56 take one token at a time when something is in them")
    torch.manual_seed(0)
    inputs: dict[str, Any] = FAMILIES[family].inputs()
    inputs["input_ids"][1, :2] = inputs["attention_mask"][1, :2] = 0
    how: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    bare: Any = tiny(family)
    expected = bare.generate(**inputs, **how)
    model = get_peft_model(tiny(family), config(family)).eval()
    assert torch.equal(model.generate(**inputs, **how, **cache), expected)


def test_one_layer_by_hand() -> None:
    """Counting a token g times is adding log g to its scores."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8).double()
    pk, pv = torch.randn(2, 2, 4, 3, 8).double()
    gates = torch.tensor([0.5, 2.0, 1e-7]).double()
    scores = q @ torch.cat([pk, k], dim=2).transpose(-1, -2) / 8**0.5
    exponentials = scores.exp()
    exponentials[..., :3] *= gates
    by_counting = (exponentials / exponentials.sum(-1, keepdim=True)) @ torch.cat([pv, v], dim=2)
    bias = torch.cat([gates.log(), torch.zeros(5).double()])
    by_adding = F.scaled_dot_product_attention(q, torch.cat([pk, k], dim=2), torch.cat([pv, v], dim=2), attn_mask=bias.expand(2, 4, 5, 8))
    torch.testing.assert_close(by_adding, by_counting)


@pytest.mark.parametrize("family", [name for name in ("llama", "gpt2", "bert-token-cls") if name in WITH_CACHE])
def test_gates_that_count_once_are_a_prefix_that_takes_no_positions(family: str) -> None:
    torch.manual_seed(0)
    kind = FAMILIES[family]
    gated = get_peft_model(kind.bare(), config(family)).eval()
    plain = get_peft_model(kind.bare(), PrefixTuningConfig(task_type=kind.task, num_virtual_tokens=8)).eval()
    one, other = (model.prompt_encoder["default"] for model in (gated, plain))
    with torch.no_grad():
        one.embedding.weight.copy_(other.embedding.weight)
        one.gate.fill_(-1.0)  # its size counts
        inputs = kind.inputs()
        mask = torch.cat([torch.ones(2, 8, dtype=torch.long), inputs["attention_mask"]], dim=1)
        given = {"input_ids": inputs["input_ids"], "attention_mask": mask, "position_ids": torch.arange(6).expand(2, 6)}
        expected = with_cache(kind.bare(), given, plain.get_prompt(2))
        torch.testing.assert_close(gated(**inputs).logits, expected, atol=1e-5, rtol=1e-4)


def with_cache(bare: Any, given: dict[str, Tensor], cache: Any) -> Tensor:
    if not hasattr(bare, "bert"):
        found: Tensor = bare(**given, past_key_values=cache).logits
        return found
    hidden = bare.bert(**given, past_key_values=cache)[0]
    return bare.classifier(hidden)


@pytest.mark.parametrize("family", [name for name in ("llama", "gpt2", "gemma3", "bert-token-cls", "t5") if name in WITH_CACHE])
def test_it_learns_from_the_first_step_on(family: str) -> None:
    torch.manual_seed(0)
    kind = FAMILIES[family]
    model = get_peft_model(kind.bare(), config(family))
    batch = {**kind.inputs(), **kind.labels()}
    gate = model.prompt_encoder["default"].gate
    optimiser = torch.optim.Adam([p for n, p in model.named_parameters() if p.requires_grad and "prompt_encoder" in n], lr=0.05)
    losses: list[float] = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        if not losses:
            assert gate.grad.abs().max() > 1e-4
        losses.append(float(loss.detach()))
        optimiser.step()
    assert losses[-1] < losses[0] - 0.02


def test_the_gradient_of_a_gate_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny("gpt2").double(), config("gpt2")).double()
    gate = model.prompt_encoder["default"].gate
    inputs = FAMILIES["gpt2"].inputs()

    def loss() -> Tensor:
        return model(**inputs).logits.logsumexp(-1).mean()

    with torch.no_grad():
        gate.copy_(torch.linspace(0.01, 0.5, 8))
    loss().backward()
    step = 1e-6
    for number in (0, 5):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                gate[number] += sign * step
                sides.append(float(loss()))
                gate[number] -= sign * step
        assert float(gate.grad[number]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4)


def test_rows_with_and_without_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny("gpt2"), config("gpt2")).eval()
    randomise(model, "default", 3)
    model.add_adapter("plain", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    inputs = FAMILIES["gpt2"].inputs(3)
    with torch.no_grad():
        together = model(**inputs, adapter_names=["plain", "default", "__base__"]).logits
        for row, name in enumerate(["plain", "default", "__base__"]):
            with model.use_adapters(*([] if name == "__base__" else [name])):
                torch.testing.assert_close(together[row], model(**inputs).logits[row], atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("gpt2"), tmp_path)
    with torch.no_grad():
        model.set_adapter("default")
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_under_checkpointing() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny(), config("llama")).train()
    batch = {**FAMILIES["llama"].inputs(), **FAMILIES["llama"].labels()}
    gate = model.prompt_encoder["default"].gate
    model(**batch).loss.backward()
    expected = gate.grad.clone()
    gate.grad = None
    base: Any = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    model(**batch).loss.backward()
    torch.testing.assert_close(gate.grad, expected)


def test_what_is_refused() -> None:
    model = get_peft_model(tiny("bart"), config("bart"))
    with pytest.raises(CapabilityError, match="numbers its tokens by what is in the cache"):
        model(**FAMILIES["bart"].inputs())
    if OLD:
        model = get_peft_model(tiny("bert-token-cls"), config("bert-token-cls"))
        with pytest.raises(CapabilityError, match="under transformers 4"):
            model(**FAMILIES["bert-token-cls"].inputs())
    model = get_peft_model(tiny(), config("llama"))
    base: Any = model.get_base_model()
    base.config._attn_implementation = "flex_attention"
    with pytest.raises(CapabilityError, match="can't weigh keys"):
        model(**FAMILIES["llama"].inputs())
