"""Context-aware prompt tuning: the formulas of the method, worked slowly in float64, and what a call does with labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_core import CapabilityError, ConfigError, PeftModel, RoutingError, get_peft_config, get_peft_model, get_peft_model_state_dict
from peft_core.testing import tiny

CONTEXT = [5, 6, 7, 8, 9, 10, 11, 12]
TYPES = [1, 2, 3, 4, 5, 6, 7, 8]
PLAIN: dict[str, Any] = {"peft_type": "CPT", "task_type": "CAUSAL_LM", "cpt_token_ids": CONTEXT, "cpt_tokens_type_mask": TYPES}
DECAY: dict[str, Any] = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}
TEXT = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 6]])


def made(name: str = "default", base: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny(base), get_peft_config({**PLAIN, **changes}), name).eval()


def expected_loss(logits: Tensor, labels: Tensor, types: Tensor | None = None, config: dict[str, Any] | None = None) -> float:
    """The loss of rows with a context, position by position."""
    config = {**PLAIN, **(config or {})}
    context, kinds = config["cpt_token_ids"], config["cpt_tokens_type_mask"]
    shift = math.ceil(max(kinds) / 4) * 4
    total, count = 0.0, 0
    for row in range(len(labels)):
        own = [4] * labels.shape[1] if types is None else types[row].tolist()
        all_types = [*kinds, *(t + shift if t else 0 for t in own)]
        all_labels = [*context, *labels[row].tolist()]
        occurring = sorted({t for t in all_types[1:] if t and t % 4 == 0}, reverse=True)
        for place in range(1, len(all_labels)):
            t, label = all_types[place], all_labels[place]
            if not t or t % 4 or label == -100:
                continue
            weight = config["opt_loss_decay_factor"] ** occurring.index(t) if config.get("opt_weighted_loss_type") == "decay" else 1.0
            total += weight * -float(logits[row, place - 1].double().log_softmax(0)[label])
            count += 1
    return total / count


def test_worked_weights() -> None:
    """Kinds [1..8] + [1, 2, 3, 4], γ = 0.5: the labels of types 4, 8 and 12 weigh 0.25, 0.5 and 1."""
    from peft_prompt.cpt_loss import label_weights, shifted_types

    types = torch.tensor([[*TYPES, *shifted_types(torch.tensor([1, 2, 3, 4]), 8).tolist()]])
    assert types[0, -4:].tolist() == [9, 10, 11, 12]
    weights = label_weights(types, 0.5)[0]
    assert {int(t): float(w) for t, w in zip(types[0], weights, strict=True) if t % 4 == 0} == {4: 0.25, 8: 0.5, 12: 1.0}


@pytest.mark.parametrize(("highest", "first"), [(4, 8), (6, 12), (8, 12), (1, 8), (0, 4)])
def test_labels_stay_labels(highest: int, first: int) -> None:
    """A context whose types end on 6: labels (4) become 12, not 10, which is no label."""
    from peft_prompt.cpt_loss import shifted_types

    assert shifted_types(torch.tensor([0, 4]), highest).tolist() == [0, first]


@pytest.mark.parametrize(
    "options",
    [{}, DECAY, {**DECAY, "cpt_tokens_type_mask": [4, 2, 3, 4, 0, 6, 7, 6]}, {**DECAY, "cpt_tokens_type_mask": [8, 2, 3, 4, 1, 2, 3, 4]}],
    ids=["plain", "decay", "ends on 6", "begins with a label"],
)
@pytest.mark.parametrize("types", [None, [[1, 2, 3, 4], [1, 2, 3, 4]], [[1, 4, 8, 8], [0, 2, 4, 4]]], ids=["labels", "pairs", "several"])
@pytest.mark.parametrize("ignored", [False, True])
def test_the_loss(options: dict[str, Any], types: Any, ignored: bool) -> None:
    model = made(**options)
    labels = TEXT.clone()
    if ignored:
        labels[0] = -100
    given = {} if types is None else {"input_type_mask": torch.tensor(types)}
    copies = {name: value.clone() for name, value in {"labels": labels, **given}.items()}
    with torch.no_grad():
        logits = model(input_ids=TEXT).logits
        found = model(input_ids=TEXT, labels=labels, **given)
    assert torch.equal(found.logits, logits)
    assert found.logits.shape[1] == len(CONTEXT) + 4
    expected = expected_loss(logits, labels, given.get("input_type_mask"), options)
    assert abs(float(found.loss) - expected) <= 1e-6 * expected
    for name, value in {"labels": labels, **given}.items():
        assert torch.equal(value, copies[name]), f"{name} was changed"


def test_the_adapter_in_use_says_how(tmp_path: Path) -> None:
    """Whatever its name is, and whichever else there is."""
    model = made("german", **DECAY)
    model.add_adapter("plain", get_peft_config(PLAIN))
    for name, options in (("german", DECAY), ("plain", {})):
        model.set_adapter(name)
        with torch.no_grad():
            found = model(input_ids=TEXT, labels=TEXT)
        expected = expected_loss(found.logits, TEXT, None, options)
        assert abs(float(found.loss) - expected) <= 1e-6 * expected


def test_outputs_of_all_kinds() -> None:
    model = made()
    with torch.no_grad():
        found = model(input_ids=TEXT, labels=TEXT)
        pair = model(input_ids=TEXT, labels=TEXT, return_dict=False)
    assert next(iter(found)) == "loss"
    assert torch.equal(found[0], found.loss)
    assert found.to_tuple()[0] is found.loss
    assert type(found).__name__ == "CausalLMOutputWithPast"
    torch.testing.assert_close(pair[:2], (found.loss, found.logits), rtol=0, atol=1e-5)
    with torch.no_grad():
        assert model(input_ids=TEXT).loss is None


def test_no_label_at_all() -> None:
    model = made(cpt_tokens_type_mask=[1, 2, 3, 2, 1, 2, 3, 2])
    with pytest.raises(RoutingError, match="no label counts in the loss of 'default'"):
        model(input_ids=TEXT, labels=torch.full_like(TEXT, -100))
    with pytest.raises(RoutingError, match="no label counts"):
        model(input_ids=TEXT, labels=TEXT, input_type_mask=torch.ones_like(TEXT))
    with pytest.raises(RoutingError, match=r"input_type_mask is \(2, 3\), but the labels are \(2, 4\)"):
        model(input_ids=TEXT, labels=TEXT, input_type_mask=TEXT[:, :3])
    with pytest.raises(RoutingError, match="logits for 1 tokens, but the loss of CPT needs those of all 12"):
        model(input_ids=TEXT, labels=TEXT, logits_to_keep=1)


@pytest.mark.parametrize("order", ["context first", "prompt first"])
def test_rows_of_other_adapters(order: str) -> None:
    """The mean over all positions that count: of a row with a context as alone, of others each label with weight 1."""
    other = get_peft_config({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2})
    if order == "context first":
        model = made("context", **DECAY)
        model.add_adapter("prompt", other)
    else:
        torch.manual_seed(0)
        model = get_peft_model(tiny("llama"), other, "prompt").eval()
        model.add_adapter("context", get_peft_config({**PLAIN, **DECAY}))
    text, names = torch.cat([TEXT, TEXT[:1]]), ["__base__", "context", "prompt"]
    with torch.no_grad():
        found = float(model(input_ids=text, labels=text, adapter_names=names).loss)
        with model.use_adapters("context"):
            alone = model(input_ids=text[1:2]).logits
        context = expected_loss(alone, text[1:2], None, DECAY)
        bare: Any = tiny("llama")
        base = float(bare(input_ids=text[:1], labels=text[:1]).loss)
        with model.use_adapters("prompt"):
            prompt = float(model(input_ids=text[2:], labels=text[2:]).loss)
    counts = (3, 2 + 4, 4)  # the base's first token is predicted by nothing, that of a prompt's row by its prompt
    expected = (base * counts[0] + context * counts[1] + prompt * counts[2]) / sum(counts)
    assert abs(found - expected) <= 1e-5 * expected


# ---- the context -------------------------------------------------------------------------------------------------------
def test_worked_radius() -> None:
    from peft_prompt.cpt_loss import radii

    found = radii(torch.tensor([0, 1, 2, 3, 4, 5, 6, 8]), 0.1, 0.2, 16)
    assert [round(float(value), 6) for value in found] == [0.0, 0.017678, 0.008839, 0.017678, 0.0, 0.017678, 0.008839, 0.0]
    assert float(found[0]) == float(found[4]) == float(found[7]) == 1e-10


def test_projection_before_each_use() -> None:
    model = made(opt_projection_epsilon=0.3, opt_projection_format_epsilon=0.2)
    encoder = model.prompt_encoder["default"]
    delta = encoder.delta_embedding.weight
    base: Any = tiny("llama")
    center = base.get_input_embeddings()(torch.tensor(CONTEXT)).detach()
    assert torch.equal(encoder.embedding.weight, center)
    assert not delta.any()
    with torch.no_grad():
        delta.normal_()
        delta[0].mul_(1e-4)  # inside its ball already
    before = delta.detach().double()
    with torch.no_grad():
        model(input_ids=TEXT)
    for row, kind in enumerate(TYPES):
        radius = {0: 1e-10, 1: 0.2, 2: 0.3, 3: 0.2}[kind % 4] * (math.sqrt(32 / 2048) if kind % 4 else 1)
        norm = math.sqrt(sum(float(value) ** 2 for value in before[row]))
        expected = before[row] * min(1.0, radius / norm)
        torch.testing.assert_close(delta[row].double(), expected, rtol=1e-6, atol=1e-12)
        assert float(delta[row].detach().double().norm()) <= radius
    inside = delta.detach().clone()
    assert torch.equal(inside[0], before[0].float())
    encoder.train().eval()  # nothing is kept
    with torch.no_grad():
        words = base.get_input_embeddings()(TEXT)
        expected_logits = base(inputs_embeds=torch.cat([(center + inside).expand(2, -1, -1), words], dim=1)).logits
        torch.testing.assert_close(model(input_ids=TEXT).logits, expected_logits, rtol=0, atol=1e-5)
    assert torch.equal(delta, inside), "a second projection moves it again"
    torch.testing.assert_close(get_peft_model_state_dict(model)["prompt_embeddings"], center + inside, rtol=0, atol=0)


def test_labels_do_not_move() -> None:
    model = made(cpt_tokens_type_mask=[1, 2, 3, 4, 0, 6, 7, 8])
    model.train()
    model(input_ids=TEXT, labels=TEXT).loss.backward()
    grad = model.prompt_encoder["default"].delta_embedding.weight.grad
    assert [bool(row.any()) for row in grad] == [True, True, True, False, False, True, True, False]
    # where it is not zero, it is the gradient of the prompt
    prompt = (model.prompt_encoder["default"].embedding.weight).clone().requires_grad_()
    bare: Any = tiny("llama")
    logits = bare(inputs_embeds=torch.cat([prompt.expand(2, -1, -1), bare.get_input_embeddings()(TEXT)], dim=1)).logits
    full = torch.cat([torch.tensor(CONTEXT).expand(2, -1), TEXT], dim=1)
    full[:, [0, 1, 2, 4, 5, 6]] = -100
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), full[:, 1:].flatten()).backward()
    for row in (0, 1, 2, 5, 6):
        torch.testing.assert_close(grad[row], prompt.grad[row], rtol=1e-4, atol=1e-6)


def test_two_uses_before_one_backward_pass() -> None:
    model = made()
    model.train()
    first, second = (model(input_ids=TEXT, labels=TEXT).loss for _ in range(2))
    (first + second).backward()
    assert model.prompt_encoder["default"].delta_embedding.weight.grad.any()


def test_the_file_and_the_balls_after_it(tmp_path: Path) -> None:
    model = made(opt_projection_epsilon=0.3)
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        encoder.delta_embedding.weight.normal_()
        expected = model(input_ids=TEXT).logits
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=TEXT).logits, expected)
    assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, encoder.embedding.weight), "the balls have moved"
    frozen: Any = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_generate_and_bases() -> None:
    model = made()
    found = model.generate(input_ids=TEXT, attention_mask=torch.ones_like(TEXT), max_new_tokens=3, do_sample=False)
    assert found.shape == (2, 7)
    assert torch.equal(found[:, :4], TEXT)
    with pytest.raises(CapabilityError, match="has an encoder"):
        made(base="bart")
    with pytest.raises(ConfigError, match="cpt_token_ids has the token 64, but LlamaForCausalLM has 64"):
        made(cpt_token_ids=[64], cpt_tokens_type_mask=[1])


def test_configs() -> None:
    usual: Any = get_peft_config({"peft_type": "CPT", "task_type": "CAUSAL_LM"})
    assert (usual.cpt_token_ids, usual.cpt_mask, usual.cpt_tokens_type_mask) == ([0], [1], [1])
    found: Any = get_peft_config(PLAIN)
    assert (found.num_virtual_tokens, found.num_transformer_submodules, found.cpt_mask) == (8, 1, [1] * 8)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"task_type": "SEQ_2_SEQ_LM"}, "CPT is for task_type='CAUSAL_LM', not 'SEQ_2_SEQ_LM'"),
        ({"task_type": None}, "CPT is for task_type='CAUSAL_LM', not None"),
        ({"cpt_mask": [1]}, "must have the same length.*cpt_mask has 1, cpt_token_ids 8"),
        ({"cpt_tokens_type_mask": [1, 2]}, "cpt_tokens_type_mask has 2"),
        ({"cpt_token_ids": []}, "at least 1"),
        ({"cpt_token_ids": [1, -2]}, "is not a list of non-negative integers"),
        ({"opt_weighted_loss_type": "decays"}, "did you mean 'decay'"),
        ({"opt_projection_epsilon": -1.0}, "can't be below 0"),
    ]
    for changes, message in wrong:
        with pytest.raises(ConfigError, match=message):
            get_peft_config({**PLAIN, **changes})
