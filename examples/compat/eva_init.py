"""EVA: initialise LoRA with the directions in which the layers' inputs vary most, and give more ranks to layers that need them.

python eva_init.py results
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights

output_dir = Path(sys.argv[1])
rank, alpha, rho = 4, 1, 2.0
target_modules = ["q_proj", "k_proj", "v_proj", "o_proj"]

set_seed(0)
llama_config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1
)
LlamaForCausalLM(llama_config).save_pretrained(output_dir / "base")
model = AutoModelForCausalLM.from_pretrained(output_dir / "base")

generator = torch.Generator().manual_seed(1)
rows = (torch.randint(0, 64, (72, 1), generator=generator) + torch.arange(16) * torch.randint(1, 4, (72, 1), generator=generator)) % 64
dataset = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
dataloader = DataLoader(dataset[:64], batch_size=8, collate_fn=lambda batch: {name: torch.stack([row[name] for row in batch]) for name in batch[0]})

eva_config = EvaConfig(rho=rho)
peft_config = LoraConfig(
    r=rank, lora_alpha=alpha, target_modules=target_modules, init_lora_weights="eva", eva_config=eva_config, task_type="CAUSAL_LM"
)
# the weights are filled by the next call, so they need no memory yet
peft_model = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
set_seed(2)
initialize_lora_eva_weights(peft_model, dataloader)
peft_model.print_trainable_parameters()
ranks = {name: int(module.r["default"]) for name, module in peft_model.named_modules() if hasattr(module, "lora_A")}
peft_model.save_pretrained(output_dir / "eva_init")

training_args = TrainingArguments(
    output_dir=str(output_dir / "run"),
    per_device_train_batch_size=8,
    max_steps=12,
    learning_rate=3e-3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
    seed=3,
)
trainer = Trainer(model=peft_model, args=training_args, train_dataset=dataset[:64])
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
eval_loss = trainer.evaluate(dataset[64:])["eval_loss"]
peft_model.save_pretrained(output_dir / "adapter")

loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(output_dir / "base"), output_dir / "adapter")
merged = loaded.merge_and_unload()
with torch.no_grad():
    merged_loss = merged(input_ids=rows[64:], labels=rows[64:]).loss.item()

metrics = {"ranks": ranks, "losses": losses, "eval_loss": eval_loss, "merged_loss": merged_loss}
(output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, evaluated {eval_loss:.4f}, merged {merged_loss:.4f}")
