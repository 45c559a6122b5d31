"""Activated LoRA: the adapter acts from an invocation sequence on, so that the cache of what comes before is the base model's.

python alora_invocation.py results
"""

import copy
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from peft import LoraConfig, PeftModel, TaskType, get_peft_model

output_dir = Path(sys.argv[1])

words = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|check|>", "safe", "unsafe", *(f"w{i}" for i in range(40))]
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
)

set_seed(0)
llama_config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LlamaForCausalLM(llama_config).save_pretrained(output_dir / "base")

invocation_string = "<|check|> <|user|>"
invocation_tokens = tokenizer.encode(invocation_string, add_special_tokens=False)
lora_config = LoraConfig(
    task_type=TaskType.CAUSAL_LM, r=32, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"], alora_invocation_tokens=invocation_tokens
)
set_seed(1)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(output_dir / "base"), lora_config)
model.print_trainable_parameters()

# a check of what the user said: unsafe if it has the word w7; prompts have several lengths
generator = torch.Generator().manual_seed(2)
prompts, answers = [], []
for i in range(40):
    said = [f"w{n}" for n in torch.randint(8, 40, (3 + i % 4,), generator=generator).tolist()]
    if i % 2:
        said[i % 3] = "w7"
    prompts.append(f"<s> <|user|> {' '.join(said)} {invocation_string}")
    answers.append(f"{'unsafe' if i % 2 else 'safe'} </s>")


def collate(rows):
    batch = tokenizer([f"{prompts[i]} {answers[i]}" for i in rows], return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100  # only the answer counts
    return {**batch, "labels": labels}


optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for step in range(16):
    loss = model(**collate(range(8 * (step % 4), 8 * (step % 4) + 8))).loss
    losses.append(loss.item())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()
with torch.no_grad():
    eval_loss = model(**collate(range(32, 40))).loss.item()
model.save_pretrained(output_dir / "adapter")

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(output_dir / "base"), output_dir / "adapter")
batch = tokenizer(prompts[32:], return_tensors="pt", padding=True, return_token_type_ids=False)
answered = tokenizer.batch_decode(model.generate(**batch, max_new_tokens=2, do_sample=False)[:, batch["input_ids"].shape[1] :])

# the base model reads a conversation; the adapter goes on with its cache
text = tokenizer(prompts[33], return_tensors="pt", return_token_type_ids=False)
before = text["input_ids"][:, : -len(invocation_tokens)]
cache = DynamicCache(config=model.config)
with torch.no_grad(), model.disable_adapter():
    cache = model(input_ids=before, past_key_values=cache, use_cache=True).past_key_values
with_cache = model.generate(**text, past_key_values=copy.deepcopy(cache), max_new_tokens=3, do_sample=False)[0].tolist()
assert with_cache == model.generate(**text, max_new_tokens=3, do_sample=False)[0].tolist()

metrics = {"losses": losses, "eval_loss": eval_loss, "answered": answered, "with_cache": with_cache}
(output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, evaluated {eval_loss:.4f}, answers {answered}")
