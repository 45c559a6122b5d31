"""§4: virtual tokens: dimensions, what a call becomes, keys and values, encoder-decoder models, generation, CPT."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from page import by_hand
from page.making import (
    EMBEDDINGS,
    IDS,
    PROMPTS,
    TASK_IDS,
    N,
    config,
    fresh,
    get_peft_model,
    inputs,
    made,
    over,
    refused,
    run,
    same,
    tiny,
    warned,
)

PREFIXES = ("prefix", "prefix-projection")
SINGLE = ("prompt", "p-tuning", "multitask")  # for all classes
DECODERS = ("llama", "gpt2")
BEGIN = torch.ones(2, N, dtype=torch.long)


def _seen(model: Any, base: str = "llama", kind: str = "prompt", **more: Any) -> dict[str, Any]:
    """Return the keywords that the base gets in a call."""
    found: dict[str, Any] = {}
    handle = model.get_base_model().register_forward_pre_hook(lambda module, args, kwargs: found.update(kwargs), with_kwargs=True)
    model.train()  # nothing is kept from call to call
    model(**{**inputs(base, kind), **more})
    handle.remove()
    model.eval()
    return found


# ---- 4.1 set-up ------------------------------------------------------------------------------------------------------
def submodules_are_two_for_encoder_decoders() -> None:
    for base, expected in (("t5", 2), ("bart", 2), ("llama", 1), ("bert-seq-cls", 1)):
        for kind in ("prompt", "prefix"):
            assert fresh(kind, base).peft_config["default"].num_transformer_submodules == expected


class _Words(nn.Module):
    def __init__(self, **names: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**names)
        self.words = nn.Embedding(8, 16)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, past_key_values: Any = None, attention_mask: Any = None) -> Tensor:
        found: Tensor = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        return found


NAMES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


def dimensions_are_read_from(field: str) -> Any:
    """Return a check that a dimension is read from each of its names in a base's config, also when an adapter is added later."""

    def dimension_is_read() -> None:
        values = {"num_layers": 3, "token_dim": 16, "num_attention_heads": 4}
        for name in NAMES[field]:
            others = {NAMES[other][0]: value for other, value in values.items() if other != field}
            for kind in ("prompt", "prefix"):
                model = get_peft_model(_Words(**others, **{name: values[field]}), config(kind, task_type=None))
                assert getattr(model.peft_config["default"], field) == values[field]
                model.add_adapter("later", config(kind, task_type=None))
                assert getattr(model.peft_config["later"], field) == values[field]
            with refused(ValueError, f"Please specify `{field}` in `peft_config`"):
                get_peft_model(_Words(**others), config("prompt", task_type=None))

    return dimension_is_read


def dimensions_are_read_from_the_text_config() -> None:
    text = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 4}
    base = _Words()
    base.config.get_text_config = lambda **options: SimpleNamespace(**text)
    base.config.text_config = SimpleNamespace(**text)
    own = get_peft_model(base, config("prompt", task_type=None)).peft_config["default"]
    assert (own.num_layers, own.token_dim, own.num_attention_heads) == (3, 16, 4)


def hidden_size_of_the_encoder_is_the_width() -> None:
    for kind in ("prefix-projection", "p-tuning"):
        assert fresh(kind, "bert-seq-cls", encoder_hidden_size=None).peft_config["default"].encoder_hidden_size == 32


def shared_heads_give_the_width_of_prefixes(tmp_path: Any) -> None:
    import json

    model = fresh("prefix")  # hidden 32, 4 heads, 2 of keys and values
    own = model.peft_config["default"]
    assert (own.token_dim, own.num_attention_heads) == (16, 2)
    assert fresh("prompt").peft_config["default"].token_dim == 32
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["token_dim"], written["num_attention_heads"], written["num_layers"]) == (16, 2, 2)


def checkpointed_bases_work_with_prefixes() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = made("prefix").train()
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**inputs(), **by_hand.labels_of("llama")).loss.backward()
        gradients.append(next(p.grad for p in model.prompt_encoder.parameters()))
    assert same(*gradients)


def bases_without_a_config_are_refused() -> None:
    base = _Words()
    del base.config
    with refused(ValueError, "no config"):
        get_peft_model(base, config("prompt", task_type=None))


def a_number_of_tokens_must_be_given() -> None:
    for kind in ("prompt", "p-tuning", "prefix"):
        with refused(ValueError, "num_virtual_tokens"):
            fresh(kind, num_virtual_tokens=None)


# ---- 4.2 what a call becomes -----------------------------------------------------------------------------------------
@over(*PREFIXES)
def keys_and_values_are_a_cache(kind: str) -> None:
    model = made(kind)
    seen = _seen(model, kind=kind)
    assert torch.equal(seen["input_ids"], IDS)
    assert same(seen["past_key_values"].layers[0].keys[:, :, :N], model.get_prompt(2).layers[0].keys)


@over(*EMBEDDINGS)
def embeddings_stand_before_the_text(kind: str) -> None:
    for base in DECODERS:
        model = made(kind, base)
        words = model.get_base_model().get_input_embeddings()
        seen = _seen(model, base, kind)
        assert seen.get("input_ids") is None
        assert same(seen["inputs_embeds"], by_hand.before(by_hand.prompt_of(model, kind), words(IDS)))


def embeddings_have_the_dtype_of_the_words() -> None:
    base = tiny().bfloat16()
    model = get_peft_model(base, config("prompt"))
    assert _seen(model)["inputs_embeds"].dtype == torch.bfloat16
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


@over(*PROMPTS)
def masks_get_ones(kind: str) -> None:
    for base in ("llama", "bert-seq-cls") if kind != "cpt" else ("llama",):
        mask = torch.ones_like(IDS)
        mask[1, 4:] = 0
        seen = _seen(made(kind, base), base, kind, attention_mask=mask)["attention_mask"]
        assert seen.shape == (2, N + 6)
        if base != "bert-seq-cls" or kind == "prefix":
            assert torch.equal(seen, by_hand.before(BEGIN, mask))


@over(*PROMPTS[:3], "prefix")
def labels_are_padded_where_there_are_embeddings(kind: str) -> None:
    labels = by_hand.labels_of("llama")["labels"]
    seen = _seen(made(kind), kind=kind, labels=labels)["labels"]
    assert torch.equal(seen, labels if kind == "prefix" else by_hand.before(torch.full((2, N), by_hand.IGNORED), labels))


@over(*PROMPTS)
def logits_have_the_length_of_what_stood_there(kind: str) -> None:
    for base in DECODERS:
        assert run(made(kind, base), base, kind).shape[1] == IDS.shape[1] + (0 if kind == "prefix" else N)


@over("prompt", "p-tuning", "multitask", "prefix")
def positions_are_moved(kind: str) -> None:
    own = torch.arange(6).expand(2, 6) + torch.tensor([[0], [3]])
    for base in DECODERS:
        with warned(times=0):
            seen = _seen(made(kind, base), base, kind, position_ids=own)["position_ids"]
        moved = own + N
        assert torch.equal(seen, moved if kind == "prefix" else by_hand.before(torch.arange(N).expand(2, N), moved))


@over("prompt", "p-tuning", "multitask", "prefix")
def token_types_are_padded_or_passed_on(kind: str) -> None:
    types = torch.tensor([[0, 0, 1, 1, 1, 0]] * 2)
    for base in ("bert-seq-cls", "bert-token-cls", "bert-qa", "bert"):
        model = made(kind, base)
        seen = _seen(model, base, kind, token_type_ids=types)["token_type_ids"]
        assert torch.equal(seen, types if kind == "prefix" else by_hand.before(torch.zeros(2, N, dtype=torch.long), types))
        assert not same(run(model, base, kind, token_type_ids=types), run(model, base, kind))


@over(*PROMPTS)
def given_embeddings_are_used(kind: str) -> None:
    model = made(kind)
    embeds = model.get_base_model().get_input_embeddings()(IDS)
    tasks = {"task_ids": TASK_IDS} if kind == "multitask" else {}
    assert same(model(inputs_embeds=embeds, **tasks).logits, run(model, kind=kind))
    assert same(model(inputs_embeds=embeds[:1], **{name: value[:1] for name, value in tasks.items()}).logits[0], run(model, kind=kind)[0])


@over(*PROMPTS)
def without_an_adapter_the_base_is_called(kind: str) -> None:
    model = made(kind)
    with model.disable_adapter():
        assert torch.equal(run(model), run(tiny()))
    model.delete_adapter("default")
    assert torch.equal(run(model), run(tiny()))


def tasks_must_be_given() -> None:
    with refused(ValueError, "task_ids cannot be None"):
        run(made("multitask"))


# ---- 4.3 classification and questions behind keys and values ---------------------------------------------------------
def backbone_runs_behind_the_prefix(base: str) -> Any:
    """Return a check that a classifier is its backbone behind the prefix, then dropout and head, with the loss of its task."""

    def classifier_is_its_backbone_and_head() -> None:
        for kind in PREFIXES:
            model = made(kind, base)
            plain = by_hand.bare(model, base)
            with torch.no_grad():
                scores = by_hand.classified(plain, model.get_prompt(2), IDS, torch.ones_like(IDS))
            output, labels = model(**inputs(base), **by_hand.labels_of(base)), by_hand.labels_of(base)
            assert type(output) is type(plain(**inputs(base)))
            if base == "bert-qa":
                assert same(torch.stack([output.start_logits, output.end_logits], -1), scores)
                loss = sum(F.cross_entropy(scores[..., i], labels[f"{name}_positions"]) for i, name in enumerate(("start", "end"))) / 2
            else:
                assert same(output.logits, scores)
                loss = F.cross_entropy(scores.flatten(0, -2), labels["labels"].flatten())
            torch.testing.assert_close(output.loss, loss)
            assert isinstance(model(**inputs(base), return_dict=False), tuple)

    return classifier_is_its_backbone_and_head


def answers_outside_the_text_are_ignored() -> None:
    model = made("prefix", "bert-qa")
    positions = {"start_positions": torch.tensor([[1], [9]]), "end_positions": torch.tensor([[3], [9]])}
    output = model(**inputs("bert-qa"), **positions)
    expected = (F.cross_entropy(output.start_logits[:1], torch.tensor([1])) + F.cross_entropy(output.end_logits[:1], torch.tensor([3]))) / 2
    torch.testing.assert_close(output.loss, expected)


def bases_without_a_cache_are_refused() -> None:
    class NoCache(_Words):
        def forward(self, input_ids: Any = None, inputs_embeds: Any = None, attention_mask: Any = None) -> Any:  # type: ignore[override]
            return super().forward(input_ids, inputs_embeds)

    base = NoCache(num_hidden_layers=2, hidden_size=16, num_attention_heads=4)
    with refused(ValueError, "past.key.values"):
        get_peft_model(base, config("prefix", task_type=None))(input_ids=IDS % 8)


def features_get_what_the_base_takes() -> None:
    for kind in ("prefix", *SINGLE):
        model = made(kind, "bert")
        assert run(model, "bert", kind).shape[1] == IDS.shape[1] + (0 if kind == "prefix" else N)


@over(*SINGLE)
def outputs_per_token_are_those_of_the_text(kind: str) -> None:
    for base, names in (("bert-token-cls", ["logits"]), ("bert-qa", ["start_logits", "end_logits"])):
        output = made(kind, base)(**inputs(base, kind))
        assert [output[name].shape[1] for name in names] == [IDS.shape[1]] * len(names)


# ---- 4.4 encoder-decoder models --------------------------------------------------------------------------------------
def prefixes_stand_in_the_decoder() -> None:
    from transformers import EncoderDecoderCache

    for base in ("t5", "bart"):
        model = made("prefix", base)
        seen = _seen(model, base, decoder_attention_mask=torch.ones(2, 4, dtype=torch.long))
        cache: Any = model.get_prompt(2)
        assert isinstance(cache, EncoderDecoderCache)
        assert cache.get_seq_length() == N
        assert cache.cross_attention_cache.get_seq_length() == 0
        assert not any(cache.is_updated.values())
        assert torch.equal(seen["input_ids"], IDS)
        assert torch.equal(seen["attention_mask"], torch.ones_like(IDS))
        assert torch.equal(seen["decoder_attention_mask"], torch.ones(2, N + 4, dtype=torch.long))
        assert "decoder_attention_mask" not in _seen(model, base)


@over("prompt", "p-tuning")
def embeddings_stand_before_the_encoders_text(kind: str) -> None:
    for base in ("t5", "bart"):
        model = made(kind, base)
        labels = by_hand.labels_of(base)["labels"]
        seen = _seen(model, base, kind, labels=labels)
        table = model.get_prompt_embedding_to_save("default")
        assert table.shape == (2 * N, 32)
        words = model.get_base_model().get_input_embeddings()(IDS)
        assert same(seen["inputs_embeds"], by_hand.before(table[:N].expand(2, N, 32), words))
        assert torch.equal(seen["attention_mask"], torch.ones(2, N + 6, dtype=torch.long))
        assert torch.equal(seen["decoder_input_ids"], IDS[:, :4])
        assert torch.equal(seen["labels"], labels)
        assert "decoder_attention_mask" not in seen


def tasks_with_one_submodule_leave_the_decoder() -> None:
    for base in ("t5", "bart"):
        model = made("multitask", base, num_transformer_submodules=1)
        given = {name: value for name, value in inputs(base, "multitask").items() if name != "decoder_input_ids"}
        labels = by_hand.labels_of(base)["labels"]
        output = model(**given, labels=labels)
        shifted = model.get_base_model().prepare_decoder_input_ids_from_labels(labels=labels)
        assert output.logits.shape[1] == 4
        assert same(output.logits, model(**given, decoder_input_ids=shifted).logits)


def tasks_with_two_submodules_stand_before_both() -> None:
    for base in ("t5", "bart"):
        model = made("multitask", base)
        labels = by_hand.labels_of(base)["labels"]
        seen = _seen(model, base, "multitask", labels=labels, decoder_attention_mask=torch.ones(2, 4, dtype=torch.long))
        own = model.prompt_encoder["default"]
        prompt = own.embedding.weight * (own.prefix_task_cols[TASK_IDS] @ own.prefix_task_rows[TASK_IDS])
        assert prompt.shape == (2, 2 * N, 32)
        assert same(seen["inputs_embeds"][:, :N], prompt[:, :N])
        assert same(seen["decoder_inputs_embeds"][:, :N], prompt[:, N:])
        assert torch.equal(seen["labels"], by_hand.before(torch.full((2, N), by_hand.IGNORED), labels))
        assert torch.equal(seen["decoder_attention_mask"], torch.ones(2, N + 4, dtype=torch.long))


@over("prompt", "p-tuning", "prefix", "multitask")
@torch.no_grad()
def encoder_decoders_generate_as_an_argmax_loop(kind: str) -> None:
    for base in ("t5", "bart"):
        model = made(kind, base)
        plain = model.get_base_model()
        given = {name: value for name, value in inputs(base, kind).items() if name != "decoder_input_ids"}
        expected = torch.full((2, 1), plain.config.decoder_start_token_id)
        for _ in range(4):
            step = model(**given, decoder_input_ids=expected).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, step], dim=1)
        found = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False, eos_token_id=None)
        assert torch.equal(found, expected)


def encoder_outputs_are_computed_anew() -> None:
    model = made("prompt", "t5")
    options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**options)
    stale = model.get_base_model().get_encoder()(input_ids=IDS.flip(1))
    with warned("encoder_outputs"):
        assert torch.equal(model.generate(**options, encoder_outputs=stale), expected)


def types_and_positions_are_dropped_with_a_warning() -> None:
    model = made("prompt", "t5")
    options: dict[str, Any] = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**options)
    for name in ("token_type_ids", "position_ids"):
        with warned(name):
            assert torch.equal(model.generate(**options, **{name: torch.zeros_like(IDS)}), expected)


def generate_needs_ids() -> None:
    with refused(ValueError, "input_ids"):
        made("prompt", "t5").generate(max_new_tokens=2)


def cpt_is_for_decoders() -> None:
    """The page: `NotImplementedError` in `generate`; ours refuses the config, and the base where the config names no task."""
    with refused(ValueError, "CAUSAL_LM"):
        config("cpt", "t5")
    with refused(ValueError, "encoder"):
        get_peft_model(tiny("t5"), config("cpt"))
