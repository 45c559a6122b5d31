"""A tuner whose adapters have rows of embeddings that train, tiny models for it, and the same models with the rows written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import support
from peft_core import Capability, PeftModel, SharedOptions, TunerSpec, get_peft_model
from support import DenseConfig

T = [5, 30, 2]
IDS = torch.tensor([[3, 1, 5, 30, 2, 0], [2, 2, 9, 5, 31, 4]])


@dataclass
class RowsConfig(DenseConfig):
    """DENSE with rows that train."""

    tokens: Any = None

    default_peft_type: ClassVar[str | None] = "ROWS"

    def shared_options(self) -> SharedOptions:
        return SharedOptions(modules_to_save=tuple(self.modules_to_save or ()), bias=self.bias, token_indices=self.tokens)


CAN = Capability.MERGE | Capability.PER_SAMPLE | Capability.EMBEDDING
ROWS = TunerSpec("ROWS", RowsConfig, support.DenseTuner, "dense_", capabilities=CAN)


def rows(tokens: Any = T, **fields: Any) -> RowsConfig:
    return RowsConfig(**{"target_modules": ["q_proj"], "tokens": tokens, **fields})


def llama(**kwargs: Any) -> Any:
    return support.llama(**{"tie_word_embeddings": True, **kwargs})


def bert(**kwargs: Any) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(**{**sizes, **kwargs})).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    return model


def gemma() -> Any:
    """A model that multiplies what it looks up by √dim."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_key_value_heads=1)).eval()


#: model, what its adapter targets
MODELS = {
    "tied": (llama, "q_proj"),
    "untied": (lambda: llama(tie_word_embeddings=False), "q_proj"),
    "bias": (bert, "query"),
    "scaled": (gemma, "q_proj"),
}


def new_rows(model: Any, adapter: str = "default", seed: int = 3) -> Tensor:
    """Give the rows of an adapter random values; returns them."""
    delta = table_of(model).token_adapter.trainable_tokens_delta[adapter]
    with torch.no_grad():
        delta.copy_(torch.randn(delta.shape, generator=torch.Generator().manual_seed(seed)))
    return delta.detach()


def base_weight(module: Any) -> torch.Tensor:
    return module.get_base_weight() if hasattr(module, "get_base_weight") else module.weight


def table_of(model: Any) -> Any:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.get_input_embeddings()


def logits(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **kwargs).logits
    return found


def overwritten(model: Any, values: Tensor, tokens: Sequence[int] = T) -> Any:
    """Return the plain model with rows written by hand."""
    with torch.no_grad():
        model.get_input_embeddings().weight[list(tokens)] = values.to(model.get_input_embeddings().weight.dtype)
    return model


def with_rows() -> PeftModel:
    """A tied llama whose rows T have other values than in the base."""
    found = get_peft_model(llama(), rows()).eval()
    new_rows(found)
    return found
