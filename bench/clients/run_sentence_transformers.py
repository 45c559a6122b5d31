"""sentence-transformers: an encoder and a cross-encoder with an adapter each, training, embeddings, saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _client import bert, saved, sentences, some, weights, write

# isort: split

import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from peft import LoraConfig, TaskType

TEXTS = sentences(24)


def numbers(room: Path) -> dict[str, Any]:
    return {"encoder": encoder(room), "cross-encoder": cross_encoder(room)}


def encoder(room: Path) -> dict[str, Any]:
    base = saved(bert(cls="BertModel", initializer_range=0.3), room / "base")
    model = SentenceTransformer(modules=[Transformer(base), Pooling(32)], device="cpu")
    torch.manual_seed(0)
    config = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"])
    model.add_adapter(config)
    found: dict[str, Any] = {"before": embeddings(model)}
    settings = SentenceTransformerTrainingArguments(
        output_dir=room / "out",
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        seed=3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
    )
    pairs = Dataset.from_dict({"anchor": TEXTS[:12], "positive": TEXTS[12:]})
    trainer = SentenceTransformerTrainer(model, settings, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))
    trainer.train()
    found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found["after"] = embeddings(model)
    model.save_pretrained(str(room / "saved"))
    found["file"] = weights(room / "saved" / "adapter_model.safetensors")
    found["loaded"] = embeddings(SentenceTransformer(str(room / "saved"), device="cpu"))
    model.disable_adapters()
    found["disabled"] = embeddings(model)
    return found


def cross_encoder(room: Path) -> dict[str, Any]:
    model = CrossEncoder(saved(bert(num_labels=1), room / "cross"), device="cpu")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"], init_lora_weights=False)
    model.add_adapter(config)
    pairs = list(zip(TEXTS[:4], TEXTS[4:8], strict=True))
    return {"scores": [float(score) for score in model.predict(pairs)]}


def embeddings(model: SentenceTransformer) -> list[float]:
    model.eval()
    return some(model.encode(TEXTS[:6], convert_to_tensor=True, show_progress_bar=False))


if __name__ == "__main__":
    write(numbers)
