"""Sections 1 and 2 of the page: names, and `PeftModel`. Rows of names that are in `peft` alone: `tests/compat/table.py`."""

from __future__ import annotations

from page import rows_adapters as adapters
from page import rows_files as files
from page import rows_members as members
from page import rows_model as model
from page import rows_names as names
from page import rows_saving as saving
from page.table import Row, member, says

MODEL = "model, peft_config, adapter_name='default'"
MAKING = "autocast_adapter_dtype=True, low_cpu_mem_usage=False"
READING = "autocast_adapter_dtype=True, ephemeral_gpu_offload=False, low_cpu_mem_usage=False, key_mapping=None"
ANY_METHOD = "several methods in one model are allowed: README, docs/prompts.md"
STRICT = "strict by default: README"

ROWS: list[Row] = [
    says(
        "1",
        "model classes",
        names.importable(
            *("PeftModel", "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "PeftModelForCausalLM"),
            *("PeftModelForSeq2SeqLM", "PeftModelForQuestionAnswering", "PeftModelForFeatureExtraction", "PeftMixedModel"),
        ),
    ),
    says(
        "1",
        "functions of the page",
        names.importable(
            *("get_peft_model", "get_peft_config", "inject_adapter_in_model", "get_peft_model_state_dict", "prepare_model_for_kbit_training"),
            *("get_layer_status", "get_model_status", "cast_mixed_precision_params"),
        ),
    ),
    says("1", "PeftConfig", names.importable("PeftConfig"), names.every_config_derives_from_it),
    says(
        "1",
        "functions from upstream",
        names.importable(
            *("set_peft_model_state_dict", "load_peft_weights", "get_base_model_state_dict", "set_base_model_state_dict"),
            "replace_lora_weights_loftq",
        ),
    ),
    says("1", "enums and errors", names.importable("PeftType", "TaskType", "PeftError", "PeftWarning", "NoMatchingPeftModuleError")),
    says(
        "1",
        "names of the prompt package",
        names.importable(
            *("PromptLearningConfig", "PromptTuningConfig", "PromptTuningInit", "PromptEmbedding", "PrefixTuningConfig", "PrefixEncoder"),
            *("PromptEncoderConfig", "PromptEncoder", "PromptEncoderReparameterizationType", "MultitaskPromptTuningConfig"),
            *("MultitaskPromptTuningInit", "CPTConfig", "CPTEmbedding"),
        ),
    ),
    says(
        "1",
        "names of the LoRA package",
        names.importable(
            *("LoraConfig", "LoraRuntimeConfig", "EvaConfig", "LoftQConfig", "LoraGAConfig", "ArrowConfig", "BdLoraConfig", "KasaConfig"),
            *("MontecloraConfig", "VeloraConfig", "CordaConfig", "get_eva_state_dict", "initialize_lora_eva_weights", "preprocess_loraga"),
            *("preprocess_corda", "create_arrow_model", "convert_to_lora", "save_as_lora", "LoraModel", "find_kappa_target_modules"),
        ),
    ),
    says("1", "names of the LoHa package", names.importable("LoHaConfig", "LoHaModel")),
    says("1", "names of trainable tokens", names.importable("TrainableTokensConfig", "TrainableTokensModel")),
    says(
        "1",
        "classes that load a base, too",
        names.importable(
            *("AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification"),
            *("AutoPeftModelForTokenClassification", "AutoPeftModelForQuestionAnswering", "AutoPeftModelForFeatureExtraction"),
        ),
    ),
    says("1", "mappings", names.mapping_leads_from_tasks_to_classes, names.mapping_is_a_dict),
    says("1", "__version__", names.version_is_text),
    # ---- 2 PeftModel -------------------------------------------------------------------------------------------------
    member("2", "PeftModel", f"{MODEL}, {MAKING}", model.base_is_modified_in_place),
    says("2", "model", model.any_module_can_be_a_base, model.prompts_leave_the_base_as_it_is),
    says("2", "peft_config (argument)", model.config_is_kept_by_reference),
    says("2", "adapter_name", model.name_is_part_of_every_parameter_name, model.illegal_names_are_refused),
    says(
        "2",
        "autocast_adapter_dtype",
        model.half_precision_weights_are_cast_to_float32,
        model.prompts_are_float32_anyway,
        model.saved_modules_keep_the_dtype_of_the_original,
    ),
    says("2", "low_cpu_mem_usage", model.weights_are_made_on_the_meta_device),
    says("2", "base_model", model.base_model_of_layers_is_the_tuner_object, model.base_model_of_prompts_is_the_base),
    says("2", "peft_config", model.configs_are_a_dict_by_adapter, model.configs_can_be_set),
    says("2", "modules_to_save", model.saved_names_are_the_union_over_adapters),
    says("2", "prompt_encoder", model.encoders_by_adapter),
    says("2", "prompt_tokens", model.tokens_are_counted_over_the_submodules),
    says("2", "transformer_backbone_name", model.backbone_is_the_first_child_that_is_a_transformers_model),
    says("2", "word_embeddings", model.embeddings_are_the_backbones),
    says("2", "active_adapter", model.active_adapter_is_one_name),
    says("2", "active_adapters", model.active_adapters_follow_the_tuner),
    says("2", "active_peft_config", model.active_config_is_that_of_the_active_adapter),
    says("2", "peft_type", model.type_is_that_of_the_first_config),
    says("2", "special_peft_forward_args", model.special_arguments_are_named, model.special_arguments_do_not_reach_the_base),
    says("2", "base_model_torch_dtype", model.dtype_is_the_bases),
    says("2", "has_active_enabled_adapter", model.says_whether_an_enabled_adapter_is_active),
    says("2", "device, config, …", model.unknown_attributes_are_the_bases),
    says("2", "construction: pretraining_tp", model.pretraining_tp_becomes_one),
    says("2", "construction: gradient checkpointing", model.checkpointed_bases_get_inputs_that_require_gradients),
    says("2", "construction: no is_gradient_checkpointing", members.models_that_do_not_say_count_as_checkpointed),
    says("2", "construction: what trains", model.the_base_is_frozen_and_the_adapter_trains, model.for_inference_nothing_trains),
    # ---- 2.1 add_adapter ---------------------------------------------------------------------------------------------
    member(
        "2.1",
        "PeftModel.add_adapter",
        "adapter_name, peft_config, low_cpu_mem_usage=False, autocast_adapter_dtype=True",
        adapters.new_one_is_neither_active_nor_trainable,
        adapters.low_memory_adapters_have_no_weights_yet,
        adapters.weights_are_cast_unless_told_otherwise,
    ),
    says("2.1", "add_adapter: name already used", adapters.taken_name_is_refused),
    says("2.1", "add_adapter: another peft_type", adapters.other_methods_are_welcome, differs=ANY_METHOD),
    says(
        "2.1",
        "add_adapter: name in a parameter prefix",
        adapters.names_that_begin_as_parameters_do_are_no_collision,
        adapters.the_name_of_a_method_is_no_collision,
        differs="without fault: no file holds an adapter's name (§12.26)",
    ),
    says("2.1", "add_adapter: a second bias", adapters.second_bias_is_refused),
    says("2.1", "add_adapter: injection error", adapters.failure_takes_the_config_back),
    says("2.1", "add_adapter: prompts", adapters.prompts_get_an_encoder, adapters.prompts_get_their_saved_modules),
    says("2.1", "add_adapter: classifiers", adapters.heads_of_the_task_are_saved),
    # ---- 2.2 model card ----------------------------------------------------------------------------------------------
    member(
        "2.2",
        "PeftModel.create_or_update_model_card",
        "output_dir",
        files.card_says_what_it_is,
        files.card_is_idempotent,
        files.card_names_the_quantisation,
    ),
    # ---- 2.3 delete_adapter ------------------------------------------------------------------------------------------
    member("2.3", "PeftModel.delete_adapter", "adapter_name", adapters.unknown_one_can_not_be_deleted),
    says("2.3", "delete_adapter: merged", adapters.merged_one_can_not_be_deleted),
    says("2.3", "delete_adapter: inactive", adapters.inactive_one_disappears_and_nothing_else_changes),
    says("2.3", "delete_adapter: active", adapters.other_active_ones_stay, adapters.first_remaining_one_takes_over),
    says("2.3", "delete_adapter: the last", adapters.without_the_last_one_the_model_is_the_base),
    # ---- 2.4 disable_adapter -----------------------------------------------------------------------------------------
    member(
        "2.4",
        "PeftModel.disable_adapter",
        "",
        adapters.inside_the_model_is_the_base,
        adapters.original_heads_are_used,
        adapters.original_token_rows_are_used,
    ),
    says("2.4", "disable_adapter: restores", adapters.exceptions_restore_it, adapters.nested_blocks_end_with_the_outermost),
    says("2.4", "disable_adapter: generate", adapters.generate_is_the_bases),
    says("2.4", "disable_adapter: biases", adapters.trained_biases_are_warned_of),
    says("2.4", "disable_adapter: irregular layers", adapters.irregular_layers_are_restored_as_they_were, differs="each layer is restored as it was"),
    says("2.4", "disable_adapter: merged", adapters.merged_ones_are_taken_out_and_stay_out),
    # ---- 2.5 forward -------------------------------------------------------------------------------------------------
    member("2.5", "PeftModel.forward", "", model.output_of_the_base_is_returned_as_it_is),
    says("2.5", "forward: adapter_names", model.rows_can_have_adapters_of_their_own),
    says("2.5", "forward: prompts without a task", model.without_a_task_prompts_work),
    # ---- 2.6 from_pretrained -----------------------------------------------------------------------------------------
    member(
        "2.6",
        "PeftModel.from_pretrained",
        f"model, model_id, adapter_name='default', is_trainable=False, config=None, {READING}",
        files.class_and_config_come_from_the_file,
        files.without_a_task_the_class_that_was_called_is_used,
    ),
    says("2.6", "config", files.a_given_config_is_used_as_it_is),
    says("2.6", "is_trainable", files.it_trains_if_asked),
    says("2.6", "is_trainable of prompts", files.prompts_go_on_training, differs="prompts can go on training: docs/prompts.md"),
    says("2.6", "hub arguments", files.subfolders_are_read, files.hub_arguments_go_to_the_download),
    says("2.6", "ephemeral_gpu_offload", files.offload_is_stored_in_the_runtime_config),
    says("2.6", "low_cpu_mem_usage", files.low_memory_loading_assigns),
    says("2.6", "torch_device", files.tensors_are_read_to_a_device),
    says("2.6", "key_mapping", files.keys_can_be_renamed),
    says("2.6", "ignore_mismatched_sizes", files.other_shapes_are_skipped_if_asked),
    says("2.6", "no adapter_config.json", files.a_missing_config_is_named),
    says("2.6", "missing keys", files.missing_keys_are_an_error_and_a_warning_if_asked, differs=STRICT),
    says("2.6", "adapter_model.bin", files.pickled_files_are_read),
    # ---- 2.7 to 2.14 -------------------------------------------------------------------------------------------------
    member("2.7", "PeftModel.get_base_model", "", members.it_is_the_object_that_was_passed, members.it_keeps_acting_as_the_adapted_model),
    member("2.8", "PeftModel.get_layer_status", "", members.status_is_that_of_the_function),
    member("2.8", "PeftModel.get_model_status", "", members.status_is_that_of_the_function),
    member(
        "2.9",
        "PeftModel.get_nb_trainable_parameters",
        "",
        members.numbers_are_counted,
        members.tied_numbers_count_once,
        members.numbers_of_deepspeed_are_asked_for,
        members.four_bit_numbers_are_unpacked,
    ),
    member("2.10", "PeftModel.print_trainable_parameters", "", members.text_is_that_of_the_page),
    member("2.11", "PeftModel.get_prompt", "batch_size, task_ids=None, max_cache_len=None", members.embeddings_for_each_sample),
    says("2.11", "get_prompt: submodules", members.embeddings_of_both_submodules),
    says("2.11", "get_prompt: prefixes", members.prefixes_are_a_cache),
    says("2.11", "get_prompt: inference_mode", members.in_inference_the_table_is_used),
    says("2.11", "get_prompt: max_cache_len", members.caches_can_have_a_fixed_size),
    says("2.11", "get_prompt: not a prompt", members.without_virtual_tokens_there_is_none),
    member("2.12", "PeftModel.get_prompt_embedding_to_save", "adapter_name", files.it_is_what_the_file_holds),
    member(
        "2.13",
        "PeftModel.load_adapter",
        f"model_id, adapter_name, is_trainable=False, torch_device=None, {READING}",
        files.unknown_names_are_added_and_not_used,
    ),
    says("2.13", "load_adapter: name known", files.known_names_get_other_weights),
    says("2.13", "load_adapter: is_trainable", files.trainable_ones_train_and_keep_the_mode),
    says("2.13", "load_adapter: further arguments", files.further_arguments_of_loading),
    says("2.13", "load_adapter: what it returns", files.missing_keys_are_those_of_this_adapter),
    says("2.13", "load_adapter: a second mutating start", files.a_second_mutating_start_is_warned_of),
    member("2.14", "PeftModel.prepare_model_for_gradient_checkpointing", "model", members.inputs_require_gradients),
    says("2.14", "a hook where the method is missing", members.models_without_the_method_get_a_hook),
    says("2.14", "quantised models", members.quantised_models_are_left_alone),
    # ---- 2.15 save_pretrained ----------------------------------------------------------------------------------------
    member(
        "2.15",
        "PeftModel.save_pretrained",
        "save_directory, safe_serialization=True, selected_adapters=None, save_embedding_layers='auto', is_main_process=True, "
        "path_initial_model_for_weight_conversion=None",
        saving.default_is_in_the_root_and_others_in_folders,
    ),
    says("2.15", "save_directory", saving.a_file_is_no_folder),
    says("2.15", "selected_adapters", saving.selected_ones_are_written),
    says("2.15", "safe_serialization", files.pickled_files_are_read),
    says("2.15", "save_embedding_layers", saving.embeddings_are_written_if_asked),
    says("2.15", "is_main_process", saving.other_processes_write_nothing),
    says("2.15", "state_dict", saving.given_tensors_are_used),
    says("2.15", "**kwargs", saving.further_keywords_are_accepted),
    says("2.15", "the config in the file", saving.config_is_written_for_inference, saving.auto_mapping_is_written_without_a_task),
    says("2.15", "shared and non-contiguous tensors", saving.shared_and_strided_tensors_are_written),
    # ---- 2.16 conversion ---------------------------------------------------------------------------------------------
    says("2.16", "path_initial_model_for_weight_conversion", saving.converted_it_equals_the_trained_model, saving.factors_are_stacked),
    says("2.16", "scaling with rslora", saving.scaling_is_kept_with_rslora),
    says("2.16", "rank_pattern, alpha_pattern", saving.patterns_are_doubled),
    says("2.16", "not LoRA", saving.only_lora_is_converted),
    says("2.16", "rslora with patterns", saving.rslora_with_patterns),
    says("2.16", "a start that does not mutate", saving.a_start_that_does_not_mutate_is_warned_of),
    # ---- 2.17, 2.18 --------------------------------------------------------------------------------------------------
    member("2.17", "PeftModel.set_adapter", "adapter_name, inference_mode=False", adapters.exactly_this_one_is_active_and_trains),
    says("2.17", "set_adapter: inference_mode", adapters.for_inference_it_does_not_train),
    says("2.17", "set_adapter: saved modules, token rows", adapters.saved_modules_and_token_rows_follow),
    says("2.17", "set_adapter: undone by the page's recipe", adapters.the_pages_recipe_undoes_it),
    says("2.17", "set_adapter: several through the tuner", adapters.several_are_set_through_the_tuner),
    says("2.17", "set_adapter: unknown name", adapters.unknown_one_can_not_be_set),
    says("2.17", "set_adapter: merged", adapters.merged_ones_are_taken_out_first),
    member("2.18", "PeftModel.generate", "", members.generate_is_an_argmax_loop),
    member(
        "2.18",
        "PeftModel.set_requires_grad",
        "adapter_names, requires_grad=True",
        members.flags_are_set_whatever_is_active,
        differs="prompts, too: docs/api.md",
    ),
    member("2.18", "PeftModel.supports_lora_conversion", "adapter_name='default'", members.layers_say_whether_they_can_become_lora),
    says("2.18", "push_to_hub", members.uploading_saves_first),
    says("2.18", "members of the tuner", members.operations_of_the_tuner_are_reachable, members.weighted_adapters_are_reachable),
]
