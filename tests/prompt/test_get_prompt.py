"""What `get_prompt` returns: the layout of keys and values, caches of a given size; and the base's own preparation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prompt.families import N, made


def test_layout_of_keys_and_values() -> None:
    """Row j of the table is viewed as (2·layers, heads, head_dim): index 2i is the key of layer i, 2i + 1 its value."""
    model = made("prefix", "llama")
    table = model.get_prompt_embedding_to_save("default")
    layers, heads, width = 2, 2, 8
    cache = model.get_prompt(3)
    for layer in range(layers):
        for which, found in enumerate((cache.layers[layer].keys, cache.layers[layer].values)):
            assert found.shape == (3, heads, N, width)
            for token in range(N):
                for head in range(heads):
                    start = ((2 * layer + which) * heads + head) * width
                    assert torch.equal(found[1, head, token], table[token, start : start + width])


def test_a_cache_of_a_given_size() -> None:
    model = made("prefix", "llama")
    cache: Any = model.get_prompt(2, max_cache_len=20)
    assert type(cache).__name__ == "StaticCache"
    assert cache.layers[0].keys.shape[2] == 20
    assert torch.equal(cache.layers[1].values[:, :, :N], model.get_prompt(2).layers[1].values)
    two: Any = made("prefix", "t5").get_prompt(2, max_cache_len=20)
    assert two.self_attention_cache.layers[0].keys.shape[2] == 20


def test_the_bases_own_preparation() -> None:
    for family in ("llama", "t5"):
        model: Any = made("prefix", family)
        base = model.get_base_model()
        assert model.base_model_prepare_inputs_for_generation.__func__ is type(base).prepare_inputs_for_generation
    own = getattr(base, "_prepare_encoder_decoder_kwargs_for_generation", None)  # transformers 5.23 has none
    assert model.base_model_prepare_encoder_decoder_kwargs_for_generation == own


@pytest.mark.parametrize("method", ["prompt", "p-tuning-mlp", "p-tuning-lstm", "multitask"])
def test_tokens_of_both_submodules(method: str) -> None:
    """On an encoder-decoder model all of the table is returned, also what no forward uses; the forward goes on using the first half."""
    model = made(method, "t5")
    tasks: dict[str, Any] = {"task_ids": torch.tensor([2, 0, 1])} if method == "multitask" else {}
    found = model.get_prompt(3, **tasks)
    assert found.shape == (3, 2 * N, 32)
    if not tasks:
        assert torch.allclose(found[1], model.get_prompt_embedding_to_save("default"), atol=1e-6)
        with torch.no_grad():
            assert torch.allclose(model.get_prompt(3), found, atol=1e-6)
    single = made(method, "t5", num_transformer_submodules=1)
    assert single.get_prompt(3, **tasks).shape == (3, N, 32)
