"""Sections 5 and 6 of the page: `PeftMixedModel`, and functions. Rows of functions that are in `peft` alone: `tests/compat/table.py`."""

from __future__ import annotations

from page import rows_adapters as adapters
from page import rows_helpers as helpers
from page import rows_making as making
from page import rows_mixed as mixed
from page import rows_state as state
from page.table import Row, member, says

MODEL = "model, peft_config, adapter_name='default'"
READING = "autocast_adapter_dtype=True, ephemeral_gpu_offload=False, low_cpu_mem_usage=False, key_mapping=None"
ANY = "any method, prompts and third parties too: README"
FULL = "save, load, status and training work: README"

ROWS: list[Row] = [
    # ---- 5 PeftMixedModel --------------------------------------------------------------------------------------------
    member("5", "PeftMixedModel", MODEL, mixed.it_is_made_by_get_peft_model),
    says("5", "compatible types", mixed.any_type_can_take_part, mixed.third_parties_can_take_part, differs=ANY),
    member(
        "5",
        "PeftMixedModel.add_adapter",
        "adapter_name, peft_config, low_cpu_mem_usage=False, autocast_adapter_dtype=True",
        mixed.added_ones_are_not_active,
    ),
    member("5", "PeftMixedModel.set_adapter", "adapter_name, inference_mode=False", mixed.several_are_active_and_train),
    says("5", "set_adapter: unknown", mixed.unknown_ones_are_refused),
    says("5", "set_adapter: load order", mixed.order_is_load_order),
    member(
        "5",
        "PeftMixedModel.load_adapter",
        f"model_id, adapter_name, is_trainable=False, torch_device=None, {READING}",
        mixed.files_of_single_adapters_are_read,
    ),
    member(
        "5",
        "PeftMixedModel.from_pretrained",
        f"model, model_id, adapter_name='default', is_trainable=False, config=None, {READING}",
        mixed.reading_takes_the_arguments_of_the_page,
    ),
    member("5", "PeftMixedModel.disable_adapter", "", mixed.disabled_it_is_the_base),
    member("5", "PeftMixedModel.forward", "", mixed.forward_and_generate_delegate),
    member("5", "PeftMixedModel.generate", "", mixed.forward_and_generate_delegate),
    member("5", "PeftMixedModel.get_nb_trainable_parameters", "", mixed.numbers_are_counted_and_printed),
    member("5", "PeftMixedModel.print_trainable_parameters", "", mixed.numbers_are_counted_and_printed),
    member("5", "PeftMixedModel.merge_and_unload", "progressbar=False, safe_merge=False, adapter_names=None", mixed.merging_returns_the_base),
    member("5", "PeftMixedModel.unload", "", mixed.unloading_returns_the_base),
    member("5", "PeftMixedModel.delete_adapter", "adapter_name", mixed.one_or_several_are_deleted),
    says("5", "active_adapter, active_adapters, peft_config", mixed.names_and_configs_are_shown),
    says("5", "save_pretrained", mixed.stacks_are_saved_and_read, differs=FULL),
    says("5", "create_or_update_model_card", mixed.model_cards_are_written, differs=FULL),
    says("5", "get_layer_status, get_model_status", mixed.status_is_told, differs=FULL),
    says("5", "add_weighted_adapter", mixed.weighted_ones_need_one_method, differs="works for adapters of LoRA"),
    says("5", "training", mixed.all_active_ones_train, differs=FULL),
    says("5", "mechanics", mixed.outputs_add_up, mixed.wrapping_again_is_unwound),
    # ---- 6.1, 6.2 making ---------------------------------------------------------------------------------------------
    member(
        "6.1",
        "get_peft_model",
        f"{MODEL}, mixed=False, autocast_adapter_dtype=True, revision=None, low_cpu_mem_usage=False",
        making.it_is_modified_in_place,
    ),
    says("6.1", "base_model_name_or_path", making.name_of_the_base_is_stored),
    says("6.1", "revision", making.revision_is_stored),
    says("6.1", "class", making.class_is_chosen_by_the_task),
    says("6.1", "dimensions of prompts", making.prompts_get_their_dimensions),
    says("6.1", "a second time", making.a_second_call_is_warned_of, adapters.a_wrapped_model_is_one_with_adapters),
    says("6.1", "EVA", making.eva_without_low_memory_is_warned_of),
    says(
        "6.1",
        "name in a parameter prefix",
        adapters.names_that_begin_as_parameters_do_are_no_collision,
        differs="no warning: keys can be told apart (§12.26)",
    ),
    member(
        "6.2",
        "inject_adapter_in_model",
        "peft_config, model, adapter_name='default', low_cpu_mem_usage=False, state_dict=None",
        making.the_same_model_is_returned,
    ),
    says("6.2", "prompts", making.prompts_can_not_be_injected),
    says("6.2", "state_dict", making.keys_of_a_state_dict_choose_modules, making.agreeing_state_dicts_do_not_warn),
    says("6.2", "state_dict and target_parameters", making.target_parameters_exclude_a_state_dict),
    says("6.2", "called again", making.it_can_be_called_again),
    # ---- 6.3 state dict ----------------------------------------------------------------------------------------------
    member(
        "6.3",
        "get_peft_model_state_dict",
        "model, state_dict=None, adapter_name='default', unwrap_compiled=False, save_embedding_layers='auto'",
        state.keys_are_those_of_a_file,
    ),
    says("6.3", "state_dict", state.tensors_can_be_given),
    says("6.3", "unwrap_compiled", state.compiled_models_are_unwrapped),
    says("6.3", "injected models", state.injected_models_have_no_prefix),
    says("6.3", "unknown adapter", state.unknown_adapters_are_key_errors),
    says("6.3", "save_embedding_layers", state.embeddings_are_saved_if_asked),
    says("6.3", "save_embedding_layers: targeted", state.targeted_embeddings_are_saved),
    says("6.3", "save_embedding_layers: resized", state.resized_vocabularies_are_saved, differs="local data alone (§12.23)"),
    # ---- 6.4, 6.5 preparing ------------------------------------------------------------------------------------------
    member(
        "6.4",
        "prepare_model_for_kbit_training",
        "model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None, auto_clear_cache=True",
        making.everything_is_frozen_and_cast,
    ),
    says("6.4", "what is not cast", making.some_methods_of_quantising_are_not_cast, making.four_bit_weights_are_not_cast),
    says(
        "6.4",
        "gradient checkpointing",
        making.quantised_bases_are_checkpointed,
        making.without_reentrance_inputs_need_no_gradients,
        making.methods_that_take_no_options_are_warned_of,
    ),
    says("6.4", "training afterwards", making.it_trains_afterwards),
    member("6.5", "cast_mixed_precision_params", "model, dtype", making.what_trains_is_float32_and_the_rest_is_not),
    # ---- 6.6 status --------------------------------------------------------------------------------------------------
    member("6.6", "get_layer_status", "model", state.fields_of_layers_are_those_of_the_page),
    says("6.6", "module_type", state.types_of_layers_are_named),
    says("6.6", "requires_grad", state.irregular_flags_are_told),
    member("6.6", "get_model_status", "model", state.fields_of_models_are_those_of_the_page),
    says("6.6", "injected models", state.injected_models_have_a_status),
    says("6.6", "irregular", state.irregular_models_are_told),
    says("6.6", "prompts", state.prompts_have_a_status, differs="prompts have a status: issue 7, point 5"),
    says("6.6", "mixed models", state.mixed_models_have_a_status, differs=FULL),
    says("6.6", "no adapter", state.models_without_adapters_have_none),
    # ---- 6.7 loading helpers -----------------------------------------------------------------------------------------
    member(
        "6.7",
        "set_peft_model_state_dict",
        "model, peft_model_state_dict, adapter_name='default', ignore_mismatched_sizes=False, low_cpu_mem_usage=False",
        state.it_is_the_inverse,
        state.missing_and_unexpected_keys_are_returned,
        state.injected_models_take_keys_with_a_prefix_or_without,
        state.meta_weights_are_assigned,
        state.other_shapes_are_dropped_if_asked,
    ),
    member("6.7", "load_peft_weights", "model_id, device=None, key_mapping=None", state.both_kinds_of_files_are_read, state.pickles_can_not_run_code),
    member("6.7", "get_base_model_state_dict", "model", state.tensors_of_the_base_have_their_own_names),
    member("6.7", "set_base_model_state_dict", "model, state_dict, strict=True", state.tensors_of_the_base_can_be_set),
    member("6.7", "get_peft_config", "config_dict", helpers.dicts_become_configs, making.class_is_picked_by_the_type),
    member(
        "6.7",
        "peft_lora:replace_lora_weights_loftq",
        "peft_model, model_path=None, adapter_name='default', callback=None",
        helpers.what_quantising_lost_is_put_into_lora,
    ),
    # ---- 6.8 bases, too ----------------------------------------------------------------------------------------------
    member(
        "6.8",
        "AutoPeftModel.from_pretrained",
        "pretrained_model_name_or_path, adapter_name='default', is_trainable=False, config=None, revision=None",
        helpers.base_and_adapter_are_loaded,
    ),
    says("6.8", "another task", helpers.other_tasks_are_refused),
    says("6.8", "auto_mapping", helpers.without_a_task_the_mapping_is_used),
    says("6.8", "revision", helpers.revision_of_the_base_is_used),
    says("6.8", "a larger tokenizer", helpers.larger_tokenizers_resize),
    says("6.8", "direct construction", helpers.they_are_not_constructed),
    # ---- 6.9 enums, errors, registration -----------------------------------------------------------------------------
    says("6.9", "TaskType", helpers.tasks_are_strings),
    says("6.9", "PeftType", helpers.types_are_strings, helpers.types_can_be_listed),
    says("6.9", "errors", helpers.errors_have_their_bases),
    says("6.9", "method prefixes", helpers.prefixes_are_those_of_the_page),
    # ---- 6.10 helpers ------------------------------------------------------------------------------------------------
    member("6.10", "peft_lora:rescale_adapter_scale", "model, multiplier", helpers.scales_are_multiplied_for_a_while),
    member(
        "6.10",
        "disable_input_dtype_casting",
        "model, active=True",
        helpers.inputs_keep_their_dtype_for_a_while,
        differs="LoRA casts A and B to the input's dtype, and not the input",
    ),
    member("6.10", "peft_lora:DoraCaching", "enabled=True", helpers.norms_of_dora_can_be_kept),
    member("6.10", "cast_adapter_dtype", "model, adapter_name, autocast_adapter_dtype=True", helpers.weights_can_be_cast_later),
    member("6.10", "delete_adapter", "model, adapter_name, prefix", helpers.functions_delete_set_and_freeze),
    member("6.10", "set_adapter", "model, adapter_name, inference_mode=False", helpers.functions_delete_set_and_freeze),
    member("6.10", "set_requires_grad", "model, adapter_names, requires_grad=True", helpers.functions_delete_set_and_freeze),
    member("6.10", "hotswap_adapter", "model, model_name_or_path, adapter_name, torch_device=None", helpers.adapters_are_swapped_in_place),
    member(
        "6.10",
        "hotswap_adapter_from_state_dict",
        "model, state_dict, adapter_name, config, parameter_prefix",
        helpers.tensors_are_swapped_in_place,
        differs="parameter_prefix is what the tuner says where it is not given",
    ),
    member("6.10", "peft_lora:check_hotswap_configs_compatible", "config0, config1", helpers.configs_that_can_be_swapped_agree),
    member(
        "6.10",
        "peft_lora:prepare_model_for_compiled_hotswap",
        "model, *, target_rank=None, config=None, check_compiled='error'",
        helpers.compiled_models_are_prepared_for_swapping,
    ),
    member(
        "6.10",
        "peft_lora:convert_to_lora",
        "model, rank, adapter_name='default', progressbar=False, compile_kwargs=None",
        helpers.any_method_becomes_lora,
    ),
    member(
        "6.10",
        "peft_lora:save_as_lora",
        "path, model, rank, adapter_name='default', progressbar=False, compile_kwargs=None",
        helpers.any_method_becomes_lora,
    ),
]
