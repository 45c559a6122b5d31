"""DoRA (weight-decomposed LoRA) on all linear layers, with a training loop written out, and its cache for inference.

python dora_causal_lm.py results
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup, set_seed

from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import DoraCaching

output_dir = Path(sys.argv[1])
vocab_size, length, batch_size, num_epochs, lr = 64, 16, 8, 5, 2e-3


def make_rows(number, seed):
    """Numbers that count upwards from anywhere, by steps of 1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, vocab_size, (number, 1), generator=generator)
    step = torch.randint(1, 4, (number, 1), generator=generator)
    return (start + step * torch.arange(length)) % vocab_size


set_seed(0)
llama_config = LlamaConfig(
    vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.1,
)  # fmt: skip
LlamaForCausalLM(llama_config).save_pretrained(output_dir / "base")
base_model = LlamaForCausalLM.from_pretrained(output_dir / "base")

config = LoraConfig(
    use_dora=True,
    r=8,
    lora_alpha=16,
    lora_dropout=0.0,
    target_modules="all-linear",
    task_type="CAUSAL_LM",
)
set_seed(1)
model = get_peft_model(base_model, config)
model.print_trainable_parameters()

train_dataloader = DataLoader(make_rows(32, 2), batch_size=batch_size, shuffle=True, generator=torch.Generator().manual_seed(3))
eval_dataloader = DataLoader(make_rows(16, 4), batch_size=batch_size)
optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
lr_scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=len(train_dataloader) * num_epochs)

losses, eval_losses = [], []
for epoch in range(num_epochs):
    model.train()
    for input_ids in train_dataloader:
        loss = model(input_ids=input_ids, labels=input_ids).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()

    model.eval()
    eval_loss = 0.0
    for input_ids in eval_dataloader:
        with torch.no_grad():
            eval_loss += model(input_ids=input_ids, labels=input_ids).loss.item()
    eval_losses.append(eval_loss / len(eval_dataloader))
    print(f"{epoch=}: train loss {losses[-1]:.4f}, eval loss {eval_losses[-1]:.4f}")

model.save_pretrained(output_dir / "adapter")

loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(output_dir / "base"), output_dir / "adapter")
prompt = make_rows(1, 5)[:, :6]
with DoraCaching(), torch.no_grad():  # the norms of the weights are computed once
    first = loaded.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)[0].tolist()
    logits = loaded(input_ids=prompt).logits

merged = loaded.merge_and_unload(safe_merge=True)
with torch.no_grad():
    merged_logits = merged(input_ids=prompt).logits
torch.testing.assert_close(merged_logits, logits, atol=1e-4, rtol=1e-4)

metrics = {"losses": losses, "eval_losses": eval_losses, "generated": first, "logits": logits[0, -1, :8].tolist()}
(output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
