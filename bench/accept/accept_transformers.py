"""What transformers needs of the module `peft`: its adapter methods on plain models, files, pipelines, generation, checkpointing."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import _common  # first: it sets the environment
import torch
import transformers
from _common import bert, better, check, close, differ, folder, gradients, greedy, ids, lacking, llama, logits, no_meta, raises, randomise, same, t5
from _mixture import mixture
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import check_peft_version

import peft
from peft import LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model


def lora(**changes: Any) -> Any:
    """Return a LoRA config for the attention of the tiny models."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes})


def mixin(*names: str, **changes: Any) -> Any:
    """Return a plain Llama with one LoRA of noise for each name, added by transformers' own `add_adapter`; the last is active."""
    model = llama()
    for seed, name in enumerate(names):
        model.add_adapter(lora(**changes), name)
        randomise(model, name, seed=seed)
    return model.eval()


def saved_base() -> Path:
    """Return a folder with the tiny Llama."""
    path = folder() / "base"
    llama().save_pretrained(path)
    return path


def saved(model: Any) -> Path:
    """Return a new folder in which `model` saved itself."""
    path = folder() / "saved"
    model.save_pretrained(path)
    return path


def version() -> None:
    """The version gates (§1)."""
    check("peft.__version__ is 0.21.2", peft.__version__ == "0.21.2", peft.__version__)
    check("the distribution peft has that version", importlib.metadata.version("peft") == "0.21.2")
    check("is_peft_available", is_peft_available())
    check_peft_version("0.20.0")  # raises, if not
    check("peft is no namespace package", peft.__file__ is not None and peft.__spec__ is not None)


def life_cycle() -> None:
    """add, set, disable, enable and delete on a plain model (§3.1)."""
    base = logits(llama())
    model = llama()
    raises("add_adapter refuses what is no config", TypeError, lambda: llama().add_adapter({"r": 4}))
    raises("add_adapter refuses a prompt method", ValueError, lambda: llama().add_adapter(PromptTuningConfig(num_virtual_tokens=2)))
    model.add_adapter(config := lora(), "one")
    check("injection sets model.peft_config to the config itself", list(model.peft_config) == ["one"] and model.peft_config["one"] is config)
    check("a new adapter changes nothing", torch.equal(logits(model), base))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    check("only the adapter trains", trained and all(".lora_" in name and ".one." in name for name in trained))
    check("its name is ….lora_A.one.weight", "model.layers.0.self_attn.q_proj.lora_A.one.weight" in dict(model.named_parameters()))
    randomise(model, "one", seed=1)
    one = logits(model)
    check("an adapter of noise acts", differ(one, base))
    model.add_adapter(lora(target_modules=["q_proj"]), "two")
    randomise(model, "two", seed=2)
    two = logits(model)
    check("the adapter added last is active", model.active_adapters() == ["two"] and differ(two, one))
    model.set_adapter("one")
    check("set_adapter: one of them; a layer without it accepts the name", torch.equal(logits(model), one))
    model.set_adapter("two")
    layer = model.model.layers[0].self_attn.v_proj
    check("a layer that lacks the active adapter lists it", list(layer.active_adapters) == ["two"] and torch.equal(logits(model), two))
    model.set_adapter(["one", "two"])
    both = logits(model)
    check("active_adapters is a method and lists both", model.active_adapters() == ["one", "two"])
    check("two active adapters add up", differ(both, one) and differ(both, two))
    linear = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        x = torch.randn(3, 32)
        deltas = sum((8 / 4 * linear.lora_B[name](linear.lora_A[name](x)) for name in ("one", "two")), torch.zeros(3, 32))
        check("the layer's sum is base + Σ alpha/r·B A x", close(linear(x), linear.base_layer(x) + deltas))
    raises("set_adapter: an unknown name", ValueError, lambda: model.set_adapter("three"), "not found")
    model.disable_adapters()
    check("disable_adapters: the base", torch.equal(logits(model), base))
    model.enable_adapters()
    check("enable_adapters: as before", torch.equal(logits(model), both))
    model.delete_adapter("one")
    names = [name for name, _ in model.named_parameters() if "one" in name.split(".")]
    check("delete_adapter: no parameter of it is left", not names and list(model.peft_config) == ["two"])
    check("the other one acts as before", torch.equal(logits(model), two))
    model.delete_adapter(["two"])
    check("the last one gone: no peft_config, the base's output", not hasattr(model, "peft_config") and torch.equal(logits(model), base))
    model.add_adapter(lora(), "again")
    check("a new adapter can follow", torch.equal(logits(model), base) and model.active_adapters() == ["again"])


def files() -> None:
    """Saving by transformers, loading by both, and the other way round (§3.1, §3.2)."""
    base_path = saved_base()
    model = AutoModelForCausalLM.from_pretrained(base_path)
    model.add_adapter(lora(task_type="CAUSAL_LM"), "one")
    randomise(model, "one")
    expected = logits(model)
    plain = model.get_adapter_state_dict()
    keys = list(plain)
    check("get_adapter_state_dict: neither prefix nor adapter name", "model.layers.0.self_attn.q_proj.lora_A.weight" in keys and len(keys) == 8)
    path = saved(model)
    written = load_file(path / "adapter_model.safetensors")
    check("the file: the same with base_model.model. before it", same(written, {f"base_model.model.{key}": value for key, value in plain.items()}))
    content = json.loads((path / "adapter_config.json").read_text())
    said = [content[key] for key in ("peft_type", "peft_version", "base_model_name_or_path")]
    check("the config names the method, the version, and the base it was loaded from", said == ["LORA", "0.21.2", str(base_path)], said)
    check("no config.json beside an adapter", not (path / "config.json").exists())
    model.save_pretrained(other := folder(), save_peft_format=False)
    check("save_peft_format=False: the plain keys", load_file(other / "adapter_model.safetensors").keys() == plain.keys())

    loaded = llama()
    loaded.load_adapter(path, adapter_name="zwei")
    check("load_adapter: equal output under another name", close(logits(loaded), expected) and loaded.active_adapters() == ["zwei"])
    if not lacking(">=5.0,<5.4", "load_adapter freezes an adapter that it loads for inference"):
        check("loaded for inference: eval mode, nothing trains", not loaded.training and not any(p.requires_grad for p in adapter(loaded)))
    check("nothing is left on meta", no_meta(loaded))
    trainable = llama()
    trainable.load_adapter(path, is_trainable=True)
    trains = all(parameter.requires_grad for parameter in adapter(trainable))
    check("is_trainable: the adapter trains", trains and not trainable.peft_config["default"].inference_mode)
    given = llama()
    given.load_adapter(peft_config=lora(), adapter_state_dict=plain, adapter_name="given")
    check("load_adapter from tensors and a config", close(logits(given), expected))
    arguments = {"cache_dir": str(folder()), "force_download": False, "local_files_only": True, "token": None}
    (many := llama()).load_adapter(path, adapter_kwargs=arguments)
    check("download arguments reach PeftConfig.from_pretrained", close(logits(many), expected))
    wrapped = PeftModel.from_pretrained(llama(), path)
    check("PeftModel reads what transformers wrote", close(logits(wrapped), expected) and type(wrapped).__name__ == "PeftModelForCausalLM")
    (back := llama()).load_adapter(saved(wrapped))
    check("transformers reads what PeftModel wrote", close(logits(back), expected))
    auto = AutoModelForCausalLM.from_pretrained(path)
    names = list(auto.peft_config)
    check("AutoModel.from_pretrained of an adapter's folder: base and adapter", close(logits(auto), expected) and names == ["default"])
    automatic = peft.AutoPeftModelForCausalLM
    check("AutoPeftModelForCausalLM likewise", close(logits(automatic.from_pretrained(path)), expected))
    loaded.save_pretrained(whole := folder())
    llama().save_pretrained(whole)
    both = AutoModelForCausalLM.from_pretrained(whole)
    check("with a config.json beside it, the base is that of the folder", close(logits(both), expected))
    untold = AutoModelForCausalLM.from_pretrained(base_path)
    untold.add_adapter(lora())
    bare = saved(untold)
    better("§11.9: …also where the config has no task_type", lambda: close(logits(automatic.from_pretrained(bare)), logits(untold)))
    two = mixin("a", "b")
    two.set_adapter(["a", "b"])
    raises("save_pretrained with two active adapters", ValueError, lambda: two.save_pretrained(folder()))
    if lacking("<5", "use_safetensors of load_adapter"):
        return
    torch.save(written, other / "adapter_model.bin")
    (other / "adapter_model.safetensors").unlink()
    (from_bin := llama()).load_adapter(other, use_safetensors=False)
    check("load_adapter of an adapter_model.bin", close(logits(from_bin), expected))


def adapter(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters of all LoRA adapters of a model."""
    found = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    assert found
    return found


def mapping() -> None:
    """`build_peft_weight_mapping` (§3.1)."""
    if lacking("<5", "conversions of weights"):
        return
    from transformers.core_model_loading import WeightRenaming

    from peft.utils.transformers_weight_conversion import build_peft_weight_mapping

    check("no conversions: an empty list", build_peft_weight_mapping(None, "default") == [])
    given = WeightRenaming("left", "right")
    rules = build_peft_weight_mapping([given], "ad", peft_config=lora())
    check("a list of transformers' renamings, the given ones last", all(isinstance(r, WeightRenaming) for r in rules) and rules[-1] is given)

    def renamed(key: str, rules: Any) -> str:
        for rule in rules:
            key, _ = rule.rename_source_key(key)
        return key

    name = renamed("base_model.model.model.q_proj.lora_A.weight", rules)
    check("prefix off, adapter name in", name == "model.q_proj.lora_A.ad.weight", name)
    name = renamed("base_model.model.q_proj.hada_w1_a", build_peft_weight_mapping([given], "ad", peft_config=LoHaConfig()))
    check("LoHa by its own prefix", name == "q_proj.hada_w1_a.ad", name)
    name = renamed("base_model.model.q_proj.hada_w1_a", build_peft_weight_mapping([given], "ad"))
    check("without a config: the prefix of every method", name == "q_proj.hada_w1_a.ad", name)


def hotswap() -> None:
    """transformers' hotswap loads over an existing adapter (§3.1)."""
    if lacking("<5", "enable_peft_hotswap"):
        return
    first, second = saved(mixin("a")), saved(mixin("b", "a"))
    target = logits(mixin("b", "a"))
    model = llama()
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(first, adapter_name="default")
    before = logits(model)
    model.load_adapter(second, adapter_name="default")
    check("another adapter of equal r and alpha: its output", differ(before, target) and close(logits(model), target))
    larger = saved(mixin("a", r=6))
    raises("another rank", RuntimeError, lambda: model.load_adapter(larger, adapter_name="default", hotswap=True), "size")
    raises("hotswap of an unknown name", ValueError, lambda: model.load_adapter(first, adapter_name="new", hotswap=True))


def saved_heads() -> None:
    """`modules_to_save` on plain models (§3.1, §11.2)."""
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper

    model = bert()
    base = logits(model)
    model.add_adapter(lora(target_modules=["query"], modules_to_save=["classifier"]))
    wrapper = model.classifier
    check("the head is wrapped, and is no adapter layer", isinstance(wrapper, ModulesToSaveWrapper) and isinstance(wrapper, AuxiliaryTrainingWrapper))
    load_map = wrapper.adapter_state_dict_load_map("default")
    check("adapter_state_dict_load_map", load_map["weight"] == "modules_to_save.default.weight" and "bias" in load_map, load_map)
    randomise(model)
    expected = logits(model)
    trains = [part.weight.requires_grad for part in (wrapper.modules_to_save["default"], wrapper.original_module)]
    check("the copy trains, the original does not", trains == [True, False])
    check("the copy acts", differ(expected, base))
    path = saved(model)
    keys = load_file(path / "adapter_model.safetensors")
    check("the head's keys have no infix", {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= keys.keys())
    if not lacking(">=5.0,<5.18", "load_adapter asks a saved head for the names of its parameters"):
        loaded = bert()
        loaded.load_adapter(path)
        check("load_adapter fills the head", close(logits(loaded), expected) and no_meta(loaded))
    wrapped = PeftModel.from_pretrained(bert(), path)
    check("PeftModel fills the head", close(logits(wrapped), expected))
    model.disable_adapters()
    check("disable_adapters: the original head", torch.equal(logits(model), base))
    wrapper.enable_adapters(True)
    model.enable_adapters()
    check("enabled again: the copy", torch.equal(logits(model), expected))
    wrapper.set_adapter(["default"])
    check("the wrapper accepts a list of one", torch.equal(logits(model), expected))

    def back_again() -> bool:
        model.disable_adapters()
        model.enable_adapters()
        model.set_adapter("default")
        return torch.equal(logits(model), expected)

    better("§11.2: enable_adapters, or set_adapter after it, brings saved heads back", back_again)


def token_rows() -> None:
    """Trained token rows on plain models (§3.1)."""
    model = llama()
    base = logits(model)
    model.add_adapter(lora(trainable_token_indices=[5, 9]))
    check("fresh rows change nothing", torch.equal(logits(model), base))
    randomise(model)
    expected = logits(model)
    path = saved(model)
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    check("the file holds the rows", load_file(path / "adapter_model.safetensors")[key].shape == (2, 32))
    load_map = model.model.embed_tokens.adapter_state_dict_load_map("default")
    want = {"token_adapter.trainable_tokens_delta": "token_adapter.trainable_tokens_delta.default"}
    check("adapter_state_dict_load_map of the rows", load_map == want, load_map)
    tokens = torch.tensor([[5, 9, 7, 5]])
    if not lacking(">=5.0,<5.18", "load_adapter asks token rows for the names of their parameters"):
        loaded = llama()
        loaded.load_adapter(path)
        check("load_adapter fills the rows", close(logits(loaded, tokens), logits(model, tokens)) and close(logits(loaded), expected))
    model.delete_adapter("default")
    check("deleted: the base", torch.equal(logits(model, tokens), logits(llama(), tokens)))


def other_methods() -> None:
    """LoHa, DoRA and low precision on plain models (§3.1, §11.1)."""
    base = logits(llama())
    model = llama()
    model.add_adapter(LoHaConfig(r=2, target_modules=["q_proj"]), "a")
    randomise(model, "a", scale=0.5)
    expected = logits(model)
    path = saved(model)
    check("LoHa: file keys", "base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a" in load_file(path / "adapter_model.safetensors"))
    loaded = llama()
    loaded.load_adapter(path, adapter_name="b")
    check("LoHa: loaded, equal", differ(expected, base) and close(logits(loaded), expected))
    model.delete_adapter("a")
    rest = [name for name, _ in model.named_parameters() if "hada" in name]
    check("LoHa: deleted although transformers names a wrong prefix", not rest and torch.equal(logits(model), base))
    half = llama().to(torch.bfloat16)
    half.add_adapter(lora())
    check("injected without a wrapper, adapters have the base's dtype", {p.dtype for p in adapter(half)} == {torch.bfloat16})
    wrapped = get_peft_model(llama().to(torch.bfloat16), lora())
    check("PeftModel's are float32", {p.dtype for p in adapter(wrapped)} == {torch.float32})
    check("both run in bfloat16", {logits(half).dtype, logits(wrapped).dtype} == {torch.bfloat16})
    dora = llama()
    dora.add_adapter(lora(use_dora=True))
    with torch.no_grad():
        for name, parameter in dora.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5) if "magnitude" in name else parameter.add_(0.05)
    path, want = saved(dora), logits(dora)

    def magnitudes_arrive() -> bool:
        fresh = llama()
        fresh.load_adapter(path)
        return close(logits(fresh), want)

    if not lacking(">=5.0,<5.13", "load_adapter asks peft for the names of an adapter's parameters"):
        better("§11.1: DoRA's magnitudes arrive through load_adapter", magnitudes_arrive)
    check("DoRA through PeftModel", close(logits(PeftModel.from_pretrained(llama(), path)), want))


def pipelines() -> None:
    """Pipelines accept our classes by name, and adapter folders (§3.4)."""
    pipeline: Any = transformers.pipeline
    words = _common.tokenizer()
    model: Any = get_peft_model(llama(), lora(task_type="CAUSAL_LM"))
    randomise(model)
    made = pipeline("text-generation", model=model.eval(), tokenizer=words)
    text = made("w4 w5 w6", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    want = model.generate(**words("w4 w5 w6", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4, do_sample=False)
    check("text-generation with PeftModelForCausalLM", text.strip() == words.decode(want[0, 3:], skip_special_tokens=True), text)
    classes = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering"}
    tasks = {"SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification", "FEATURE_EXTRACTION": "feature-extraction"}
    for task, part in {**classes, "FEATURE_EXTRACTION": "FeatureExtraction"}.items():
        base = bert(cls=f"BertFor{part}" if task in classes else "BertModel")
        tuned = get_peft_model(base, lora(target_modules=["query"], task_type=task))
        check(f"the class of {task}", type(tuned).__name__ == f"PeftModelFor{part}")
        if task in tasks:
            answer = pipeline(tasks[task], model=tuned.eval(), tokenizer=words)("w4 w5 w6")
            check(f"pipeline {tasks[task]}", isinstance(answer, list) and len(answer) > 0)
    base_path = saved_base()
    words.save_pretrained(base_path)
    based = AutoModelForCausalLM.from_pretrained(base_path)
    based.add_adapter(lora(task_type="CAUSAL_LM"))
    path = saved(based)
    words.save_pretrained(path)
    check("a folder with an adapter as model=", len(pipeline("text-generation", model=str(path))("w4 w5", max_new_tokens=2)) == 1)


def generation() -> None:
    """`generate` on plain and wrapped models, with prompt methods too (§3.5)."""
    tokens, options = ids(2, 5), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = mixin("a")
    check("mixin: generate is the argmax loop", torch.equal(plain.generate(tokens, **options), greedy(plain, tokens, 5)))
    configs = {
        "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    for name, config in configs.items():
        model: Any = get_peft_model(llama(), config).eval()
        randomise(model, scale=0.8)
        check(f"{name}: generate is the argmax loop", torch.equal(model.generate(input_ids=tokens, **options), greedy(model, tokens, 5)))
        check(f"{name}: beams", model.generate(input_ids=tokens, num_beams=3, **options).shape == (2, 10))
        padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), tokens], 1)
        out = model.generate(input_ids=padded, attention_mask=(padded != 0).long(), **options)
        check(f"{name}: left padding changes nothing", torch.equal(out[:, 2:], greedy(model, tokens, 5)))
        check(f"{name}: saved and loaded", close(logits(PeftModel.from_pretrained(llama(), saved(model))), logits(model)))
    encoder: Any = get_peft_model(t5(), lora(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")).eval()
    randomise(encoder)
    out = encoder.generate(input_ids=tokens, max_new_tokens=4, do_sample=False)
    check("encoder–decoder: generate", out.shape[0] == 2 and type(encoder).__name__ == "PeftModelForSeq2SeqLM")


def checkpointing() -> None:
    """Gradients are the slope of the loss, and gradient checkpointing gives the same ones (§3.3)."""
    model, tokens = mixin("a").double(), ids()
    parameter, direction = model.model.layers[0].self_attn.q_proj.lora_A["a"].weight, torch.randn(4, 32, dtype=torch.float64)
    slope = (gradients(model)["model.layers.0.self_attn.q_proj.lora_A.a.weight"] * direction).sum()
    losses = []
    for step in (0.01, -0.01):  # large: the norms of the base compute in float32
        with torch.no_grad():
            parameter.add_(step * direction)
            losses.append(model(input_ids=tokens, labels=tokens).loss)
            parameter.sub_(step * direction)
    check("the gradient is the slope of the loss", close(slope, (losses[0] - losses[1]) / 0.02, 1e-4), slope)
    for reentrant in (False, True):
        for kind in ("mixin", "PeftModel"):
            torch.manual_seed(3)
            model = mixin("a") if kind == "mixin" else get_peft_model(llama(), lora(init_lora_weights=False))
            want = gradients(model)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant and kind == "PeftModel":
                model.enable_input_require_grads()
            got = gradients(model)
            equal = want.keys() == got.keys() and len(want) == 8 and all(close(want[k], got[k]) for k in want)
            check(f"checkpointing, {kind}, reentrant={reentrant}: equal gradients", equal)


THEMES = [version, life_cycle, files, mapping, hotswap, saved_heads, token_rows, other_methods, mixture, pipelines, generation, checkpointing]

if __name__ == "__main__":
    _common.lift_version_gate()
    _common.run("accept_transformers", THEMES)
