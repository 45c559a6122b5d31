"""What transformers' Trainer needs of the module `peft`: training, checkpoints, exact resume, best model, every kind of adapter."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import _common  # first: it sets the environment
import torch
import transformers
from _common import VOCAB, bert, better, check, close, differ, folder, gradients, lacking, llama, logits, randomise, same, t5
from safetensors.torch import load_file

import peft
from peft import LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

datasets: Any = importlib.import_module("datasets")


class Trainer(transformers.Trainer):
    """transformers' own, without its print-outs."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.remove_callback(transformers.PrinterCallback)


class Seq2SeqTrainer(transformers.Seq2SeqTrainer):
    """transformers' own, without its print-outs."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.remove_callback(transformers.PrinterCallback)


#: read or called by Trainer through the wrapper; not all of these exist on every base
FORWARDED = [
    "activation_checkpointing_enable", "can_generate", "config", "device", "dtype", "enable_input_require_grads", "generation_config",
    "gradient_checkpointing_enable", "hf_device_map", "hf_quantizer", "is_distributed_loading_by_transformers", "is_loaded_in_4bit",
    "is_loaded_in_8bit", "is_quantized", "loss_type", "main_input_name", "model_tags", "name_or_path", "quantization_method", "tie_weights",
    "tp_size", "_hf_peft_config_loaded", "_keys_to_ignore_on_save", "_tp_size",
]  # fmt: skip
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def lora(**changes: Any) -> Any:
    """Return a LoRA config for a causal model."""
    return LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})


def fresh(config: Any = None, base: Any = None, seed: int = 1) -> Any:
    """Return a tuned tiny model (a Llama with LoRA, where nothing is said), its adapter's start drawn from `seed`."""
    base = llama() if base is None else base
    torch.manual_seed(seed)
    return get_peft_model(base, config or lora())


def texts(rows: int = 16, length: int = 8) -> Any:
    """Return a dataset of token rows that count upwards, with labels, and a column that no model takes."""
    tokens = [[3 + (start + step) % (VOCAB - 3) for step in range(length)] for start in range(rows)]
    columns = {"input_ids": tokens, "attention_mask": [[1] * length] * rows, "labels": tokens, "comment": ["no tensor"] * rows}
    return datasets.Dataset.from_dict(columns)


def classes(rows: int = 16) -> Any:
    """Return a dataset for three classes."""
    tokens = [[10 + row % 3] * 8 for row in range(rows)]
    return datasets.Dataset.from_dict({"input_ids": tokens, "label": [row % 3 for row in range(rows)], "comment": ["no tensor"] * rows})


def arguments(path: Path, kind: Any = None, **changes: Any) -> Any:
    """Return training arguments: eight steps of four rows, a checkpoint each four, no reports."""
    settings: dict[str, Any] = {
        "output_dir": str(path), "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.02, "logging_steps": 1,
        "save_steps": 4, "use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 5, "dataloader_num_workers": 0,
    }  # fmt: skip
    return (kind or transformers.TrainingArguments)(**{**settings, **changes})


def trained(model: Any, data: Any = None, resume: Any = None, path: Path | None = None, **changes: Any) -> Any:
    """Train the model and return the trainer."""
    trainer = Trainer(model=model, args=arguments(path or folder(), **changes), train_dataset=data or texts())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    """Return the logged training losses, in order."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def falls(trainer: Any) -> bool:
    """Whether the mean of the last two losses is below that of the first two."""
    values = losses(trainer)
    return sum(values[-2:]) < sum(values[:2])


def weights(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    """Return copies of the parameters of an adapter."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if adapter in name.split(".")}


def train_and_checkpoint() -> None:
    """A run with LoRA, what its checkpoints hold, and reading them (§3.3)."""
    model = fresh()
    base = {name: value.clone() for name, value in model.named_parameters() if "lora_" not in name}
    check("the base's class forward stays what it was", inspect.signature(model.get_base_model().forward) == inspect.signature(llama().forward))
    path = folder()
    trainer = trained(model, path=path)
    check("the loss falls", falls(trainer), losses(trainer))
    check("labels are found in the base's signature", trainer.label_names == ["labels"])
    check("the base did not move", same(base, {name: value for name, value in model.named_parameters() if name in base}))
    checkpoint = path / "checkpoint-8"
    names = {file.name for file in checkpoint.iterdir()}
    check("a checkpoint holds the adapter's files", names >= ADAPTER_FILES | {"optimizer.pt", "scheduler.pt", "trainer_state.json"}, names)
    check("…and no model", not names & {"model.safetensors", "pytorch_model.bin", "config.json"}, names)
    keys = load_file(checkpoint / "adapter_model.safetensors")
    check("the adapter's weights are in it", len(keys) == 8 and all(key.startswith("base_model.model.") for key in keys))
    check("the card says library_name: peft", "library_name: peft" in (checkpoint / "README.md").read_text())
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    check("the optimizer has the adapter's weights alone", len(optimizer["state"]) == 8)
    check("a checkpoint is an adapter folder", close(logits(PeftModel.from_pretrained(llama(), checkpoint)), logits(model)))
    trainer.save_model(str(path / "final"))
    check("save_model writes an adapter folder", close(logits(PeftModel.from_pretrained(llama(), path / "final")), logits(model)))
    model.save_pretrained(path)
    trainer.create_model_card(model_name="tiny")
    card = (path / "README.md").read_text()
    check("Trainer's model card keeps library_name: peft", "library_name: peft" in card and "### Framework versions" in card)


def resume() -> None:
    """A resumed run equals the uninterrupted one."""
    path = folder()
    whole = fresh()
    trained(whole, path=path)
    cut = fresh(seed=2)
    held = {name: parameter for name, parameter in cut.named_parameters() if parameter.requires_grad}
    trainer = trained(cut, resume=str(path / "checkpoint-4"))
    left, right = weights(whole), weights(cut)
    check("the same weights to 1e-4", left.keys() == right.keys() and all(close(left[key], right[key], 1e-4) for key in left))
    now = dict(cut.named_parameters())
    check("the Parameter objects are the ones the optimizer has", all(now[name] is parameter for name, parameter in held.items()))
    check("they train on", all(parameter.requires_grad for parameter in held.values()) and len(held) == 8)
    check("four steps were run, not eight", trainer.state.global_step == 8 and len(losses(trainer)) == 8)


def best_model() -> None:
    """`load_best_model_at_end` (§3.3, §11.10)."""
    model = fresh()
    path = folder()
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    options |= {"max_steps": 6, "greater_is_better": True}  # the worst is the best: so it is not the last one
    args = arguments(path, **options)
    trainer = Trainer(model=model, args=args, train_dataset=texts(), eval_dataset=texts(8))
    objects = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint or "")
    want = PeftModel.from_pretrained(llama(), best)
    check("the best checkpoint's weights are back", close(logits(model), logits(want)))
    last = PeftModel.from_pretrained(llama(), path / "checkpoint-6")
    check("…which are not the last ones", best.name != "checkpoint-6" and differ(logits(model), logits(last)), best.name)
    still = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check("the adapter still trains, in the same objects", len(still) == 8 and all(a is b for a, b in zip(objects, still, strict=True)))

    def mode_is_left() -> bool:
        model.train()
        model.load_adapter(str(best), "default")
        return bool(model.training)

    better("§11.10: weights loaded over an adapter leave the mode alone", mode_is_left)


def several_adapters() -> None:
    """Checkpoints with sub-folders for the adapters that are not called default."""

    def two(seed: int) -> Any:
        model = fresh(seed=seed)
        model.add_adapter("other", lora(r=2))
        model.set_adapter("other")
        return model

    path = folder()
    whole = two(1)
    untouched = weights(whole)
    trained(whole, path=path)
    checkpoint = path / "checkpoint-4"
    check("default at the root, the other in its folder", {"adapter_model.safetensors", "other"} <= {file.name for file in checkpoint.iterdir()})
    check("only the active adapter trained", same(untouched, weights(whole)))
    cut = two(1)
    trained(cut, resume=str(checkpoint))
    left, right = weights(whole, "other"), weights(cut, "other")
    check("resume finds the active adapter in its sub-folder", all(close(left[key], right[key], 1e-4) for key in left))
    check("…and leaves it active", cut.active_adapters == ["other"] and cut.active_adapter == "other")
    trains = {name.split(".")[-2] for name, parameter in cut.named_parameters() if parameter.requires_grad}
    check("…and alone in training", trains == {"other"}, trains)


def classifier() -> None:
    """A sequence classifier with a saved head, NEFTune noise and label smoothing."""
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = fresh(config, bert())
    path = folder()
    trainer = trained(model, classes(), path=path, neftune_noise_alpha=0.1, label_smoothing_factor=0.1)
    check("classifier: the loss falls", falls(trainer), losses(trainer))
    check("classifier: `label` became `labels`; the loss is returned", trainer.label_names == ["labels"] and trainer.can_return_loss is not None)
    check("NEFTune's hook is gone", not model.base_model.model.get_input_embeddings()._forward_hooks)
    written = load_file(path / "checkpoint-8" / "adapter_model.safetensors")
    head = written["base_model.model.classifier.weight"]
    check("the trained head is in the checkpoint", differ(head, bert().classifier.weight))
    loaded = PeftModel.from_pretrained(bert(), path / "checkpoint-8")
    check("the checkpoint restores it", close(logits(loaded), logits(model)))
    resumed = fresh(config, bert())
    trained(resumed, classes(), resume=str(path / "checkpoint-8"), max_steps=8)
    check("resume restores the head in place", close(logits(resumed), logits(model)))
    metrics = Trainer(model=model, args=arguments(folder()), eval_dataset=classes()).evaluate()
    check("evaluate gives a loss", metrics["eval_loss"] > 0)


def smoothing() -> None:
    """Label smoothing shifts labels for causal models: it looks at the base's name."""
    model = fresh()
    check("base_model.model._get_name", model.base_model.model._get_name() == "LlamaForCausalLM")
    trainer = Trainer(model=model, args=arguments(folder(), label_smoothing_factor=0.1), train_dataset=texts())
    batch = {name: torch.tensor(texts(4)[name]) for name in ("input_ids", "labels", "attention_mask")}
    with torch.no_grad():
        got: Any = trainer.compute_loss(model, dict(batch))
        log_probabilities = model(**batch).logits[:, :-1].log_softmax(-1)
    chosen = -log_probabilities.gather(-1, batch["labels"][:, 1:, None]).mean()
    check("the smoothed loss is that of shifted labels", close(got, 0.9 * chosen - 0.1 * log_probabilities.mean(), 1e-4))


def other_methods() -> None:
    """LoHa and the prompt methods train, are saved and resumed."""
    configs = {
        "LoHa": (LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"), 16),
        "prompt tuning": (PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), 1),
        "prefix tuning": (PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), 1),
    }
    for name, (config, tensors) in configs.items():
        path = folder()
        model = fresh(copy.deepcopy(config))
        trainer = trained(model, path=path, learning_rate=0.05)
        check(f"{name}: the loss falls", falls(trainer), losses(trainer))
        written = load_file(path / "checkpoint-4" / "adapter_model.safetensors")
        check(f"{name}: the checkpoint", len(written) == tensors, list(written))
        again = PeftModel.from_pretrained(llama(), path / "checkpoint-8")
        check(f"{name}: the checkpoint restores it", close(logits(again), logits(model)))
        if name == "LoHa":
            cut = fresh(copy.deepcopy(config), seed=2)
            trained(cut, resume=str(path / "checkpoint-4"), learning_rate=0.05)
            left, right = weights(model), weights(cut)
            check(f"{name}: resumed equals uninterrupted", all(close(left[key], right[key], 1e-4) for key in left))

    def prompts_resume() -> bool:
        path = folder()
        whole = fresh(PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
        trained(whole, path=path)
        cut = fresh(PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), seed=2)
        trained(cut, resume=str(path / "checkpoint-4"))
        return close(weights(whole)["prompt_encoder.default.embedding.weight"], weights(cut)["prompt_encoder.default.embedding.weight"], 1e-4)

    better("a prompt's run can be resumed", prompts_resume)

    def prefix_and_checkpointing() -> bool:
        model = fresh(copy.deepcopy(configs["prefix tuning"][0]))
        want = gradients(model)
        model.gradient_checkpointing_enable()
        got = gradients(model)
        return len(want) == 1 and all(close(want[key], got[key]) for key in want)

    better("§11.8: prefix tuning with checkpointing switched on later", prefix_and_checkpointing)


def mixed() -> None:
    """A PeftMixedModel trains; Trainer writes it whole, since it is not among the classes that it knows."""
    model: Any = get_peft_model(llama(), lora(), mixed=True)
    model.add_adapter("loha", LoHaConfig(r=2, target_modules=["k_proj"]))
    model.set_adapter(["default", "loha"])
    path = folder()
    trainer = trained(model, path=path)
    check("mixed: the loss falls", falls(trainer), losses(trainer))
    names = {file.name for file in (path / "checkpoint-8").iterdir()}
    check("mixed: one bare model.safetensors", "model.safetensors" in names and "adapter_model.safetensors" not in names, names)
    moved = [name for name, value in weights(model, "loha").items() if name.endswith("hada_w2_a.loha") and value.abs().max() > 0]
    check("mixed: both adapters moved", len(moved) == 2, list(weights(model, "loha")))


def seq2seq() -> None:
    """Seq2SeqTrainer trains and generates."""
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v"])
    model = fresh(config, t5())
    args = arguments(folder(), transformers.Seq2SeqTrainingArguments, predict_with_generate=True)
    trainer = Seq2SeqTrainer(model=model, args=args, train_dataset=texts(), eval_dataset=texts(4))
    trainer.train()
    check("seq2seq: the loss falls", falls(trainer), losses(trainer))
    predicted: Any = trainer.predict(texts(4)).predictions
    check("seq2seq: predict_with_generate", predicted.ndim == 2 and predicted.shape[0] == 4, predicted.shape)


def mixin() -> None:
    """A plain model with an adapter of transformers' own."""
    model = llama()
    model.add_adapter(lora())
    path = folder()
    trainer = trained(model, path=path)
    check("mixin: the loss falls", falls(trainer), losses(trainer))
    names = {file.name for file in (path / "checkpoint-8").iterdir()}
    check("mixin: adapter files, no model", "adapter_model.safetensors" in names and "model.safetensors" not in names, names)
    loaded = llama()
    loaded.load_adapter(path / "checkpoint-8")
    check("mixin: the checkpoint restores it", close(logits(loaded), logits(model)))


def precision_and_memory() -> None:
    """A bfloat16 base, gradient checkpointing, and the attributes that Trainer reads through the wrapper."""
    model = fresh(base=llama().to(torch.bfloat16))
    trainer = trained(model)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    check("a bfloat16 base with float32 adapters trains", falls(trainer) and dtypes == {torch.float32}, losses(trainer))
    plain, saving = fresh(), fresh()
    trained(plain)
    trained(saving, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    left, right = weights(plain), weights(saving)
    check("gradient checkpointing: the same weights", all(close(left[key], right[key], 1e-5) for key in left))
    if not lacking("<5", "Trainer lets inputs require gradients for reentrant checkpointing"):
        reentrant = fresh()
        trained(reentrant, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
        right = weights(reentrant)
        check("…reentrant too", all(close(left[key], right[key], 1e-5) for key in left))
    other = [name for name in FORWARDED if getattr(model, name, None) != getattr(model.get_base_model(), name, None)]
    check("what Trainer reads of a model is that of the base", not other and model.can_generate() and model.dtype == torch.bfloat16, other)
    absent = [name for name in ("hf_device_map", "quantization_method", "module", "no_such_thing") if hasattr(model, name)]
    check("absent ones are AttributeErrors", not absent, absent)
    without = model.num_parameters() - model.num_parameters(exclude_embeddings=True)
    check("num_parameters(exclude_embeddings=True)", without == model.get_input_embeddings().weight.numel(), without)
    model.config.use_cache = False
    check("config is the base's own", model.get_base_model().config.use_cache is False)


def given_tensors() -> None:
    """`save_pretrained(state_dict=, is_main_process=)` as sharded runs call it."""
    model = fresh()
    randomise(model)
    want = peft.get_peft_model_state_dict(model)
    whole = {name: value + 1 for name, value in model.state_dict().items()}
    path = folder()
    model.save_pretrained(path, state_dict=whole, is_main_process=True)
    written = load_file(path / "adapter_model.safetensors")
    check("the given tensors are written, under the same names", written.keys() == want.keys() and all(close(written[k], want[k] + 1) for k in want))
    trainable = {name: value for name, value in whole.items() if "lora_" in name}
    model.save_pretrained(path / "zero3", state_dict=trainable)
    check("trainable ones alone do", same(load_file(path / "zero3" / "adapter_model.safetensors"), written))
    model.save_pretrained(path / "rank1", state_dict=whole, is_main_process=False)
    check("another rank writes nothing", not [file for file in (path / "rank1").rglob("*") if file.is_file()])
    config = json.loads((path / "adapter_config.json").read_text())
    check("inference_mode in the file, not in the model", config["inference_mode"] is True and model.peft_config["default"].inference_mode is False)


THEMES = [
    train_and_checkpoint, resume, best_model, several_adapters, classifier, smoothing, other_methods, mixed, seq2seq, mixin,
    precision_and_memory, given_tensors,
]  # fmt: skip

if __name__ == "__main__":
    _common.lift_version_gate()
    _common.run("accept_trainer", THEMES)
