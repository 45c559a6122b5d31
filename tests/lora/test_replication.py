"""Layer replication: the base's layers several times, with adapters of their own."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lora.making import shake
from peft_core import ConfigError, MergeError, ModelError, NoMatchingPeftModuleError, PeftModel, get_peft_model
from peft_lora import LoraConfig
from support import DENSE, IDS, DenseConfig, Net, Unchanged, bert_classifier, gpt2, llama, registered

MAP = [[0, 3], [1, 4]]
ORDER = [0, 1, 2, 1, 2, 3]
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def base() -> nn.Module:
    return llama(num_hidden_layers=4, bos_token_id=None, eos_token_id=None, pad_token_id=0)


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "layer_replication": MAP, "task_type": "CAUSAL_LM", **options})


def written_out(small: nn.Module, large: nn.Module, stack: str, order: list[int] = ORDER) -> nn.Module:
    """Copy the layers of a model, in this order, into a larger one."""
    state = small.state_dict()

    def origin(key: str) -> str:
        if not key.startswith(f"{stack}."):
            return key
        number, _, rest = key.removeprefix(f"{stack}.").partition(".")
        return f"{stack}.{order[int(number)]}.{rest}"

    large.load_state_dict({key: state[origin(key)] for key in large.state_dict()})
    return large.eval()


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS)[0]


def gemma(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, num_hidden_layers=layers, sliding_window=2)).eval()


# ---- what the model computes ------------------------------------------------------------------------------------------------
ARCHITECTURES = {
    "llama": (base, lambda: llama(num_hidden_layers=6), "model.layers", "q_proj", ORDER, MAP),
    "bert": (lambda: bert_classifier(num_hidden_layers=4), lambda: bert_classifier(num_hidden_layers=6), "bert.encoder.layer", "query", ORDER, MAP),
    "gpt2": (lambda: gpt2(n_layer=4), lambda: gpt2(n_layer=6), "transformer.h", "c_attn", ORDER, MAP),
    # every second layer has a sliding window: twice the pair keeps what each layer is
    "gemma2": (lambda: gemma(2), lambda: gemma(4), "model.layers", "q_proj", [0, 1, 0, 1], [(0, 2), (0, 2)]),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_new_adapter_computes_what_the_larger_model_computes(name: str) -> None:
    small, large, stack, target, order, pairs = ARCHITECTURES[name]
    model = small()
    expected = logits(written_out(model, large(), stack, order))
    before = {key: id(parameter) for key, parameter in model.named_parameters()}
    adapted = get_peft_model(model, config(target_modules=[target], layer_replication=pairs, task_type=None, fan_in_fan_out=name == "gpt2")).eval()
    assert torch.equal(logits(adapted), expected)
    assert model.config.num_hidden_layers == len(order)
    # nothing of the base is copied, and each layer has an adapter of its own
    assert {id(p) for n, p in adapted.named_parameters() if "lora_" not in n} == set(before.values())
    assert len({id(p) for n, p in adapted.named_parameters() if "lora_A" in n}) == len(order)


def test_adapters_of_replicas_are_their_own() -> None:
    model = get_peft_model(base(), config()).eval()
    shake(model, size=0.3)
    twin = get_peft_model(written_out(base(), llama(num_hidden_layers=6), "model.layers"), config(layer_replication=None)).eval()
    shake(twin, size=0.3)
    assert torch.equal(logits(model), logits(twin))
    assert model.get_nb_trainable_parameters()[0] == 6 * 2 * (16 + 16)
    logits(model.train()).sum().backward()
    logits(twin.train()).sum().backward()
    for (_, ours), (_, theirs) in zip(
        ((n, p) for n, p in model.named_parameters() if p.requires_grad), ((n, p) for n, p in twin.named_parameters() if p.requires_grad), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_generation_has_a_cache_for_every_layer() -> None:
    model = get_peft_model(base(), config()).eval()
    large = written_out(base(), llama(num_hidden_layers=6, bos_token_id=None, eos_token_id=None, pad_token_id=0), "model.layers")
    call = {"input_ids": IDS, "max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(**call), large.generate(**call))
    assert [layer.self_attn.layer_idx for layer in model.get_base_model().model.layers] == list(range(6))


def test_settings_with_an_entry_for_each_layer_follow() -> None:
    model = gemma(4)
    types = list(model.config.layer_types)
    adapted = get_peft_model(model, config())
    assert model.config.layer_types == [types[number] for number in ORDER]
    adapted.unload()
    assert model.config.layer_types == types


# ---- several adapters, and the way back ---------------------------------------------------------------------------------------
def test_a_second_adapter_with_the_same_map_shares_the_layers(tmp_path: Path) -> None:
    model = get_peft_model(base(), config(), "a")
    layers = list(model.get_base_model().model.layers)
    model.add_adapter("b", config(target_modules=["v_proj"], layer_replication=[(0, 3), (1, 4)]))
    shake(model, size=0.3)
    assert list(model.get_base_model().model.layers) == layers
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path / "a", "a")
    assert again.load_adapter(tmp_path / "b", "b") == ([], [])
    assert again.load_adapter(tmp_path / "a", "a") == ([], [])
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("other", [None, [(0, 2), (0, 2)]])
def test_another_map_is_refused(other: Any) -> None:
    model = get_peft_model(base(), config(), "a")
    with Unchanged(model), pytest.raises(ConfigError, match=r"are those of layer_replication=\[\(0, 3\), \(1, 4\)\]; 'b' wants"):
        model.add_adapter("b", config(layer_replication=other))


def test_a_map_after_other_adapters_is_refused() -> None:
    model = get_peft_model(base(), config(layer_replication=None), "a")
    with Unchanged(model), pytest.raises(ConfigError, match=r"layer_replication=.* of 'b' changes which layers"):
        model.add_adapter("b", config())


def test_merging_is_refused_and_says_why() -> None:
    model = get_peft_model(base(), config())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with Unchanged(model), pytest.raises(MergeError, match="several layers share each weight"):
            merge()


@pytest.mark.parametrize("way", ["unload", "delete"])
def test_without_adapters_the_base_is_what_it_was(way: str) -> None:
    model = base()
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deleting the active one says which takes over
        with Unchanged(model):
            adapted = get_peft_model(model, config(), "a")
            adapted.add_adapter("b", config())
            if way == "delete":
                adapted.delete_adapter("a")
                assert len(model.model.layers) == 6
                adapted.delete_adapter("b")
            else:
                adapted.unload()
            model.requires_grad_(True)
            for record in ("_peft_index", "peft_config"):  # deleting all adapters leaves an adapted model without any
                model.__dict__.pop(record, None)
    assert torch.equal(logits(model), expected)


def test_after_the_last_one_was_deleted_others_see_the_original_layers() -> None:
    model = get_peft_model(base(), config(), "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("a")
    model.add_adapter("plain", config(layer_replication=None))
    assert len(model.base_model.targeted_module_names) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("plain")
    model.add_adapter("again", config())
    assert len(model.base_model.targeted_module_names) == 6


def test_layers_stay_while_another_method_has_weights_in_them() -> None:
    model = get_peft_model(base(), config(), "a")
    with warnings.catch_warnings(), registered(DENSE):
        warnings.simplefilter("ignore")
        model.add_adapter("dense", DenseConfig(target_modules=["v_proj"]))
        model.delete_adapter("a")
        assert len(model.get_base_model().model.layers) == 6
        model.delete_adapter("dense")
    assert len(model.get_base_model().model.layers) == 4


def test_copies_are_undone_by_themselves() -> None:
    model = get_peft_model(base(), config()).eval()
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    buffer.seek(0)
    loaded = pickle.load(buffer)
    assert len(twin.unload().model.layers) == 4
    assert len(loaded.unload().model.layers) == 4
    assert len(model.get_base_model().model.layers) == 6


# ---- failures ------------------------------------------------------------------------------------------------------------------
def test_a_failed_add_leaves_nothing_behind() -> None:
    model = base()
    before = copy.deepcopy(model.config.to_dict())
    with Unchanged(model), pytest.raises(NoMatchingPeftModuleError):
        get_peft_model(model, config(target_modules=["nope"]))
    assert model.config.to_dict() == before
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]


def test_a_number_that_the_base_does_not_have() -> None:
    model = base()
    with Unchanged(model), pytest.raises(ConfigError, match="names the layer 4, and LlamaForCausalLM has layers 0 to 3"):
        get_peft_model(model, config(layer_replication=[(0, 5)]))


def test_bases_without_one_stack() -> None:
    torch.manual_seed(0)
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4))
    with Unchanged(t5), pytest.raises(ModelError, match=r"several stacks of layers: 'encoder.block', 'decoder.block'"):
        get_peft_model(t5, config(target_modules=["q"], task_type=None))
    with pytest.raises(ModelError, match="no stack of layers"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), config(target_modules=["0"], task_type=None))


def test_a_stack_of_nobodys_library() -> None:
    torch.manual_seed(0)
    model = Net()
    x = torch.randn(3, 4)
    expected = model.head(model.last(model.layers[1](model.layers[0](model.layers[0](x)))))
    adapted = get_peft_model(model, LoraConfig(target_modules=["up"], layer_replication=[(0, 1), (0, 2)]))
    assert torch.equal(adapted(x), expected)


@pytest.mark.parametrize("pairs", [[], [(1, 1)], [(0, 1, 2)], [(-1, 2)], "01"])
def test_maps_that_are_none(pairs: Any) -> None:
    with pytest.raises(ConfigError, match="layer_replication"):
        LoraConfig(layer_replication=pairs)
