"""Code written for the peer gives the same numbers here: what was silently wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import peft
from compat.tiny import IDS, llama, mixtral, net, outputs, randomise, rows, step, worst

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})


def tensors(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def settings(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())


# ---- starts that change the base: saving and unloading -----------------------------------------------------------------


def prepared(init: str, base: Any) -> Any:
    """Return a model with a start that changes the base."""
    if init == "corda":
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        config = lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
        preprocess_corda(base, config, run_model=lambda: outputs(base, IDS[:1]))
        return peft.get_peft_model(base, config)
    if init == "lora_ga":
        config = lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
        peft.preprocess_loraga(base, config, lambda: base(input_ids=IDS, labels=IDS).loss.backward())
        base.zero_grad()
        return peft.get_peft_model(base, config)
    return peft.get_peft_model(base, lora(init_lora_weights=init))


INITS = ["pissa", "olora", "corda", "lora_ga"]


@pytest.mark.parametrize("init", INITS)
def test_a_start_that_changed_the_base_is_converted_although_the_config_was_edited(init: str, tmp_path: Path) -> None:
    """The recipe of the peer's examples: `init_lora_weights = True` first, then save, train, save with the conversion."""
    model = prepared(init, llama())
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    step(model)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert settings(tmp_path / "out")["r"] == 8
    found = peft.PeftModel.from_pretrained(llama(), tmp_path / "out")
    assert worst(outputs(found), expected) < 1e-4


@pytest.mark.parametrize("init", INITS)
def test_the_residual_after_unload_and_the_saved_adapter_make_the_model_again(init: str, tmp_path: Path) -> None:
    """`unload()` gives the residual, which recipes save beside the adapter."""
    model = prepared(init, llama())
    randomise(model, scale=0.2)
    expected = outputs(model)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "adapter")
    residual = model.unload()
    residual.save_pretrained(tmp_path / "base")
    again = type(residual).from_pretrained(tmp_path / "base")
    found = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert worst(outputs(found), expected) < 1e-4


@pytest.mark.parametrize("init", [True, False])
def test_an_adapter_loaded_on_the_residual_is_converted_when_saved(init: bool, tmp_path: Path) -> None:
    model = prepared("pissa", llama())
    model.peft_config["default"].init_lora_weights = init
    model.save_pretrained(tmp_path / "initial")
    residual = llama()
    with torch.no_grad():
        for path, module in model.get_base_model().named_modules():
            if hasattr(module, "base_layer"):
                residual.get_submodule(path).weight.copy_(module.base_layer.weight)
    model = peft.PeftModel.from_pretrained(residual, tmp_path / "initial", is_trainable=True)
    step(model)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert settings(tmp_path / "out")["r"] == 8
    assert tensors(tmp_path / "out")["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] == 8
    found = peft.PeftModel.from_pretrained(llama(), tmp_path / "out")
    assert worst(outputs(found), expected) < 1e-4


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_a_file_whose_start_needs_data_is_refused_on_the_original_base_or_gives_the_same(init: str, tmp_path: Path) -> None:
    """Its base was changed by data that the file does not hold: silently loading it on the original base is wrong."""
    model = prepared(init, llama())
    randomise(model, scale=0.2)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    try:
        found = peft.PeftModel.from_pretrained(llama(), tmp_path)
    except (ValueError, RuntimeError, peft.PeftError):
        return
    assert worst(outputs(found), expected) < 1e-4


# ---- what is merged, saved, generated ----------------------------------------------------------------------------------


def test_layers_switched_one_by_one_are_merged_as_they_are_switched() -> None:
    model = peft.get_peft_model(net(), peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False), "a")
    model.add_adapter("b", peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    randomise(model, "a")
    randomise(model, "b", seed=8)
    model.get_base_model()[2].set_adapter(["b"])
    expected = model(rows())
    model.merge_adapter()
    assert worst(model(rows()), expected) < 1e-4
    model.unmerge_adapter()
    assert worst(model(rows()), expected) < 1e-4


CACHED = """
    import json, os, sys, warnings
    from pathlib import Path
    warnings.simplefilter("ignore")
    hub = Path(sys.argv[1])
    os.environ.update(HF_HUB_CACHE=str(hub), HF_HUB_OFFLINE="1")
    import torch, transformers, peft
    from compat.tiny import llama
    place = hub / "models--someone--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    llama().save_pretrained(place / "snapshots" / ("0" * 40))
    base = transformers.AutoModelForCausalLM.from_pretrained("someone/tiny")
    base.resize_token_embeddings(70)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    print(json.dumps(sorted(key for key in peft.get_peft_model_state_dict(model) if "embed" in key or "lm_head" in key)))
"""


def test_resized_embeddings_of_a_base_in_the_local_cache_are_saved(tmp_path: Path) -> None:
    code = textwrap.dedent(CACHED)
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout.splitlines()[-1]) == ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]


TOKENS: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
BEFORE_TEXT = {
    "prompt": lambda: peft.PromptTuningConfig(**TOKENS),
    "p-tuning": lambda: peft.PromptEncoderConfig(**TOKENS, encoder_hidden_size=8),
    "prefix": lambda: peft.PrefixTuningConfig(**TOKENS),
}


@pytest.mark.parametrize("method", BEFORE_TEXT)
def test_a_second_turn_of_generate_continues_the_returned_cache(method: str) -> None:
    """A chat: the cache of the first turn is handed to the second; the logits are those of a call without it."""
    model = peft.get_peft_model(llama(), BEFORE_TEXT[method]()).eval()
    randomise(model, scale=1.0)
    how = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, **how)
    turn = torch.cat([first.sequences, IDS[:, :2]], 1)
    expected = model.generate(input_ids=turn, attention_mask=torch.ones_like(turn), max_new_tokens=4, **how)
    found = model.generate(input_ids=turn, attention_mask=torch.ones_like(turn), max_new_tokens=4, past_key_values=first.past_key_values, **how)
    assert worst(torch.stack(found.logits), torch.stack(expected.logits)) < 1e-4
    assert found.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_a_generation_config_that_is_set_on_the_model_is_used(method: str) -> None:
    import transformers

    config = lora() if method == "lora" else peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config).eval()
    model.generation_config = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    assert found.shape == (2, IDS.shape[1] + 2)
    assert model.generation_config.max_new_tokens == 2


# ---- compiled bases ----------------------------------------------------------------------------------------------------


def test_an_adapter_is_loaded_into_a_compiled_base(tmp_path: Path) -> None:
    model = randomise(peft.get_peft_model(llama(), lora(task_type=None)))
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    compiled = torch.compile(llama(), backend="eager")
    found = peft.PeftModel.from_pretrained(compiled, tmp_path)
    assert worst(outputs(found), expected) < 1e-5


def test_names_in_a_file_of_a_compiled_base_are_those_of_the_plain_base(tmp_path: Path) -> None:
    config = lora(task_type=None)
    plain = set(peft.get_peft_model_state_dict(peft.get_peft_model(llama(), config)))
    model = peft.get_peft_model(torch.compile(llama(), backend="eager"), lora(task_type=None))
    model.save_pretrained(tmp_path)
    assert set(tensors(tmp_path)) == plain


# ---- mixtures of experts -----------------------------------------------------------------------------------------------


def targets(model: nn.Module) -> set[str]:
    return {
        name.removeprefix("base_model.model.").split(".lora_A")[0].replace(".base_layer", "")
        for name, _ in model.named_parameters()
        if ".lora_A" in name
    }


def test_all_linear_adapts_fused_experts() -> None:
    model = peft.get_peft_model(mixtral(), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert any(name.endswith("mlp.experts") for name in targets(model)), sorted(targets(model))


def test_all_linear_adapts_the_router_of_fused_experts() -> None:
    model = peft.get_peft_model(mixtral(), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert any(name.endswith("mlp.gate") for name in targets(model)), sorted(targets(model))


def old_mixtral_file(folder: Path, targets: Any) -> dict[str, Tensor]:
    """Write an adapter as it was made when each expert was a module (transformers 4)."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}."
        sizes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32)}
        sizes["block_sparse_moe.gate"] = (3, 32)
        for expert in range(3):
            for name, shape in {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}.items():
                sizes[f"block_sparse_moe.experts.{expert}.{name}"] = shape
        for path, (out, inp) in sizes.items():
            found[f"{stem}{path}.lora_A.weight"] = torch.randn(2, inp, generator=generator) * 0.3
            found[f"{stem}{path}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * 0.3
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return found


def by_hand(found: dict[str, Tensor]) -> Any:
    """Return the base with the deltas of an old file added to its weights."""
    base = mixtral()
    delta = {key.removesuffix(".lora_A.weight"): 1.5 * found[key.replace("lora_A", "lora_B")] @ found[key] for key in found if "lora_A" in key}
    with torch.no_grad():
        for layer, block in enumerate(base.model.layers):
            stem = f"base_model.model.model.layers.{layer}."
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(block.self_attn, name).weight += delta[f"{stem}self_attn.{name}"]
            block.mlp.gate.weight += delta[f"{stem}block_sparse_moe.gate"]
            for expert in range(3):
                w1, w2, w3 = (delta[f"{stem}block_sparse_moe.experts.{expert}.{name}"] for name in ("w1", "w2", "w3"))
                block.mlp.experts.gate_up_proj[expert] += torch.cat([w1, w3])
                block.mlp.experts.down_proj[expert] += w2
    return base


OLD_TARGETS = {"listed": ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"], "all-linear": "all-linear"}


def loaded(loader: str, folder: Path) -> Any:
    """Return a Mixtral with the adapter in a folder, read by one of the two loaders."""
    if loader == "peft":
        return peft.PeftModel.from_pretrained(mixtral(), folder)
    model = mixtral()
    model.load_adapter(str(folder))
    return model


@pytest.mark.parametrize("how", OLD_TARGETS)
@pytest.mark.parametrize("loader", ["peft", "transformers"])
def test_an_old_adapter_of_mixtral_gives_the_outputs_it_gave(loader: str, how: str, tmp_path: Path) -> None:
    found = old_mixtral_file(tmp_path, OLD_TARGETS[how])
    expected = outputs(by_hand(found))
    assert worst(outputs(loaded(loader, tmp_path)), expected) < 1e-4


@pytest.mark.parametrize("loader", ["peft", "transformers"])
def test_a_dense_layer_of_a_mixture_named_in_full_is_loaded(loader: str, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    model = randomise(peft.get_peft_model(mixtral(), peft.LoraConfig(r=2, target_modules=[name], task_type="CAUSAL_LM")))
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    assert worst(outputs(loaded(loader, tmp_path)), expected) < 1e-5


@pytest.mark.parametrize("loader", ["peft", "transformers"])
def test_an_old_adapter_with_dropout_gives_the_outputs_it_gave(loader: str, tmp_path: Path) -> None:
    """Inputs of parameters can't be dropped: the peer raises ValueError."""
    found = old_mixtral_file(tmp_path, OLD_TARGETS["listed"])
    config = settings(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.05}))
    if loader == "peft":
        model = peft.PeftModel.from_pretrained(mixtral(), tmp_path)
    else:
        model = mixtral()
        model.load_adapter(str(tmp_path))
    assert worst(outputs(model), outputs(by_hand(found))) < 1e-4
