"""LoRA for image classification: a vision transformer whose new classifier is trained in full and saved with the adapter.

python image_classification.py results
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, ViTConfig, ViTModel, set_seed

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

output_dir = Path(sys.argv[1])
labels = ["horizontal", "vertical", "diagonal"]
label2id = {label: i for i, label in enumerate(labels)}
id2label = dict(enumerate(labels))
batch_size = 8

# images of stripes with noise
generator = torch.Generator().manual_seed(0)
x, y = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
images = []
for i in range(60):
    direction = [x, y, x + y][i % 3] + int(torch.randint(0, 4, (1,), generator=generator))
    stripes = (direction // 2 % 2).float() * 2 - 1
    images.append({"image": stripes.expand(3, 16, 16) + 0.5 * torch.randn(3, 16, 16, generator=generator), "label": i % 3})
train_ds, val_ds = images[:42], images[42:]


def collate_fn(examples):
    pixel_values = torch.stack([example["image"] for example in examples])
    return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}


def compute_metrics(eval_pred):
    predictions = np.argmax(eval_pred.predictions, axis=1)
    return {"accuracy": float((predictions == eval_pred.label_ids).mean())}


# a pretrained encoder without a classifier
set_seed(1)
config = ViTConfig(
    image_size=16, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1
)
ViTModel(config).save_pretrained(output_dir / "base")


def load_model():
    set_seed(2)  # the classifier is new
    return AutoModelForImageClassification.from_pretrained(output_dir / "base", label2id=label2id, id2label=id2label, ignore_mismatched_sizes=True)


config = LoraConfig(
    r=16,
    lora_alpha=16,
    target_modules=["q_proj", "v_proj"],
    lora_dropout=0.1,
    bias="none",
    modules_to_save=["classifier"],
)
lora_model = get_peft_model(load_model(), config)
lora_model.print_trainable_parameters()

args = TrainingArguments(
    str(output_dir / "run"),
    remove_unused_columns=False,
    eval_strategy="epoch",
    save_strategy="epoch",
    learning_rate=5e-3,
    per_device_train_batch_size=batch_size,
    gradient_accumulation_steps=2,
    per_device_eval_batch_size=batch_size,
    num_train_epochs=5,
    logging_steps=1,
    load_best_model_at_end=True,
    metric_for_best_model="accuracy",
    label_names=["labels"],
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
trainer = Trainer(lora_model, args, train_dataset=train_ds, eval_dataset=val_ds, compute_metrics=compute_metrics, data_collator=collate_fn)
trainer.train()
evaluated = trainer.evaluate(val_ds)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
lora_model.save_pretrained(output_dir / "adapter")

config = PeftConfig.from_pretrained(output_dir / "adapter")
inference_model = PeftModel.from_pretrained(load_model(), output_dir / "adapter")
batch = collate_fn(val_ds[:4])
with torch.no_grad():
    logits = inference_model(pixel_values=batch["pixel_values"]).logits
    merged = inference_model.merge_and_unload()
    torch.testing.assert_close(merged(pixel_values=batch["pixel_values"]).logits, logits, atol=1e-5, rtol=1e-5)
print("Predicted class:", [merged.config.id2label[i] for i in logits.argmax(-1).tolist()])

metrics = {"losses": losses, "eval_loss": evaluated["eval_loss"], "accuracy": evaluated["eval_accuracy"], "logits": logits.tolist()}
(output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
