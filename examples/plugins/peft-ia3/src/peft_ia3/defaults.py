"""What is scaled by default: for each architecture the targets, and which of them by their input."""

from __future__ import annotations

_GATED = (("q_proj", "v_proj", "down_proj"), ("down_proj",))
_KEYS_GATED = (("k_proj", "v_proj", "down_proj"), ("down_proj",))
_FUSED = (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",))
_OPT = (("q_proj", "k_proj", "fc2"), ("fc2",))
_FC2 = (("q_proj", "v_proj", "fc2"), ("fc2",))
_BERT = (("key", "value", "output.dense"), ("output.dense",))
_GPT2 = (("c_attn", "mlp.c_proj"), ("mlp.c_proj",))

#: model_type → (targets, feed-forward); the same as the peer chooses, so that configs that name nothing mean the same
DEFAULTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bart": _FC2,
    "bert": _BERT,
    "bloom": (("query_key_value", "mlp.dense_4h_to_h"), ("mlp.dense_4h_to_h",)),
    "deberta": (("in_proj", "output.dense"), ("output.dense",)),
    "deberta-v2": (("key_proj", "value_proj", "output.dense"), ("output.dense",)),
    "falcon": _FUSED,
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3_text": _GATED,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": (("q_proj", "v_proj", "c_proj"), ("c_proj",)),
    "gpt_neox": _FUSED,
    "gptj": (("q_proj", "v_proj", "fc_out"), ("fc_out",)),
    "llama": _KEYS_GATED,
    "llama4": _GATED,
    "mistral": _KEYS_GATED,
    "mixtral": (("k_proj", "v_proj", "w2"), ("w2",)),
    "mt5": (("k", "v", "wi_1"), ()),
    "opt": _OPT,
    "phi": _FC2,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "roberta": _BERT,
    "t5": (("k", "v", "wo"), ("wo",)),
}
