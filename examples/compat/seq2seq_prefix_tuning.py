"""Prefix tuning of an encoder-decoder model that answers with the sentiment of a text, with a training loop written out.

python seq2seq_prefix_tuning.py results
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
    get_linear_schedule_with_warmup,
    set_seed,
)

from peft import PeftConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model

output_dir = Path(sys.argv[1])
text_column, label_column, max_length, lr, num_epochs, batch_size = "sentence", "text_label", 10, 1e-2, 4, 8

words = ["<pad>", "</s>", "<unk>", "positive", "negative", "neutral", "profit", "sales", "costs", "rose", "fell", "stayed", "in", "the", "year",
         "quarter", "month", "company", "said", "that", "its"]  # fmt: skip
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")

answers = {"rose": "positive", "fell": "negative", "stayed": "neutral"}
dataset = [
    {text_column: f"{start} {subject} {verb} in the {time}", label_column: answers[verb]}
    for start in ["the company said that its", "its"]
    for time in ["year", "quarter", "month"]
    for subject in ["profit", "sales"]
    for verb in ["rose", "fell", "stayed"]
]


def preprocess_function(example):
    inputs = tokenizer(example[text_column] + " </s>", max_length=max_length, padding="max_length", truncation=True, return_token_type_ids=False)
    labels = tokenizer(example[label_column] + " </s>", max_length=2, padding="max_length", truncation=True)["input_ids"]
    return {**inputs, "labels": [token if token != tokenizer.pad_token_id else -100 for token in labels]}


processed = [preprocess_function(example) for example in dataset]
set_seed(0)
train_dataloader = DataLoader(processed[:24], shuffle=True, collate_fn=default_data_collator, batch_size=batch_size)
eval_dataloader = DataLoader(processed[24:], collate_fn=default_data_collator, batch_size=batch_size)

config = T5Config(
    vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    initializer_factor=0.3,
)  # fmt: skip
T5ForConditionalGeneration(config).save_pretrained(output_dir / "base")
model = AutoModelForSeq2SeqLM.from_pretrained(output_dir / "base")
peft_config = PrefixTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, num_virtual_tokens=20)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
lr_scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=len(train_dataloader) * num_epochs)
losses, eval_losses, eval_preds = [], [], []
for epoch in range(num_epochs):
    model.train()
    for batch in train_dataloader:
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()

    model.eval()
    eval_loss, eval_preds = 0.0, []
    for batch in eval_dataloader:
        with torch.no_grad():
            outputs = model(**batch)
        eval_loss += outputs.loss.item()
        eval_preds.extend(tokenizer.batch_decode(outputs.logits.argmax(-1), skip_special_tokens=True))
    eval_losses.append(eval_loss / len(eval_dataloader))
    print(f"{epoch=}: perplexity {torch.tensor(losses[-1]).exp():.3f} {torch.tensor(eval_losses[-1]).exp():.3f}")
accuracy = sum(pred == example[label_column] for pred, example in zip(eval_preds, dataset[24:], strict=True)) / len(eval_preds)

model.save_pretrained(output_dir / "adapter")

config = PeftConfig.from_pretrained(output_dir / "adapter")
model = AutoModelForSeq2SeqLM.from_pretrained(config.base_model_name_or_path)
model = PeftModel.from_pretrained(model, output_dir / "adapter")
model.eval()
inputs = tokenizer(dataset[30][text_column] + " </s>", return_tensors="pt", return_token_type_ids=False)
with torch.no_grad():
    outputs = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5, do_sample=False)
answer = tokenizer.batch_decode(outputs, skip_special_tokens=True)

metrics = {"losses": losses, "eval_losses": eval_losses, "eval_preds": eval_preds, "accuracy": accuracy, "answer": answer}
(output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
