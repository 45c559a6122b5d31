"""LoRA for a causal language model with `Trainer`, from the config to a merged model that needs no `peft`.

    python lora_causal_lm.py results

Leaves results/adapter, results/merged and results/metrics.json. The model is made from a config, the text is made here.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft import AutoPeftModelForCausalLM, LoraConfig, TaskType, get_peft_model

output_dir = Path(sys.argv[1])

# a tokenizer and sentences
animals, verbs, adjectives = ["cat", "dog", "bird", "cow"], ["sees", "hears", "likes", "finds"], ["big", "small", "old", "red"]
words = ["<pad>", "<s>", "</s>", "<unk>", "the", "a", "and", "then", ".", *animals, *verbs, *adjectives]
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
sentences = [f"<s> the {x} {a} {v} the {y} {b} and then {v} a {a} {b} . </s>" for i, a in enumerate(animals) for j, b in enumerate(animals)
             for v, x, y in [(verbs[(i + j) % 4], adjectives[i], adjectives[(i * j) % 4])]]  # fmt: skip
dataset = [tokenizer(sentence, return_token_type_ids=False) for sentence in sentences]

# the "pretrained" base model
set_seed(0)
config = OPTConfig(
    vocab_size=32, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32,
    dropout=0.0, init_std=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
OPTForCausalLM(config).save_pretrained(output_dir / "base")
model = AutoModelForCausalLM.from_pretrained(output_dir / "base")

peft_config = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
set_seed(1)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

training_args = TrainingArguments(
    output_dir=str(output_dir / "run"),
    learning_rate=1e-2,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=4,
    num_train_epochs=8,
    weight_decay=0.01,
    eval_strategy="epoch",
    save_strategy="no",
    logging_steps=1,
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=dataset[:12],
    eval_dataset=dataset[12:],
    data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False),
)
trainer.train()
history = trainer.state.log_history
losses = [entry["loss"] for entry in history if "loss" in entry]
evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
model.save_pretrained(output_dir / "adapter")

# inference: from the folder of the adapter alone
model = AutoPeftModelForCausalLM.from_pretrained(output_dir / "adapter")
model.eval()
prompt = tokenizer("<s> the big cat", return_tensors="pt", return_token_type_ids=False)
tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
text = tokenizer.decode(tokens[0])

# a model of its own, without the adapter's layers
merged = model.merge_and_unload()
merged.save_pretrained(output_dir / "merged")
model = AutoModelForCausalLM.from_pretrained(output_dir / "merged")
assert tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]) == text
with torch.no_grad():
    merged_loss = model(**prompt, labels=prompt["input_ids"]).loss.item()

metrics = {"losses": losses, "eval_losses": evaluated, "text": text, "merged_loss": merged_loss}
(output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; {text}")
