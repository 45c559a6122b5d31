"""The rows of the 'Models' page in one table: each name, its arguments in their order, their defaults.

A row is (where, arguments). ``x`` has no default, ``x=1`` has this one; keyword-only arguments of ours may follow and are not listed.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import peft_core

MODEL = "model, peft_config, adapter_name='default'"
WEIGHTS = "autocast_adapter_dtype=True, ephemeral_gpu_offload=False, low_cpu_mem_usage=False, key_mapping=None"
PAGE: list[tuple[str, str]] = [
    ("PeftModel", f"{MODEL}, autocast_adapter_dtype=True, low_cpu_mem_usage=False"),
    ("PeftModel.add_adapter", "adapter_name, peft_config, low_cpu_mem_usage=False, autocast_adapter_dtype=True"),
    ("PeftModel.create_or_update_model_card", "output_dir"),
    ("PeftModel.delete_adapter", "adapter_name"),
    ("PeftModel.disable_adapter", ""),
    ("PeftModel.forward", ""),
    ("PeftModel.from_pretrained", f"model, model_id, adapter_name='default', is_trainable=False, config=None, {WEIGHTS}"),
    ("PeftModel.get_base_model", ""),
    ("PeftModel.get_layer_status", ""),
    ("PeftModel.get_model_status", ""),
    ("PeftModel.get_nb_trainable_parameters", ""),
    ("PeftModel.get_prompt", "batch_size, task_ids=None, max_cache_len=None"),
    ("PeftModel.get_prompt_embedding_to_save", "adapter_name"),
    ("PeftModel.load_adapter", f"model_id, adapter_name, is_trainable=False, torch_device=None, {WEIGHTS}"),
    ("PeftModel.prepare_model_for_gradient_checkpointing", "model"),
    ("PeftModel.print_trainable_parameters", ""),
    (
        "PeftModel.save_pretrained",
        "save_directory, safe_serialization=True, selected_adapters=None, save_embedding_layers='auto', is_main_process=True, "
        "path_initial_model_for_weight_conversion=None",
    ),
    ("PeftModel.set_adapter", "adapter_name, inference_mode=False"),
    ("PeftModel.set_requires_grad", "adapter_names, requires_grad=True"),
    ("PeftModelForSequenceClassification", MODEL),
    ("PeftModelForTokenClassification", MODEL),
    ("PeftModelForCausalLM", MODEL),
    ("PeftModelForSeq2SeqLM", MODEL),
    ("PeftModelForQuestionAnswering", MODEL),
    ("PeftModelForFeatureExtraction", MODEL),
    ("PeftMixedModel", MODEL),
    ("PeftMixedModel.add_adapter", "adapter_name, peft_config, low_cpu_mem_usage=False"),
    ("PeftMixedModel.delete_adapter", "adapter_name"),
    ("PeftMixedModel.disable_adapter", ""),
    ("PeftMixedModel.from_pretrained", "model, model_id, adapter_name='default', is_trainable=False, config=None"),
    ("PeftMixedModel.load_adapter", "model_id, adapter_name"),
    ("PeftMixedModel.merge_and_unload", "progressbar=False, safe_merge=False, adapter_names=None"),
    ("PeftMixedModel.set_adapter", "adapter_name"),
    ("PeftMixedModel.unload", ""),
    ("cast_mixed_precision_params", "model, dtype"),
    (
        "get_peft_model",
        f"{MODEL}, mixed=False, autocast_adapter_dtype=True, revision=None, low_cpu_mem_usage=False",
    ),
    ("inject_adapter_in_model", "peft_config, model, adapter_name='default', low_cpu_mem_usage=False, state_dict=None"),
    ("get_peft_model_state_dict", "model, state_dict=None, adapter_name='default', unwrap_compiled=False, save_embedding_layers='auto'"),
    ("prepare_model_for_kbit_training", "model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None, auto_clear_cache=True"),
    ("get_layer_status", "model"),
    ("get_model_status", "model"),
    (
        "set_peft_model_state_dict",
        "model, peft_model_state_dict, adapter_name='default', ignore_mismatched_sizes=False, low_cpu_mem_usage=False",
    ),
    ("load_peft_weights", "model_id, device=None, key_mapping=None"),
    ("get_base_model_state_dict", "model"),
    ("set_base_model_state_dict", "model, state_dict, strict=True"),
    ("get_peft_config", "config_dict"),
    ("shift_tokens_right", "input_ids, pad_token_id, decoder_start_token_id"),
    (
        "AutoPeftModel.from_pretrained",
        "pretrained_model_name_or_path, adapter_name='default', is_trainable=False, config=None, revision=None",
    ),
    ("update_forward_signature", "model"),
    ("update_generate_signature", "model"),
    ("update_signature", "model, method='all'"),
    ("check_if_peft_model", "model_name_or_path"),
    ("cast_adapter_dtype", "model, adapter_name, autocast_adapter_dtype=True"),
    ("delete_adapter", "model, adapter_name, prefix"),
    ("set_adapter", "model, adapter_name, inference_mode=False"),
    ("set_requires_grad", "model, adapter_names, requires_grad=True"),
    ("hotswap_adapter", "model, model_name_or_path, adapter_name, torch_device=None"),
]


def found(where: str) -> Any:
    value: Any = peft_core
    for part in where.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(("where", "arguments"), PAGE, ids=[where for where, _ in PAGE])
def test_row(where: str, arguments: str) -> None:
    target = found(where)
    assert inspect.getdoc(target), f"{where} has no docstring"
    positional = [
        parameter
        for parameter in inspect.signature(target).parameters.values()
        if parameter.name != "self" and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    expected = [text for text in arguments.split(", ") if text]
    shown = [p.name if p.default is p.empty or "=" not in text else f"{p.name}={p.default!r}" for p, text in zip(positional, expected, strict=False)]
    takes_more = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(target).parameters.values())
    assert shown == expected[: len(shown)]
    assert len(shown) == len(expected) or takes_more, f"{where} lacks {expected[len(shown) :]}"
