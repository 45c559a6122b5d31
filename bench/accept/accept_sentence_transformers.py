"""What sentence-transformers needs of the module `peft` (integrations.md §7): adapters on encoders and cross-encoders, their files, training.

Run `python accept_sentence_transformers.py` where sentence-transformers 6.2 and a module `peft` are installed; see `_common.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _common import bert, check, close, differ, folder, no_meta, raises, randomise, run, same, tokenizer  # first: it sets the environment

# isort: split

import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

TEXTS = ["w5 w6 w7", "w8 w9 w10 w11", "w30 w31"]
PAIRS = [("w5 w6", "w7 w8"), ("w9 w10", "w40 w41 w42")]


def base(cls: str) -> Path:
    """Return a folder with a tiny BERT of transformers class `cls` and the tokenizer: what an adapter is trained on."""
    place: Path = folder()
    bert(cls=cls, **({"num_labels": 1} if "Sequence" in cls else {})).save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def encoder(place: Path) -> Any:
    """Return a sentence encoder (mean pooling, width 32) of the model in this folder, on the CPU."""
    transformer = Transformer(str(place))
    return SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").eval()


def lora(**settings: Any) -> LoraConfig:
    """Return a LoRA config of rank 4 on the query and value projections of BERT."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], **settings})


def encoded(model: Any) -> Tensor:
    """Return the embeddings (3, 32) of three texts."""
    embeddings: Tensor = model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    return embeddings


def predicted(model: Any) -> Tensor:
    """Return the scores (2,) of two pairs."""
    scores: Tensor = model.predict(PAIRS, convert_to_tensor=True, show_progress_bar=False)
    return scores


def layers(model: nn.Module) -> list[Any]:
    """Return the adapter layers of the model."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def mixin() -> None:
    place = base("BertModel")
    model = encoder(place)
    plain = encoded(model)
    raises("adapters need one first", ValueError, model.active_adapters)
    model.add_adapter(lora())
    check("a new adapter changes nothing", torch.equal(encoded(model), plain) and len(layers(model)) == 4)
    named = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    check("only the adapter trains", named and all(".lora_" in name for name in named))
    check("the base's folder stands in the config", model.transformers_model.peft_config["default"].base_model_name_or_path == str(place))
    randomise(model, scale=0.4)
    acting = encoded(model)
    check("the adapter acts", differ(acting, plain))
    model.add_adapter(lora(r=2), "other")
    randomise(model, "other", scale=0.4, seed=8)
    other = encoded(model)
    check("a second adapter becomes active", differ(other, acting) and list(model.active_adapters()) == ["other"])
    model.set_adapter("default")
    check("set_adapter goes back", close(encoded(model), acting) and list(model.active_adapters()) == ["default"])
    state = model.get_adapter_state_dict("other")
    check("a state dict has no adapter name", state and all("other" not in key.split(".") for key in state) and len(state) == 8)
    model.disable_adapters()
    off = encoded(model)
    model.enable_adapters()
    check("adapters are disabled and enabled", torch.equal(off, plain) and close(encoded(model), acting))
    model.delete_adapter("other")
    gone = not [name for name, _ in model.named_parameters() if "other" in name.split(".")]
    check("an adapter is deleted", gone and list(model.transformers_model.peft_config) == ["default"] and close(encoded(model), acting))
    check("sentence-transformers sees the config of an adapter", bool(getattr(model.transformers_model, "peft_config", None)))
    sparse = SparseEncoder(str(base("BertForMaskedLM")), device="cpu")
    sparse.add_adapter(lora())
    check("a sparse encoder takes an adapter", len(layers(sparse)) == 4 and list(sparse.active_adapters()) == ["default"])


def files() -> None:
    place, saved, alone = base("BertModel"), folder(), folder()
    model = encoder(place)
    model.add_adapter(lora())
    randomise(model, scale=0.4)
    acting = encoded(model)
    model.save_pretrained(str(saved))
    found = {path.name for path in saved.rglob("*") if path.is_file()}
    check("the saved model holds an adapter and no full weights", "adapter_model.safetensors" in found and "model.safetensors" not in found, found)
    config = next(saved.rglob("adapter_config.json"))
    check("the adapter's file names the base", json.loads(config.read_text())["base_model_name_or_path"] == str(place))
    keys = list(load_file(config.with_name("adapter_model.safetensors")))
    check("the keys are those of an ordinary adapter", keys and all(key.startswith("base_model.model.") for key in keys), keys)
    again = SentenceTransformer(str(saved), device="cpu")
    check("the saved model comes back as it was", close(encoded(again), acting) and no_meta(again) and len(layers(again)) == 4)
    check("a loaded adapter is frozen", not any(parameter.requires_grad for layer in layers(again) for parameter in layer.parameters()))
    model.transformers_model.save_pretrained(alone)
    tokenizer().save_pretrained(alone)
    directly = SentenceTransformer(modules=[Transformer(str(alone)), Pooling(32)], device="cpu").eval()
    check("an adapter's folder is a model", close(encoded(directly), acting))
    third = encoder(place)
    third.load_adapter(str(alone))
    check("an adapter's folder loads onto the base", close(encoded(third), acting))
    settings: dict[str, Any] = {"token": None, "cache_dir": None, "revision": None, "trust_remote_code": False, "local_files_only": True}
    check("PeftConfig takes the arguments of a download", PeftConfig.from_pretrained(str(alone), **settings).peft_type == "LORA")


def training() -> None:
    place, output = base("BertModel"), folder()
    model = encoder(place)
    model.add_adapter(lora())
    rows = [{"anchor": f"w{5 + row} w{6 + row}", "positive": f"w{30 + row} w{31 + row}"} for row in range(8)]
    args = SentenceTransformerTrainingArguments(
        output_dir=str(output), max_steps=6, per_device_train_batch_size=4, learning_rate=0.02, logging_steps=1, report_to="none", seed=1,
        save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, use_cpu=True,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, loss=MultipleNegativesRankingLoss(model))
    trainer.remove_callback(PrinterCallback)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    check("training lowers the loss", losses[-1] < losses[0], losses)
    now = dict(model.named_parameters())
    check("training leaves the base as it was", same(before, {name: now[name].detach() for name in before}))
    names = {path.name for path in Path(output, "checkpoint-6").rglob("*")}
    check("a checkpoint holds an adapter", {"adapter_model.safetensors", "adapter_config.json"} <= names and "model.safetensors" not in names, names)
    best = SentenceTransformer(str(trainer.state.best_model_checkpoint), device="cpu")
    check("the best checkpoint is in the model after training", close(encoded(best), encoded(model)))


def cross_encoder() -> None:
    place, saved = base("BertForSequenceClassification"), folder()
    model = CrossEncoder(str(place), num_labels=1, device="cpu")
    plain = predicted(model)
    model.add_adapter(lora(modules_to_save=["classifier"]))
    randomise(model, scale=0.4)
    acting = predicted(model)
    head = model.transformers_model.classifier
    check("a cross-encoder takes an adapter and a head", differ(acting, plain) and isinstance(head, ModulesToSaveWrapper))
    copies = isinstance(head.original_module, nn.Linear) and [type(copy) for copy in head.modules_to_save.values()] == [nn.Linear]
    check("the wrapped head shows its original and its copies", copies and "forward" not in vars(head.original_module))
    name = next(name for name, module in model.named_modules() if module is head)
    model.set_keep_in_fp32_modules([name])
    check("a wrapped head computes in float32 where asked", close(predicted(model), acting, 1e-6))
    model.set_keep_in_fp32_modules([])
    model.save_pretrained(str(saved))
    again = CrossEncoder(str(saved), device="cpu")
    check("a cross-encoder comes back with its head", close(predicted(again), acting))


if __name__ == "__main__":
    run("accept_sentence_transformers", [mixin, files, training, cross_encoder])
