"""Rank-stabilised LoRA with a high rank, on a classifier of sentence pairs, with a plain loop as in many notebooks about GLUE.

    python rslora_sequence_classification.py results

Needs accelerate, which moves the model and the batches to the device.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    get_linear_schedule_with_warmup,
    set_seed,
)

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

output_dir = Path(sys.argv[1])
batch_size, num_epochs, lr = 8, 4, 1e-3

peft_config = LoraConfig(
    task_type="SEQ_CLS",
    inference_mode=False,
    r=32,
    lora_alpha=16,
    lora_dropout=0.1,
    use_rslora=True,
    target_modules=["query", "value"],
    rank_pattern={"layer.0.attention.self.value": 8},
    bias="lora_only",
)

# pairs of rows of tokens: does the second row repeat the first one?
generator = torch.Generator().manual_seed(0)
pairs = []
for i in range(48):
    first = torch.randint(5, 60, (6,), generator=generator)
    second = first.flip(0) if i % 2 else torch.randint(5, 60, (6,), generator=generator)
    padding = torch.full((i % 3,), 1)
    input_ids = torch.cat([torch.tensor([0]), first, torch.tensor([2, 2]), second, torch.tensor([2]), padding])
    pairs.append({"input_ids": input_ids, "labels": i % 2})


def collate_fn(examples):
    input_ids = torch.nn.utils.rnn.pad_sequence([example["input_ids"] for example in examples], batch_first=True, padding_value=1)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 1).long(), "labels": torch.tensor([example["labels"] for example in examples])}


set_seed(42)
config = RobertaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40, type_vocab_size=1,
    num_labels=2, initializer_range=0.1,
)  # fmt: skip
RobertaForSequenceClassification(config).save_pretrained(output_dir / "base")

model = AutoModelForSequenceClassification.from_pretrained(output_dir / "base")
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

train_dataloader = DataLoader(pairs[:32], shuffle=True, collate_fn=collate_fn, batch_size=batch_size)
eval_dataloader = DataLoader(pairs[32:], shuffle=False, collate_fn=collate_fn, batch_size=batch_size)
optimizer = AdamW(params=model.parameters(), lr=lr)
lr_scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=1, num_training_steps=len(train_dataloader) * num_epochs)
accelerator = Accelerator(cpu=True)
model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
)


def evaluate(model):
    """Return the accuracy, and the logits of the last batch."""
    model.eval()
    right = 0
    for batch in eval_dataloader:
        with torch.no_grad():
            outputs = model(**batch)
        right += (outputs.logits.argmax(dim=-1) == batch["labels"]).sum().item()
    return right / len(eval_dataloader.dataset), outputs.logits


losses, accuracies = [], []
for _ in range(num_epochs):
    model.train()
    for batch in train_dataloader:
        loss = model(**batch).loss
        losses.append(loss.item())
        accelerator.backward(loss)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
    accuracy, logits = evaluate(model)
    accuracies.append(accuracy)
accelerator.unwrap_model(model).save_pretrained(output_dir / "adapter")

config = PeftConfig.from_pretrained(output_dir / "adapter")
inference_model = AutoModelForSequenceClassification.from_pretrained(config.base_model_name_or_path)
inference_model = PeftModel.from_pretrained(inference_model, output_dir / "adapter")
accuracy, loaded_logits = evaluate(inference_model)
_, merged_logits = evaluate(inference_model.merge_and_unload())
torch.testing.assert_close(loaded_logits, logits)
torch.testing.assert_close(merged_logits, logits, atol=1e-5, rtol=1e-5)

metrics = {"losses": losses, "accuracies": accuracies, "accuracy": accuracy, "logits": loaded_logits.tolist()}
(output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, accuracy {accuracy:.2f}")
