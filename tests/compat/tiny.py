"""Tiny models from configs, and what tests of the drop-in compare. Only names of `peft`: these tests run on the peer as well."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 64
IDS = torch.tensor([[3, 9, 4, 17, 5, 6], [9, 22, 6, 5, 33, 8]])
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(seed: int = 0, cls: str = "LlamaForCausalLM", **changes: Any) -> Any:
    """Return a Llama of two layers with random weights, the same ones each time."""
    torch.manual_seed(seed)
    return getattr(transformers, cls)(transformers.LlamaConfig(**{**SIZES, **changes})).eval()


def mixtral(seed: int = 0, **changes: Any) -> Any:
    """Return a mixture of three experts."""
    sizes = {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2, **changes}
    torch.manual_seed(seed)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()


def bert(seed: int = 0, cls: str = "BertForSequenceClassification", **changes: Any) -> Any:
    """Return a BERT of two layers without dropout."""
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    torch.manual_seed(seed)
    config = transformers.BertConfig(**{**sizes, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **changes})
    return getattr(transformers, cls)(config).eval()


def net(seed: int = 0) -> nn.Sequential:
    """Return a small net that is no transformers model."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def rows(seed: int = 1) -> Tensor:
    """Return input of `net`."""
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))


def outputs(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    """Return logits in evaluation, without gradients."""
    model.eval()
    with torch.no_grad():
        found = model(input_ids=ids, **inputs)
    return found.logits if hasattr(found, "logits") else found[0]


def randomise(model: nn.Module, adapter: str = "default", scale: float = 0.3, seed: int = 7) -> Any:
    """Fill the tensors of an adapter with noise, so that it has an effect, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    found = [p for name, p in model.named_parameters() if adapter in name.split(".")]
    assert found, f"no parameter of {adapter!r}"
    with torch.no_grad():
        for p in found:
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


def step(model: Any, lr: float = 0.05, steps: int = 3) -> None:
    """Train a few steps on fixed tokens."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def worst(left: Tensor, right: Tensor) -> float:
    """Return the largest difference."""
    return float((left.float() - right.float()).abs().max())
