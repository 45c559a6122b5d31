"""The rows of the page (`page/table.py`) of what is in `peft` alone."""

from __future__ import annotations

from compat import rows
from page.table import Row, member, says

ROWS: list[Row] = [
    says("1", "PeftConfig", rows.every_config_derives_from_it),
    says("1", "functions from upstream", rows.importable("shift_tokens_right", "bloom_model_postprocess_past_key_value")),
    says("1", "mappings", rows.mappings_lead_from_types_to_classes, rows.mappings_are_dicts, rows.compatible_types_are_one_list),
    says("1", "infer_device, transpose", rows.device_is_the_best_there_is, rows.transposes_if_stored_so),
    member("6.7", "peft:shift_tokens_right", "input_ids, pad_token_id, decoder_start_token_id", rows.tokens_are_shifted),
    says("6.7", "bloom_model_postprocess_past_key_value", rows.keys_of_bloom_are_turned),
    member(
        "6.9",
        "peft.utils:register_peft_method",
        "*, name, config_cls, model_cls, prefix=None, is_mixed_compatible=False",
        rows.methods_can_be_registered,
    ),
    member("6.10", "peft.helpers:update_forward_signature", "model", rows.signatures_become_the_bases),
    member("6.10", "peft.helpers:update_generate_signature", "model", rows.signatures_become_the_bases),
    member("6.10", "peft.helpers:update_signature", "model, method='all'", rows.signatures_become_the_bases),
    member("6.10", "peft.helpers:check_if_peft_model", "model_name_or_path", rows.folders_of_adapters_are_recognised),
]
