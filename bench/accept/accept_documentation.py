"""What users of the module `peft` write: scripts in the style of its guides, tutorials, model cards and notebooks, on tiny models."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import _common  # first: it sets the environment
import torch
from _common import bert, better, check, close, differ, folder, llama, logits, raises, randomise, same, t5, tokenizer
from _documentation import MASK, TOKENS, figures, generated, lora, query, saved, train, two, unchanged
from torch import Tensor, nn

import peft
from peft import (
    AutoPeftModelForCausalLM,
    CPTConfig,
    LoHaConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)


def quicktour() -> None:
    """Config, wrapping, training, saving, loading, inference."""
    torch.manual_seed(0)
    config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.0)
    model = get_peft_model(t5(), config)
    check("trainable and all parameters", model.get_nb_trainable_parameters() == (6144, 45696), model.get_nb_trainable_parameters())
    figures("quicktour", train(model))
    path = saved(model)
    check("files", {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in path.iterdir()})
    loaded = PeftModel.from_pretrained(t5(), path)
    check("loaded for inference", loaded.peft_config["default"].inference_mode and not any(p.requires_grad for p in loaded.parameters()))
    check("loaded equals trained", close(loaded(input_ids=TOKENS, labels=TOKENS).logits, model(input_ids=TOKENS, labels=TOKENS).logits))
    check("generate", loaded.generate(input_ids=TOKENS, max_new_tokens=4).shape[0] == 2)


def classifiers() -> None:
    """Sequences, tokens, questions, features."""
    torch.manual_seed(0)
    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, bias="all"))
    figures("seq_cls", train(model, labels=lambda step: torch.tensor([step % 3, 1])))
    path = saved(model)
    loaded = PeftModel.from_pretrained(bert(), path, is_trainable=True)
    check("head, biases and LoRA come back", close(logits(loaded), logits(model)))
    check("and train", loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters())
    check("merged equals unmerged", close(logits(loaded.merge_and_unload()), logits(model)))
    for cls, task, count in [("BertForTokenClassification", "TOKEN_CLS", 1123), ("BertModel", "FEATURE_EXTRACTION", 1024)]:
        wrapped = get_peft_model(bert(cls=cls), LoraConfig(task_type=task, r=4))
        check(f"{task}: trainable parameters", wrapped.get_nb_trainable_parameters()[0] == count, wrapped.get_nb_trainable_parameters())
    model.add_adapter("b", LoraConfig(task_type="SEQ_CLS", r=2, bias="none"))
    model.set_adapter("b")
    flags = {name.split(".modules_to_save.")[1].split(".")[0]: p.requires_grad for name, p in model.named_parameters() if ".modules_to_save." in name}
    check("each adapter has a head; that of the active one trains", flags == {"default": False, "b": True}, flags)


def causal() -> None:
    """Auto classes, configs, the state dict of old training scripts, merged models of their own."""
    base = folder()
    llama().save_pretrained(base)
    model = lora(seed=None, lora_alpha=16)
    figures("causal", train(model))
    model.peft_config["default"].base_model_name_or_path = str(base)
    path = saved(model)
    loaded = AutoPeftModelForCausalLM.from_pretrained(path)
    check("AutoPeftModelForCausalLM", close(logits(loaded), logits(model)) and type(loaded).__name__ == "PeftModelForCausalLM")
    raises("the class for another task", ValueError, lambda: peft.AutoPeftModelForSeq2SeqLM.from_pretrained(path))
    config = PeftConfig.from_pretrained(path)
    check("PeftConfig.from_pretrained", isinstance(config, LoraConfig) and config.base_model_name_or_path == str(base) and config.r == 4)
    given: Any = {"torch_dtype": torch.float16, "device_map": "auto", "offload_folder": "x"}  # as in many model cards
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check("keywords of whole models are let pass", close(logits(PeftModel.from_pretrained(llama(), path, **given)), logits(model)))
        check("a cell that runs twice", get_peft_model(lora(), lora().peft_config["default"]).get_nb_trainable_parameters()[0] == 896)
    merged = saved(copy.deepcopy(model).merge_and_unload())
    from transformers import AutoModelForCausalLM

    check("a merged model is saved as a plain one", close(logits(AutoModelForCausalLM.from_pretrained(merged)), logits(model)))
    old = model.state_dict
    model.state_dict = (lambda self, *_, **__: get_peft_model_state_dict(self, old())).__get__(model, type(model))
    check("the patched state_dict of old scripts saves", close(logits(PeftModel.from_pretrained(llama(), saved(model))), logits(model)))


def quantised_notebook() -> None:
    """What notebooks do around k-bit training: preparation, names of linears, casts by kind of module."""
    base = peft.prepare_model_for_kbit_training(llama(), gradient_checkpointing_kwargs={"use_reentrant": False})
    names = sorted({name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"})
    model = get_peft_model(base, LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    check("all linears by name", model.get_nb_trainable_parameters()[0] == lora(target_modules="all-linear").get_nb_trainable_parameters()[0])
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.to(torch.bfloat16)
    check("isinstance LoraLayer finds each", len(layers) == 14)
    model.config.use_cache = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    check("gradients of all adapters", all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad))


class Dummy(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear, self.lm_head = nn.Embedding(10, 10), nn.Linear(10, 10), nn.Linear(10, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores (rows, length, 10)."""
        scores: Tensor = self.lm_head(self.linear(self.embedding(tokens)))
        return scores


def injection() -> None:
    """Adapters in any module, in place."""
    tokens = torch.arange(8).reshape(2, 4)
    config = LoraConfig(lora_alpha=16, r=4, target_modules=["linear"], init_lora_weights=False)
    model: Any = inject_adapter_in_model(config, Dummy())
    state = get_peft_model_state_dict(model)
    check("in place, no prefix in names", type(model) is Dummy and sorted(state) == ["linear.lora_A.weight", "linear.lora_B.weight"])
    other: Any = inject_adapter_in_model(config, Dummy(), state_dict=state)
    check("layers found from a state dict", not set_peft_model_state_dict(other, state).unexpected_keys and close(other(tokens), model(tokens)))
    light: Any = inject_adapter_in_model(config, Dummy(), low_cpu_mem_usage=True)
    check("without memory at first", light.linear.lora_A["default"].weight.is_meta)
    set_peft_model_state_dict(light, state, low_cpu_mem_usage=True)
    check("and then filled", close(light(tokens), model(tokens)))
    raises("a target that is not there", ValueError, lambda: inject_adapter_in_model(LoraConfig(target_modules=["nope"]), Dummy()))
    wrapped = get_peft_model(Dummy(), LoraConfig(r=2, target_modules=["linear", "embedding"], modules_to_save=["lm_head"]))
    randomise(wrapped)
    path = saved(wrapped)
    written = json.loads((path / "adapter_config.json").read_text())
    check("auto_mapping says where the class is", written["auto_mapping"]["base_model_class"] == "Dummy")
    check("a model of one's own comes back", close(PeftModel.from_pretrained(Dummy(), path)(tokens), wrapped(tokens)))


def prompts() -> None:
    """Virtual tokens: losses, files, generation."""
    cls: dict[str, Any] = {"labels": lambda step: torch.tensor([0, 2])}
    tasks: dict[str, Any] = {"task_ids": lambda step: torch.tensor([0, 2])}
    cases: list[tuple[str, Any, Callable[[], Any], dict[str, Any]]] = [
        ("prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), llama, {}),
        ("prefix", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), llama, {}),
        ("p_tuning", PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=4, encoder_hidden_size=16), bert, cls),
        ("lstm", PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"), llama, {}),
        ("multitask", MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=3, num_ranks=2), llama, tasks),
    ]  # fmt: skip
    for name, config, base, inputs in cases:
        torch.manual_seed(0)
        model = get_peft_model(base(), config)
        figures(name, train(model, **inputs))
        path = saved(model)
        check(f"{name}: a file", "prompt_embeddings" in load_peft_weights(str(path)))
        loaded = PeftModel.from_pretrained(base(), path).eval()
        given = {"task_ids": torch.tensor([0, 2])} if inputs is tasks else {}
        check(f"{name}: comes back", close(logits(loaded, **given), logits(model, **given)))
        if base is llama:
            check(f"{name}: generates", generated(loaded, **given) == generated(model, **given))
            with model.disable_adapter():
                check(f"{name}: switched off", close(logits(model), logits(base())))
    context = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_mask=[1] * 3, cpt_tokens_type_mask=[1, 2, 3])
    model = get_peft_model(llama(), context)
    kinds = torch.tensor([[1, 2, 2, 2, 3, 4, 4, 4]] * 2)
    model(input_ids=TOKENS, attention_mask=MASK, labels=TOKENS, input_type_mask=kinds).loss.backward()
    check("CPT trains", any(parameter.grad is not None for name, parameter in model.named_parameters() if "prompt_encoder" in name))
    for bad in [{"prompt_tuning_init": "TEXT"}, {"tokenizer_kwargs": {"a": 1}}]:
        raises(f"{bad}", ValueError, lambda bad=bad: PromptTuningConfig(num_virtual_tokens=3, **bad))  # type: ignore[misc]


def combining() -> None:
    """Weighted combinations of adapters."""
    model = two()
    expected = {name: query(model).get_delta_weight(name) for name in ("a", "b")}
    for kind in ["cat", "svd"]:
        model.add_weighted_adapter(["a", "b"], [0.7, 0.3], kind, combination_type=kind, **({"svd_rank": 8} if kind == "svd" else {}))
        check(f"{kind}: the sum", close(query(model).get_delta_weight(kind), 0.7 * expected["a"] + 0.3 * expected["b"]))
    kinds = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]
    for kind in ["linear", *kinds, *(f"{kind}_svd" for kind in kinds)]:
        torch.manual_seed(1)
        model.add_weighted_adapter(["a", "b"], [0.7, 0.3], kind, combination_type=kind, **({} if kind == "linear" else {"density": 0.5}))
        model.set_adapter(kind)
        check(f"{kind}: acts", differ(logits(model), logits(llama())) and model.active_adapters == [kind])
    model.set_adapter("a")
    unchanged("a name that is not there", model, ValueError, lambda: model.add_weighted_adapter(["a", "zz"], [1.0, 1.0], "x", "linear"))


def merging() -> None:
    """Merging, taking out, leaving the wrapper."""
    model = two()
    plain, merged = logits(llama()), logits(model)
    model.merge_adapter()
    check("merged", close(logits(model), merged) and query(model).merged_adapters == ["a"])
    with model.disable_adapter():
        check("switched off while merged", close(logits(model), plain))
    model.unmerge_adapter()
    check("unmerged", close(logits(model), merged) and not query(model).merged)
    both = two()
    both.merge_adapter(["a", "b"])
    check("both", query(both).merged_adapters == ["a", "b"] and differ(logits(both), merged))
    whole = two().merge_and_unload(adapter_names=["b"], safe_merge=True, progressbar=False)
    model.set_adapter("b")
    check("merge_and_unload of one", close(logits(whole), logits(model)) and whole.state_dict().keys() == llama().state_dict().keys())
    check("unload", close(logits(two().unload()), plain))
    broken = two()
    with torch.no_grad():
        query(broken).lora_A["a"].weight[0, 0] = float("nan")
    raises("NaN", ValueError, lambda: broken.merge_and_unload(safe_merge=True), "NaN")


def adapters() -> None:
    """Several adapters: choosing, per sample, loading, deleting, wrong names."""
    model = two()
    rows = [logits(model)]
    model.set_adapter("b")
    rows.append(logits(model))
    trainable = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    check("the active one trains", trainable == {"b"} and model.active_adapter == "b")
    model.set_adapter("a")
    mixed = logits(model, TOKENS[[0, 0, 0]], adapter_names=["a", "__base__", "b"])
    alone = logits(llama())
    check("a choice for each sample", close(mixed, torch.stack([rows[0][0], alone[0], rows[1][0]])))
    tokens = generated(model, adapter_names=["a", "b"])
    check("generate with it", tokens[0] == generated(model)[0] and len(generated(model, adapter_names=["a", "b"], num_beams=2)) == 2)
    with model.disable_adapter():
        check("disabled", close(logits(model), alone))
    check("and back", close(logits(model), rows[0]))
    path = saved(model)
    check("a folder for each", {"a", "b"} <= {file.name for file in path.iterdir()})
    check("selected", not (saved(model, selected_adapters=["b"]) / "a").exists())
    loaded = PeftModel.from_pretrained(llama(), path / "a", adapter_name="x")
    loaded.load_adapter(path / "b", adapter_name="y")
    check("loaded beside, not active", loaded.active_adapters == ["x"] and close(logits(loaded), rows[0]))
    loaded.set_adapter("y")
    check("then active", close(logits(loaded), rows[1]))
    missing: Any = folder() / "nowhere"
    bad: list[tuple[str, Callable[[], object]]] = [
        ("set_adapter", lambda: model.set_adapter("zz")), ("set_adapter(None)", lambda: model.set_adapter(None)),
        ("delete_adapter", lambda: model.delete_adapter("zz")), ("a name twice", lambda: model.add_adapter("a", lora().peft_config["default"])),
        ("no such target", lambda: model.add_adapter("c", LoraConfig(target_modules=["nope"]))),
        ("no such folder", lambda: model.load_adapter(str(missing), "c")),
        ("selected_adapters", lambda: model.save_pretrained(folder(), selected_adapters=["zz"])),
    ]  # fmt: skip
    for name, call in bad:
        unchanged(name, model, (ValueError, OSError), call)
    for names in (["a"], ["a", "zz"]):  # models of their own: after such an error the peer's keeps its hooks
        raises(f"adapter_names={names}", ValueError, lambda names=names: two()(input_ids=TOKENS, adapter_names=names))  # type: ignore[misc]
    model.delete_adapter("a")
    check("deleted", model.active_adapters == ["b"] and list(model.peft_config) == ["b"] and close(logits(model), rows[1]))


def mixed_model() -> None:
    """LoRA and LoHa in one model."""
    one, two_ = lora(), get_peft_model(llama(), LoHaConfig(target_modules=["q_proj"]))
    randomise(two_, scale=0.5)
    model = peft.PeftMixedModel.from_pretrained(llama(), str(saved(one)), adapter_name="a")
    model.load_adapter(str(saved(two_)), "b")
    model.set_adapter(["a", "b"])
    check("both act", model.active_adapters == ["a", "b"] and differ(logits(model), logits(one)) and differ(logits(model), logits(two_)))
    raises("no such adapter", ValueError, lambda: model.set_adapter("zz"))
    model.delete_adapter("b")
    check("one is left", close(logits(model), logits(one)))


def starts() -> None:
    """Initialisations, and files of those that change the base."""
    plain = logits(llama())
    for init in ["gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", True]:
        check(f"{init}: the base's output at first", close(logits(lora(seed=None, init_lora_weights=init)), plain, 1e-4))
    for init in ["pissa", "olora"]:
        model = lora(seed=None, init_lora_weights=init)
        first = saved(model)
        train(model)
        path = saved(model, path_initial_model_for_weight_conversion=str(first))
        config: Any = PeftConfig.from_pretrained(path)
        check(f"{init}: converted for the untouched base", close(logits(PeftModel.from_pretrained(llama(), path)), logits(model), 1e-4))
        check(f"{init}: its config", (config.r, config.lora_alpha, config.init_lora_weights) == (8, 16, True), config)


def variants() -> None:
    """Options of LoRA, each trained, saved, loaded."""
    figures("dora", train(lora(seed=None, use_dora=True)))
    options: list[tuple[dict[str, Any], int]] = [
        ({"use_dora": True}, 896 + 96), ({"use_rslora": True}, 896), ({"lora_bias": True}, 896 + 96), ({"layer_replication": [(0, 2), (0, 2)]}, 1792),
        ({"trainable_token_indices": [3, 5]}, 896 + 64), ({"modules_to_save": ["lm_head"]}, 896 + 2048), ({"target_modules": "all-linear"}, 3712),
        ({"target_modules": ["embed_tokens", "lm_head"]}, 768), ({"target_modules": r".*layers\.0.*(q|v)_proj"}, 448),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}}, 640), ({"layers_to_transform": [1], "layers_pattern": "layers"}, 448),
        ({"alora_invocation_tokens": [3, 4]}, 896), ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, 512),
    ]  # fmt: skip
    for option, count in options:
        model = lora(seed=None, **option)
        check(f"{option}: trainable parameters", model.get_nb_trainable_parameters()[0] == count, model.get_nb_trainable_parameters())
        train(model)
        check(f"{option}: comes back", close(logits(PeftModel.from_pretrained(llama(), saved(model))), logits(model)))


def vocabulary() -> None:
    """New tokens: resized embeddings are saved, and found again."""
    from transformers import AutoModelForCausalLM

    origin = folder()
    llama().save_pretrained(origin)
    base = AutoModelForCausalLM.from_pretrained(origin)
    torch.manual_seed(0)
    base.resize_token_embeddings(70)
    model = lora(base)
    path = saved(model)
    kept = {key for key in load_peft_weights(str(path)) if "lora_" not in key}
    check("saved with the embeddings", any("embed_tokens" in key for key in kept) and any("lm_head" in key for key in kept), kept)
    check("unless not wanted", all("lora_" in key for key in load_peft_weights(str(saved(model, save_embedding_layers=False)))))
    targeted = load_peft_weights(str(saved(lora(target_modules=["q_proj", "embed_tokens"]))))
    check("a targeted embedding is saved with its base", any("embed_tokens" in key and "lora_" not in key for key in targeted), sorted(targeted))
    words = tokenizer()
    words.add_tokens([f"new{i}" for i in range(6)])
    words.save_pretrained(path)
    check("AutoPeftModel resizes by the tokenizer", close(logits(AutoPeftModelForCausalLM.from_pretrained(path)), logits(model)))


def persistence() -> None:
    """torch.save, copies, state dicts, compiled models, broken files."""
    model = lora()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    check("torch.save of a model", close(logits(torch.load(buffer, weights_only=False)), logits(model)))
    check("deepcopy and pickle", close(logits(copy.deepcopy(model)), logits(pickle.loads(pickle.dumps(model)))))
    other = lora(seed=1)
    other.load_state_dict(model.state_dict())
    check("load_state_dict", close(logits(other), logits(model)))
    compiled = torch.compile(model, backend="eager")
    check("compiled", close(logits(compiled), logits(model)))
    tensors = get_peft_model_state_dict(model)
    check("the tensors of a compiled model", all(map(torch.equal, get_peft_model_state_dict(compiled).values(), tensors.values())))
    better("under the names that a file has", lambda: same(get_peft_model_state_dict(compiled), tensors))
    wrong = {key: tensor[:, :2] for key, tensor in get_peft_model_state_dict(model).items()}
    unchanged("another shape", model, RuntimeError, lambda: set_peft_model_state_dict(model, {key: wrong[key] for key in list(wrong)[:1]}))
    path = saved(model)
    (path / "adapter_model.safetensors").write_bytes(b"garbage")
    raises("a broken file", Exception, lambda: model.load_adapter(str(path), "x"))
    better("adds no adapter", lambda: list(model.peft_config) == ["default"])
    check("a pickled file", close(logits(PeftModel.from_pretrained(llama(), saved(model, safe_serialization=False))), logits(model)))


def helpers() -> None:
    """Scales, hot-swapping, optimisers, surgery."""
    from peft.helpers import check_if_peft_model, rescale_adapter_scale
    from peft.optimizers import create_loraplus_optimizer
    from peft.utils.hotswap import hotswap_adapter

    model, other = lora(), lora(seed=9)
    before = logits(model)
    with rescale_adapter_scale(model, 0.5):
        check("rescaled", differ(logits(model), before))
    check("and back", close(logits(model), before))
    unchanged("a scale that is no number", model, TypeError, lambda: rescale_adapter_scale(model, "x").__enter__())
    path = saved(other)
    check("check_if_peft_model", check_if_peft_model(str(path)) and not check_if_peft_model(str(folder())))
    hotswap_adapter(model, str(path), adapter_name="default")
    check("hot-swapped", close(logits(model), logits(other)))
    optimizer = create_loraplus_optimizer(model=model, optimizer_cls=torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    check("LoRA+: B learns faster", {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-3, 1.6e-2})
    layer, calls = query(other), []
    before = logits(other)
    layer.base_layer.register_forward_hook(lambda *_: calls.append("base"))
    layer.register_forward_hook(lambda *_: calls.append("layer"))
    layer.scaling["default"] *= 0.5
    check("a scale written by hand, hooks", differ(logits(other), before) and calls == ["base", "layer"])
    layer.lora_B["default"].weight.data = torch.zeros(32, 4)
    check("weights replaced through .data", float(layer.get_delta_weight("default").detach().abs().max()) == 0.0)
    dropping = lora(lora_dropout=0.25)
    dropping.add_adapter("b", LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    check("each adapter's dropout is a module", [query(dropping).lora_dropout[name].p for name in ("default", "b")] == [0.25, 0.5])
    better("a list of adapters on PeftModel", lambda: two().set_adapter(["a", "b"]) is None)


if __name__ == "__main__":
    _common.run(
        "accept_documentation",
        [quicktour, classifiers, causal, quantised_notebook, injection, prompts, combining, merging, adapters, mixed_model, starts, variants,
         vocabulary, persistence, helpers],
    )  # fmt: skip
