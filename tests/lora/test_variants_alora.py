"""aLoRA: the adapter acts from the last invocation on, and everything before it is the base's, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import Call, ConfigError, MergeError, PeftModel, PeftWarning, Route, RoutingError, get_peft_model, inject_adapter_in_model
from peft_core.testing import tiny
from peft_lora import LoraConfig, LoraLayer

pytestmark = pytest.mark.filterwarnings("ignore:lora_bias=True, and")  # nothing is merged where the base has no bias

TOKENS = [5, 6]
#: rows with an invocation in the middle, without one, with two, and with one that is cut off at the end
IDS = torch.tensor([[1, 5, 6, 2, 5, 6, 3], [4, 4, 4, 4, 4, 4, 4], [5, 6, 1, 1, 1, 1, 5], [9, 9, 9, 5, 6, 9, 5]])
STARTS = [4, 7, 0, 3]


def adapter(**fields: Any) -> LoraConfig:
    settings = {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
        "alora_invocation_tokens": TOKENS,
        **fields,
    }
    return LoraConfig(**settings)


def made(base: str = "llama", seed: int = 1, **fields: Any) -> PeftModel:
    model = tiny(base)
    torch.manual_seed(seed)
    return get_peft_model(model, adapter(**fields)).eval()


def logits(model: nn.Module, ids: Tensor = IDS, **arguments: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **arguments).logits
    return found


def layer_of(model: nn.Module) -> LoraLayer:
    return next(module for module in model.modules() if isinstance(module, LoraLayer))


def inputs_and_outputs(model: nn.Module, **arguments: Any) -> list[tuple[LoraLayer, Tensor, Tensor]]:
    """Return what each adapter layer saw and returned in a call."""
    seen: list[tuple[LoraLayer, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda layer, args, output: seen.append((layer, args[0].clone(), output.clone())))
        for module in model.modules()
        if isinstance(module, LoraLayer)
    ]
    with torch.no_grad():
        model(**arguments)
    for hook in hooks:
        hook.remove()
    return seen


# ---- where it acts -----------------------------------------------------------------------------------------------------
def test_each_layer_adds_its_delta_from_the_invocation_on() -> None:
    model = made()
    seen = inputs_and_outputs(model, input_ids=IDS)
    assert len(seen) == 6
    for layer, x, y in seen:
        a, b = layer.factors("default")
        plain = layer.get_base_layer()(x)
        for row, start in enumerate(STARTS):
            assert torch.equal(y[row, :start], plain[row, :start])
            expected = plain[row, start:] + layer.scaling["default"] * x[row, start:] @ a.T @ b.T
            torch.testing.assert_close(y[row, start:], expected, rtol=1e-5, atol=1e-5)


def test_before_the_invocation_the_model_is_the_base() -> None:
    found, base = logits(made()), logits(tiny())
    for row, start in enumerate(STARTS):
        assert torch.equal(found[row, :start], base[row, :start])
        assert start == 7 or (found[row, start:] != base[row, start:]).any(-1).all()


def test_keys_and_values_of_the_base_can_be_used_before_the_invocation() -> None:
    model, row = made(), IDS[:1]
    with torch.no_grad():
        cache = tiny()(input_ids=row[:, :4], use_cache=True).past_key_values
        found = model(input_ids=row[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(found, logits(model, row)[:, 4:])


def test_layers_inside_a_longer_sequence_count_from_its_end() -> None:
    model = made()
    layer = layer_of(model)
    x = torch.randn(4, 9, 32)  # two virtual tokens before the text, say
    call = Call("CAUSAL_LM", {"input_ids": IDS}, Route(("default",)), 4, IDS.device)
    route = next(iter(model._peft_index.call_tuners)).prepare(call).route
    with torch.no_grad(), layer.selection.use(route):
        changed = (layer(x) != layer.get_base_layer()(x)).any(-1)
    for row, start in enumerate(STARTS):
        assert changed[row].tolist() == [place >= start + 2 for place in range(9)] if start < 7 else not changed[row].any()


@pytest.mark.parametrize(
    ("ids", "tokens", "offset"),
    [
        ([1, 5, 6, 2, 5, 6, 3], [5, 6], 3),
        ([5, 6, 1, 1, 1, 1, 5], [5, 6], 7),
        ([5, 5, 5, 5], [5, 5], 2),
        ([5], [5], 1),
        ([1, 2, 3], [5], 0),
        ([5, 6], [5, 6, 7], 0),
        ([5, 6, 7], [5, 6, 7], 3),
    ],
)
def test_the_last_occurrence_is_found(ids: list[int], tokens: list[int], offset: int) -> None:
    from peft_lora.variants.alora import last_invocation

    assert last_invocation(torch.tensor([ids, ids]), tokens).tolist() == [offset, offset]


def test_given_offsets_count_instead_of_the_text() -> None:
    model = made()
    assert torch.equal(logits(model, alora_offsets=[3, None, 7, 4]), logits(model))
    assert torch.equal(logits(model, alora_offsets=[None] * 4), logits(tiny()))
    beyond = logits(model, alora_offsets=[99, 0, 99, 99])
    assert (beyond[[0, 2, 3]] != logits(tiny())[[0, 2, 3]]).any(-1).all()
    with torch.no_grad():
        embedded = tiny().get_input_embeddings()(IDS)
        found = model(inputs_embeds=embedded, alora_offsets=torch.tensor([3, 0, 7, 4])).logits
    torch.testing.assert_close(found, logits(model))


@pytest.mark.parametrize(
    ("given", "message"), [([1, 2, 3], "3 entries, but the batch has 4 rows"), ([1, -1, 2, 3], "no list of offsets"), ("x", "no list")]
)
def test_offsets_that_can_not_be_used(given: Any, message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        logits(made(), alora_offsets=given)


def test_without_ids_the_adapter_is_off_and_says_so() -> None:
    model = made()
    with torch.no_grad(), pytest.warns(PeftWarning, match="no input_ids in which the invocation tokens of default"):
        found = model(inputs_embeds=tiny().get_input_embeddings()(IDS)).logits
    assert torch.equal(found, logits(tiny()))


# ---- several adapters --------------------------------------------------------------------------------------------------
def several() -> PeftModel:
    model = made()
    torch.manual_seed(2)
    model.add_adapter("other", adapter(alora_invocation_tokens=[9]))
    model.add_adapter("plain", adapter(alora_invocation_tokens=None))
    return model


def test_rows_have_adapters_and_invocations_of_their_own() -> None:
    model = several()
    found = logits(model, adapter_names=["default", "__base__", "plain", "other"])
    for row, name in enumerate(["default", None, "plain", "other"]):
        with model.use_adapters(*([name] if name else [])):
            torch.testing.assert_close(found[row], logits(model)[row])
    assert torch.equal(found[0, :4], logits(tiny())[0, :4])
    assert (found[3] != logits(tiny())[3]).any(), "its invocation stands at the beginning"


def test_two_in_use_act_each_from_its_own_invocation_on() -> None:
    model = several()
    model.set_adapter(["default", "other"])
    ids = torch.tensor([[1, 9, 1, 5, 6, 1]])
    for layer, x, y in inputs_and_outputs(model, input_ids=ids):
        expected = layer.get_base_layer()(x)
        for name, start in (("default", 3), ("other", 1)):
            a, b = layer.factors(name)
            if name == "other":  # the last 9 stands at 1
                assert torch.equal(y[0, :1], expected[0, :1])
            expected[0, start:] += layer.scaling[name] * x[0, start:] @ a.T @ b.T
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_only_models_with_such_an_adapter_pay_for_the_search() -> None:
    model = made(alora_invocation_tokens=None)
    assert not model._peft_index.call_tuners
    assert torch.equal(logits(model, alora_offsets=[1, 2, 3, 4]), logits(model)), "a plain adapter does not mind"
    assert model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=1, alora_offsets=[1, 2, 3, 4]).shape == (4, 8)
    model.add_adapter("invoked", adapter())
    assert model._peft_index.call_tuners
    model.delete_adapter("invoked")
    assert not model._peft_index.call_tuners


# ---- generate ----------------------------------------------------------------------------------------------------------
def by_hand(model: PeftModel, steps: int, **arguments: Any) -> Tensor:
    ids = IDS
    for step in range(steps):
        offsets = [None if start == 7 else 7 - start + step for start in STARTS]
        ids = torch.cat([ids, logits(model, ids, alora_offsets=offsets, **arguments)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_is_a_loop_with_growing_offsets(use_cache: bool) -> None:
    model = made()
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
    expected = by_hand(model, 6)
    assert torch.equal(model.generate(input_ids=IDS, **options), expected)
    assert torch.equal(model.generate(input_ids=IDS, alora_offsets=[3, None, 7, 4], **options), expected)
    assert not torch.equal(tiny().generate(input_ids=IDS, **options), expected)


def test_beams_follow_the_offset_of_their_row() -> None:
    model = made()
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)
    given = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), alora_offsets=[3, None, 7, 4], **options)
    assert torch.equal(found, given)
    for row in range(4):
        alone = model.generate(input_ids=IDS[row : row + 1], attention_mask=torch.ones(1, 7, dtype=torch.long), **options)
        assert torch.equal(found[row, : alone.shape[1]], alone[0])
    assert torch.equal(found[1], tiny().generate(input_ids=IDS[1:2], attention_mask=torch.ones(1, 7, dtype=torch.long), **options)[0])


def test_generate_with_an_adapter_for_each_row() -> None:
    model = several()
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    names = ["default", "__base__", "plain", "default"]
    found = model.generate(input_ids=IDS, adapter_names=names, **options)
    for row, name in enumerate(names):
        with model.use_adapters(*([] if name == "__base__" else [name])):
            assert torch.equal(found[row], model.generate(input_ids=IDS, **options)[row])


def test_two_calls_of_generate_do_not_know_of_each_other() -> None:
    model = made()
    options = {"max_new_tokens": 4, "do_sample": False}
    first = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)
    model.generate(input_ids=IDS[:2, :3], attention_mask=torch.ones(2, 3, dtype=torch.long), **options)
    assert torch.equal(model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options), first)
    assert not model._peft_index.selection.current().context


def test_generating_from_embeddings_needs_offsets() -> None:
    model = made()
    embedded = tiny().get_input_embeddings()(IDS).detach()
    options = {"inputs_embeds": embedded, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    expected = by_hand(model, 4)[:, 7:]
    assert torch.equal(model.generate(alora_offsets=[3, None, 7, 4], **options), expected)
    with pytest.warns(PeftWarning, match="no input_ids"):
        found = model.generate(**options)
    assert torch.equal(found, tiny().generate(**options))


# ---- tasks, layers, training -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("base", "task"), [("bert-token-cls", "TOKEN_CLS"), ("bert-qa", "QUESTION_ANS"), ("bert", "FEATURE_EXTRACTION"), ("bert", None)]
)
def test_any_task(base: str, task: str | None) -> None:
    model = made(base, target_modules=["query", "value"], task_type=task)
    seen = inputs_and_outputs(model, input_ids=IDS)
    assert len(seen) == 4
    for layer, x, y in seen:
        changed = (y != layer.get_base_layer()(x)).any(-1)
        assert changed.tolist() == [[place >= start for place in range(7)] for start in STARTS]


class Flat(nn.Module):
    """Token by token, as mixtures of experts see them: (rows · tokens, features)."""

    def __init__(self, tokens: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.expert = nn.Linear(6, 5)
        self.tokens = tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        rows, length = input_ids.shape
        flat = self.embed(input_ids).flatten(0, 1)
        found: Tensor = self.expert(flat if self.tokens is None else flat[: self.tokens])
        return found.view(rows, length, 5) if self.tokens is None else found


def test_flattened_tokens_are_told_apart() -> None:
    torch.manual_seed(3)
    model = get_peft_model(Flat(), adapter(target_modules=["expert"], task_type=None)).eval()
    with model.disable_adapter():
        plain = model(input_ids=IDS)
    changed = (model(input_ids=IDS) != plain).any(-1)
    assert changed.tolist() == [[place >= start for place in range(7)] for start in STARTS]
    mixed = model(input_ids=IDS, adapter_names=["default", "default", "__base__", "default"])
    assert torch.equal(mixed[2], plain[2])
    torch.testing.assert_close(mixed[[0, 1, 3]], model(input_ids=IDS)[[0, 1, 3]])


def test_flattened_tokens_of_a_later_step() -> None:
    model = get_peft_model(Flat(), adapter(target_modules=["expert"], task_type=None)).eval()
    tuner, layer = model._peft_index.call_tuners[0], layer_of(model)
    first = tuner.prepare(Call(None, {"input_ids": IDS}, Route(("default",)), 4, IDS.device, generating=True))
    longer = torch.cat([IDS, IDS[:, :1]], 1)
    second = tuner.prepare(Call(None, {"input_ids": longer}, first.route, 4, IDS.device, generating=True))
    for tokens in (1, 8):
        x = torch.randn(4 * tokens, 6)
        with torch.no_grad(), layer.selection.use(second.route):
            changed = (layer(x) != layer.get_base_layer()(x)).any(-1).view(4, tokens)
        for row, start in enumerate(STARTS):
            assert changed[row].tolist() == [start < 7 and place >= start for place in range(8 - tokens, 8)]


@pytest.mark.parametrize("tokens", [4, 5, 13])
def test_some_of_the_tokens_are_refused(tokens: int) -> None:
    model = get_peft_model(Flat(tokens), adapter(target_modules=["expert"], task_type=None))
    with pytest.raises(RoutingError, match=r"'expert' sees an input .* which does not tell which tokens of the 4 rows"):
        model(input_ids=IDS)


def test_gradients_come_from_the_tokens_it_acts_on() -> None:
    torch.manual_seed(3)
    base = Flat().double()
    model = get_peft_model(base, adapter(target_modules=["expert"], task_type=None, lora_alpha=3)).train()
    layer = layer_of(model)
    a, b = layer.factors("default")
    (model(input_ids=IDS) ** 2).sum().backward()
    found = a.grad.clone(), b.grad.clone()
    x = base.embed(IDS).detach()
    mask = torch.tensor([[float(place >= start) for place in range(7)] for start in STARTS], dtype=torch.float64)
    copies = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    expected = layer.get_base_layer()(x) + mask[..., None] * 3 / 4 * (x @ copies[0].T @ copies[1].T)
    (expected**2).sum().backward()
    for gradient, copied in zip(found, copies, strict=True):
        torch.testing.assert_close(gradient, copied.grad, rtol=1e-11, atol=1e-11)


def test_the_bias_of_b_acts_there_only() -> None:
    model = made(lora_bias=True)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.lora_B["default"].bias.fill_(0.5)
    found, base = logits(model), logits(tiny())
    for row, start in enumerate(STARTS):
        assert torch.equal(found[row, :start], base[row, :start])
    layer, x, y = inputs_and_outputs(model, input_ids=IDS)[0]
    a, b = layer.factors("default")
    s = layer.scaling["default"]
    torch.testing.assert_close(y[2], layer.get_base_layer()(x[2]) + s * (x[2] @ a.T @ b.T + 0.5), rtol=1e-5, atol=1e-5)


def test_it_can_not_be_merged() -> None:
    model = made()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for action in (model.merge_adapter, model.merge_and_unload, lambda: layer_of(model).delta_weight("default")):
        with pytest.raises(MergeError, match="acts on some tokens only"):
            action()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not layer_of(model).merged


def test_the_delta_of_the_tokens_on_which_it_acts() -> None:
    layer = layer_of(made())
    a, b = layer.factors("default")
    torch.testing.assert_close(layer.get_delta_weight("default"), layer.ops.to_weight_layout(layer.scaling["default"] * b @ a))


def test_encoder_decoders_are_refused() -> None:
    base = tiny("t5")
    with pytest.raises(ConfigError, match="does not work on the encoder-decoder model T5"):
        get_peft_model(base, adapter(target_modules=["q"], task_type=None))
    assert not any(isinstance(module, LoraLayer) for module in base.modules())


def test_a_call_past_the_peft_model_is_refused() -> None:
    model = made()
    with pytest.raises(RoutingError, match="nobody has looked for the invocation tokens"):
        model.get_base_model()(input_ids=IDS)
    injected = inject_adapter_in_model(adapter(), tiny())
    with pytest.raises(RoutingError, match="call the PeftModel"):
        injected(input_ids=IDS)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_find_the_invocation_again(reentrant: bool) -> None:
    model = made().train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected = gradients()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.get_base_model().enable_input_require_grads()
    found = gradients()
    assert found.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("tokens", ["5", [-1], [5.0]])
def test_an_invocation_is_a_list_of_token_ids(tokens: Any) -> None:
    with pytest.raises(ConfigError, match="is no list of token ids"):
        made(alora_invocation_tokens=tokens)


def test_copies_and_files_keep_it(tmp_path: Any) -> None:
    model = made()
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path)), expected)
