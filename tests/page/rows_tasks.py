"""§3: the task classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import peft_core
import support
from page import by_hand
from page.making import ALL, IDS, LAYERS, SORTS, TASK_IDS, TASKS, config, fresh, get_peft_model, inputs, made, over, refused, run, same, tiny, trains
from peft_core import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModelForTokenClassification
from peft_core.testing.helpers import tensor_of

ENCODER_DECODERS = ("t5", "bart")


def _cells(base: str) -> list[str]:
    return [kind for kind in (*ALL, "prefix-projection") if kind != "cpt" or TASKS[base] == "CAUSAL_LM"]


def outputs_are_those_by_hand(*bases: str) -> Callable[..., None]:
    """Return a check that outputs are those of the bare base for virtual tokens and text, cut to the text where they are per token."""

    @torch.no_grad()
    def output_is_that_by_hand(kind: str) -> None:
        for base in bases:
            model = made(kind, base)
            found, expected = tensor_of(model(**inputs(base, kind))), tensor_of(by_hand.whole(model, base, kind))
            if TASKS[base] in ("TOKEN_CLS", "QUESTION_ANS"):
                assert found.shape[:2] == IDS.shape
                expected = expected[:, -IDS.shape[1] :]
            assert same(found, expected)

    return over(*_cells(bases[0]))(output_is_that_by_hand)


def losses_are_those_by_hand(*bases: str) -> Callable[..., None]:
    """Return a check that the loss is computed of the caller's labels at the caller's tokens, and trains the adapter alone."""

    def loss_is_that_by_hand(kind: str) -> None:
        for base in bases:
            model = made(kind, base)
            model.requires_grad_(False)
            model.set_adapter("default")
            output = model(**inputs(base, kind), **by_hand.labels_of(base))
            with torch.no_grad():
                expected = by_hand.loss(by_hand.whole(model, base, kind), base, kind)
            torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-4)
            output.loss.backward()
            moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
            assert moved
            assert all("default" in name.split(".") for name in moved)

    return over(*_cells(bases[0]))(loss_is_that_by_hand)


def features_have_no_loss() -> None:
    for kind in SORTS:
        assert "loss" not in made(kind, "bert")(**inputs("bert", kind))


def class_follows_the_task(*bases: str) -> Callable[[], None]:
    """Return a check that `get_peft_model` picks the class, which can be picked by hand as well."""

    def class_is_picked_by_the_task() -> None:
        for base in bases:
            cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[str(TASKS[base])]
            for kind in SORTS:
                assert type(fresh(kind, base)) is cls
                by_hand_picked = cls(tiny(base), config(kind, base), "mine", autocast_adapter_dtype=False, low_cpu_mem_usage=True)
                assert list(by_hand_picked.peft_config) == ["mine"]
                assert {p.device.type for n, p in by_hand_picked.named_parameters() if ".mine" in n and "modules_to_save" not in n} == {"meta"}

    return class_is_picked_by_the_task


def config_is_the_bases() -> None:
    for base in ("bert-seq-cls", "bert-token-cls", "bert-qa", "bert"):
        for kind in SORTS:
            model = fresh(kind, base)
            assert model.config is model.get_base_model().config


def layer_of_the_classes_is_named() -> None:
    """Also for methods that wrap layers (§12.15)."""
    for base, name in {"bert-seq-cls": "classifier", "llama-seq-cls": "score", "bert-token-cls": "classifier", "bert-qa": "qa_outputs"}.items():
        for kind in SORTS:
            assert fresh(kind, base).cls_layer_name == name


def heads_are_saved_whole() -> None:
    for base, heads in {"bert-seq-cls": {"classifier", "score"}, "bert-token-cls": {"classifier", "score"}, "bert-qa": {"qa_outputs"}}.items():
        for kind in SORTS:
            model = fresh(kind, base)
            assert model.modules_to_save == heads
            assert set(model.peft_config["default"].modules_to_save) == heads


def heads_are_copied_and_the_original_is_frozen() -> None:
    for base, head in (("bert-seq-cls", "classifier"), ("llama-seq-cls", "score"), ("bert-qa", "qa_outputs")):
        for kind in SORTS:
            plain, model = tiny(base), fresh(kind, base)
            wrapper: Any = getattr(model.get_base_model(), head)
            assert not any(p.requires_grad for p in wrapper.original_module.parameters())
            assert all(p.requires_grad for p in wrapper.modules_to_save["default"].parameters())
            assert torch.equal(wrapper.modules_to_save["default"].weight, plain.get_submodule(head).weight)
            trainable, total = model.get_nb_trainable_parameters()
            added = sum(p.numel() for n, p in model.named_parameters() if "default" in n.split("."))
            assert (trainable, total) == (added, sum(p.numel() for p in plain.parameters()) + added)


def heads_are_expected_in_the_file(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    for kind in SORTS:
        model = made(kind, "bert-seq-cls")
        model.save_pretrained(tmp_path / kind)
        file = tmp_path / kind / "adapter_model.safetensors"
        tensors = load_file(file)
        heads = [key for key in tensors if key.endswith(("classifier.weight", "classifier.bias"))]
        assert len(heads) == 2
        save_file({key: value for key, value in tensors.items() if key not in heads}, file)
        with refused(RuntimeError, "classifier"):
            peft_core.PeftModel.from_pretrained(tiny("bert-seq-cls"), tmp_path / kind)


def heads_that_do_not_exist_are_ignored() -> None:
    assert not hasattr(fresh("lora", "bert-seq-cls").get_base_model(), "score")
    assert get_peft_model(tiny("bert"), config("lora", "bert", task_type="SEQ_CLS")).cls_layer_name is None


def all_linear_spares_the_heads() -> None:
    for base, head in (("bert-seq-cls", "classifier"), ("llama-seq-cls", "score"), ("bert-token-cls", "classifier"), ("bert-qa", "qa_outputs")):
        for kind in LAYERS:
            model = fresh(kind, base, target_modules="all-linear")
            assert head not in model.base_model.targeted_module_names
            assert model.base_model.targeted_module_names
            assert type(getattr(model.get_base_model(), head)).__name__ == "ModulesToSaveWrapper"


def plain_keywords_are_passed_on() -> None:
    """`task_ids` is ignored for methods without tasks: it reaches no base whose forward does not know it."""
    for kind in LAYERS:
        model = made(kind, "bert-seq-cls")
        expected = run(model, "bert-seq-cls")
        assert torch.equal(run(model, "bert-seq-cls", output_attentions=False, output_hidden_states=True, return_dict=True), expected)
        embeds = model.get_base_model().get_input_embeddings()(IDS)
        assert same(model(inputs_embeds=embeds, attention_mask=torch.ones_like(IDS)).logits, expected)


def task_ids_are_ignored_without_tasks() -> None:
    for kind in SORTS:
        for base in ("llama", "bert-seq-cls", "t5"):
            model = made(kind, base)
            assert torch.equal(run(model, base, kind, task_ids=TASK_IDS), run(model, base, kind))


def config_may_be_left_out_in_the_signature_alone() -> None:
    assert list(inspect.signature(PeftModelForTokenClassification).parameters)[:3] == ["model", "peft_config", "adapter_name"]
    with pytest.raises((TypeError, ValueError)):
        PeftModelForTokenClassification(tiny("bert-token-cls"), None)  # type: ignore[arg-type]


def bases_that_can_not_generate_are_refused() -> None:
    for cls in (peft_core.PeftModelForCausalLM, peft_core.PeftModelForSeq2SeqLM):
        for kind in ("lora", "prompt"):
            with refused(AttributeError, "prepare_inputs_for_generation"):
                cls(tiny("bert"), config(kind, "bert", task_type=cls.task.name))
    base = nn.Sequential(nn.Linear(2, 2))
    with refused(AttributeError, "prepare_inputs_for_generation"):
        peft_core.PeftModelForCausalLM(base, config("lora", target_modules=["0"]))


def preparation_of_the_base_is_kept() -> None:
    for base in ("llama", "t5"):
        for kind in SORTS:
            model = fresh(kind, base)
            method = model.base_model_prepare_inputs_for_generation
            assert method.__func__ is type(model.get_base_model()).prepare_inputs_for_generation
            assert method.__self__ is model.get_base_model()


def preparation_of_the_encoder_is_kept() -> None:
    own = fresh("prompt", "t5").base_model_prepare_encoder_decoder_kwargs_for_generation
    name = "_prepare_encoder_decoder_kwargs_for_generation"
    assert (own is None) is not hasattr(tiny("t5"), name)


@over(*SORTS)
def exceptions_in_generate_leave_the_base_as_it_was(kind: str) -> None:
    for base in ("llama", "t5"):
        model = made(kind, base)
        plain = model.base_model_prepare_inputs_for_generation

        def fails(*args: Any, **kwargs: Any) -> None:
            raise KeyError("mine")

        options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 2, "do_sample": False}
        expected = model.generate(**options)
        handle = model.get_base_model().lm_head.register_forward_pre_hook(fails)
        with pytest.raises(KeyError, match="mine"):
            model.generate(**options)
        handle.remove()
        assert model.base_model_prepare_inputs_for_generation == plain
        with model.disable_adapter():
            assert torch.equal(model.generate(**options), tiny(base).generate(**options))
        assert torch.equal(model.generate(**options), expected)


def problem_types_are_inferred() -> None:
    mean, crossed = nn.functional.mse_loss, nn.functional.binary_cross_entropy_with_logits
    numbers, several = torch.tensor([0.5, -1.0]), torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    for kind in (*LAYERS, "prompt", "prefix"):
        for classes, labels, loss, name in ((1, numbers, mean, "regression"), (3, several, crossed, "multi_label_classification")):
            torch.manual_seed(0)
            base: Any = support.bert_classifier(num_labels=classes)
            model = get_peft_model(base, config(kind, "bert-seq-cls")).eval()
            output = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels)
            torch.testing.assert_close(output.loss, loss(output.logits.squeeze(), labels))
            assert base.config.problem_type == name


def everything_trains_in_every_class() -> None:
    for base in TASKS:
        for kind in SORTS:
            assert trains(fresh(kind, base), "default")
