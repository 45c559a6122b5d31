"""Tiny models of all classes that transformers offers for some tasks, with random weights, the same ones each time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto

#: kind → (transformers' table of classes, task type of the adapter)
KINDS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "CAUSAL_LM"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "SEQ_2_SEQ_LM"),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", None),
    "image": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", None),
    "audio": ("MODEL_FOR_CTC_MAPPING_NAMES", None),
}
#: what configs are told, each where the class knows the name
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "max_position_embeddings": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_dim": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rotary_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "state_size": 8,
    "ssm_state_size": 8,
    "d_state": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "num_kv_shared_layers": 0,
    "sliding_window": 32,
    "embedding_size": 32,
    "shared_expert_intermediate_size": 24,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "image_size": 32,
    "patch_size": 8,
    "hidden_dropout": 0.0,
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
#: what some kinds are told besides
FURTHER: dict[str, dict[str, Any]] = {
    "causal": {"is_decoder": True},
    "audio": {
        "conv_dim": (32, 32, 32),
        "conv_stride": (5, 2, 2),
        "conv_kernel": (10, 3, 3),
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "num_feat_extract_layers": 3,
    },
}
#: what is tried one after the other, until a model can be made and run
ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_hidden_layers": 4},
    {"num_hidden_layers": 4, "num_key_value_heads": 4},
    {"layer_types": ["linear_attention", "full_attention"]},
    {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]},
    {"attn_layer_indices": [1], "attn_layer_period": 2, "attn_layer_offset": 1},
    {"is_decoder": False},
    {"head_dim": 16},
)
LARGEST = 3_000_000
IDS = torch.tensor([[3, 9, 4, 17, 5, 6], [9, 22, 6, 5, 33, 8]])


@dataclass(frozen=True)
class Architecture:
    """A class of models: `kind` as in `KINDS`, `model_type` as in its config, `name` of the class."""

    kind: str
    model_type: str
    name: str

    @property
    def task(self) -> str | None:
        """The task type of adapters."""
        return KINDS[self.kind][1]

    def __str__(self) -> str:
        return f"{self.kind}-{self.model_type}"


def architectures() -> Iterator[Architecture]:
    """Yield all that transformers has for the kinds, in alphabetic order."""
    for kind, (table, _) in KINDS.items():
        for model_type, names in sorted(getattr(modeling_auto, table).items()):
            name = names if isinstance(names, str) else names[0]
            if hasattr(transformers, name):
                yield Architecture(kind, model_type, name)


class CanNotBuild(Exception):
    """No attempt gives a tiny model that runs."""


def maker(architecture: Architecture) -> Any:
    """Return a function that makes the model, in evaluation, with the same weights each time.

    Raises:
        CanNotBuild: no attempt gives a model that runs.
    """
    reason = ""
    for changes in ATTEMPTS:
        try:
            config = _config(architecture, changes)

            def make(config: Any = config) -> Any:
                torch.manual_seed(0)
                return getattr(transformers, architecture.name)(type(config).from_dict(config.to_dict())).eval()

            with torch.device("meta"):
                size = sum(p.numel() for p in make().parameters())
            if size > LARGEST:
                raise CanNotBuild(f"{size / 1e6:.0f} million parameters with the smallest settings that are tried")
            model = make()
            with torch.no_grad():
                output(model, architecture)
            return make
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    raise CanNotBuild(reason)


def _config(architecture: Architecture, changes: dict[str, Any]) -> Any:
    kind = getattr(transformers, architecture.name).config_class
    known = kind()
    given = {key: value for key, value in {**SIZES, **FURTHER.get(architecture.kind, {}), **changes}.items() if _has(known, key)}
    while True:
        try:
            return kind(**given)
        except AttributeError as error:  # names that can be read and not set
            unset = next((key for key in given if f"'{key}'" in str(error)), None)
            if unset is None:
                raise
            del given[unset]


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # attributes that differ by layer can't be read, and can be set
        return True


def inputs(architecture: Architecture, model: Any) -> dict[str, Tensor]:
    """Return what a model gets, without labels."""
    generator = torch.Generator().manual_seed(0)
    if architecture.kind == "image":
        config = model.config
        size = getattr(config, "image_size", 32)
        size = size if isinstance(size, int) else size[0]
        return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), size, size, generator=generator)}
    if architecture.kind == "audio":
        if model.main_input_name == "input_values":
            return {"input_values": torch.randn(2, 1600, generator=generator)}
        return {"input_features": torch.randn(2, 32, getattr(model.config, "feature_projection_input_dim", 80), generator=generator)}
    found = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return {**found, "decoder_input_ids": IDS} if architecture.kind == "seq2seq" else found


def output(model: Any, architecture: Architecture, **changes: Any) -> Tensor:
    """Return logits (batch, …)."""
    found: Tensor = model(**{**inputs(architecture, model), **changes}).logits
    return found
