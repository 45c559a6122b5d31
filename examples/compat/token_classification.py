"""LoRA for token classification (names in sentences), with `Trainer`, metrics, and labels in the config of the model.

python token_classification.py results
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForTokenClassification, RobertaConfig, RobertaForTokenClassification, Trainer, TrainingArguments, set_seed

from peft import AutoPeftModelForTokenClassification, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model

output_dir = Path(sys.argv[1])
label_list = ["O", "B-protein", "I-protein", "B-cell", "I-cell"]
id2label = dict(enumerate(label_list))
label2id = {label: i for i, label in id2label.items()}
lr, batch_size, num_epochs = 5e-3, 8, 6

# tokens 10-19 begin a protein and 30-39 a cell line; the token after it belongs to it if it is odd
generator = torch.Generator().manual_seed(0)
dataset = []
for i in range(48):
    input_ids = torch.randint(5, 60, (8 + i % 5,), generator=generator).tolist()
    labels, inside = [], None
    for token in input_ids:
        kind = "protein" if 10 <= token < 20 else "cell" if 30 <= token < 40 else None
        labels.append(label2id[f"B-{kind}"] if kind else label2id[f"I-{inside}"] if inside and token % 2 else 0)
        inside = kind
    dataset.append({"input_ids": [0, *input_ids, 2], "labels": [-100, *labels, -100]})


def data_collator(features):
    input_ids = pad_sequence([torch.tensor(feature["input_ids"]) for feature in features], batch_first=True, padding_value=1)
    labels = pad_sequence([torch.tensor(feature["labels"]) for feature in features], batch_first=True, padding_value=-100)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 1).long(), "labels": labels}


def compute_metrics(p):
    predictions, labels = p
    predictions = np.argmax(predictions, axis=2)
    counts = labels != -100
    found = (predictions != 0) & counts
    right = found & (predictions == labels)
    precision = right.sum() / max(found.sum(), 1)
    recall = right.sum() / max(((labels != 0) & counts).sum(), 1)
    return {"precision": float(precision), "recall": float(recall), "accuracy": float((predictions == labels)[counts].mean())}


set_seed(1)
config = RobertaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40, type_vocab_size=1,
    num_labels=len(label_list), id2label=id2label, label2id=label2id, initializer_range=0.1,
)  # fmt: skip
RobertaForTokenClassification(config).save_pretrained(output_dir / "base")
model = AutoModelForTokenClassification.from_pretrained(output_dir / "base", num_labels=len(label_list), id2label=id2label, label2id=label2id)

peft_config = LoraConfig(task_type=TaskType.TOKEN_CLS, inference_mode=False, r=16, lora_alpha=16, lora_dropout=0.1, bias="all")
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

training_args = TrainingArguments(
    output_dir=str(output_dir / "run"),
    learning_rate=lr,
    per_device_train_batch_size=batch_size,
    per_device_eval_batch_size=batch_size,
    num_train_epochs=num_epochs,
    weight_decay=0.01,
    eval_strategy="epoch",
    save_strategy="epoch",
    load_best_model_at_end=True,
    logging_steps=1,
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=dataset[:32],
    eval_dataset=dataset[32:],
    data_collator=data_collator,
    compute_metrics=compute_metrics,
)
trainer.train()
history = trainer.state.log_history
losses = [entry["loss"] for entry in history if "loss" in entry]
evaluated = [{name: entry[f"eval_{name}"] for name in ("loss", "precision", "recall", "accuracy")} for entry in history if "eval_loss" in entry]
model.save_pretrained(output_dir / "adapter")

config = PeftConfig.from_pretrained(output_dir / "adapter")
inference_model = AutoModelForTokenClassification.from_pretrained(
    config.base_model_name_or_path, num_labels=len(label_list), id2label=id2label, label2id=label2id
)
model = PeftModel.from_pretrained(inference_model, output_dir / "adapter")
auto = AutoPeftModelForTokenClassification.from_pretrained(output_dir / "adapter")
batch = data_collator(dataset[40:44])
with torch.no_grad():
    logits = model(**batch).logits
    torch.testing.assert_close(auto(**batch).logits, logits)
predicted = [[label_list[i] for i in row] for row in logits.argmax(2).tolist()]

metrics = {"losses": losses, "evaluated": evaluated, "predicted": predicted, "logits": logits[0, 1].tolist()}
(output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {evaluated[-1]}")
