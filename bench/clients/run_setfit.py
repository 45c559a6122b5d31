"""setfit: a body with an adapter, contrastive training of the adapter alone, the classifier's head, saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _client import bert, saved, sentences, some, weights, write

# isort: split

import numpy
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from setfit import SetFitModel, Trainer, TrainingArguments
from sklearn.linear_model import LogisticRegression

from peft import LoraConfig


def numbers(room: Path) -> dict[str, Any]:
    base = saved(bert(cls="BertModel", initializer_range=0.3), room / "base")
    encoder = Transformer(base)
    SentenceTransformer(modules=[encoder, Pooling(32)], device="cpu").save(str(room / "body"))
    body = SentenceTransformer(str(room / "body"), device="cpu")
    torch.manual_seed(0)
    body.add_adapter(LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"]))
    model = SetFitModel(body, LogisticRegression())
    texts = sentences(16)
    labels = [index % 2 for index in range(len(texts))]
    settings = TrainingArguments(
        output_dir=str(room / "out"), batch_size=4, num_epochs=1, max_steps=6, body_learning_rate=1e-2, seed=3, logging_steps=1, report_to="none"
    )
    trainer = Trainer(model, settings, train_dataset=Dataset.from_dict({"text": texts, "label": labels}))
    trainer.train()
    found: dict[str, Any] = {}
    found["losses"] = [entry["embedding_loss"] for entry in trainer.st_trainer.state.log_history if "embedding_loss" in entry]
    found["trained"] = answers(model)
    model.save_pretrained(str(room / "saved"))
    found["file"] = weights(room / "saved" / "adapter_model.safetensors")
    (room / "saved" / "config.json").unlink()  # of setfit; with it transformers takes the folder for a whole model, with either `peft`
    found["loaded"] = answers(SetFitModel.from_pretrained(str(room / "saved"), device="cpu"))
    return found


def answers(model: SetFitModel) -> dict[str, Any]:
    texts = sentences(20)[16:]
    return {
        "embeddings": some(torch.as_tensor(model.encode(texts))),
        "probabilities": numpy.asarray(model.predict_proba(texts)).tolist(),
        "classes": [int(label) for label in model.predict(texts)],
    }


if __name__ == "__main__":
    write(numbers)
