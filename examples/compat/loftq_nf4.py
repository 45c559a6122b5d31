"""LoftQ for a base model that bitsandbytes quantised to 4 bits (NF4), applied layer by layer where it helps.

    python loftq_nf4.py results

Needs bitsandbytes and scipy.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, set_seed

from peft import LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq

output_dir = Path(sys.argv[1])

set_seed(0)
llama_config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1
)
LlamaForCausalLM(llama_config).save_pretrained(output_dir / "base")
generator = torch.Generator().manual_seed(1)
rows = (torch.randint(0, 64, (56, 1), generator=generator) + torch.arange(12) * torch.randint(1, 4, (56, 1), generator=generator)) % 64
calibration = rows[48:]


def load_quantised():
    bnb_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, bnb_4bit_use_double_quant=False
    )
    return AutoModelForCausalLM.from_pretrained(output_dir / "base", quantization_config=bnb_config, dtype=torch.float32, device_map="cpu")


def distance(model):
    """How far the logits of the quantised model are from those of the dense one."""
    with torch.no_grad():
        return torch.nn.functional.mse_loss(model(input_ids=calibration).logits, dense_logits).item()


dense = AutoModelForCausalLM.from_pretrained(output_dir / "base")
with torch.no_grad():
    dense_logits = dense(input_ids=calibration).logits

set_seed(2)
model = load_quantised()
lora_config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules="all-linear")
model = get_peft_model(model, lora_config)
model.train()  # nothing here is random; in eval mode bitsandbytes packs the 4-bit weights anew on some CPUs
distances = [distance(model)]
names = []


def loftq_callback(model, module_name):
    """Keep what LoftQ proposes for a layer if it brings the logits nearer to those of the dense model."""
    now = distance(model)
    names.append([module_name, now < distances[-1]])
    if now < distances[-1]:
        distances.append(now)
        return True
    return False


replace_lora_weights_loftq(model, model_path=str(output_dir / "base" / "model.safetensors"), callback=loftq_callback)
replace_lora_weights_loftq(model, model_path=str(output_dir / "base" / "model.safetensors"), callback=loftq_callback)
print(f"{sum(kept for _, kept in names)} of {len(names)} proposals kept, distance {distances[0]:.5f} -> {distances[-1]:.5f}")
model.save_pretrained(output_dir / "loftq_init")

optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=3e-3)
losses = []
for step in range(12):
    batch = rows[4 * step : 4 * step + 4]
    loss = model(input_ids=batch, labels=batch).loss
    losses.append(loss.item())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

with torch.no_grad():
    eval_loss = model(input_ids=calibration, labels=calibration).loss.item()
model.save_pretrained(output_dir / "adapter")

# the file is for a base quantised in the same way
loaded = PeftModel.from_pretrained(load_quantised(), output_dir / "adapter")
loaded.train()
with torch.no_grad():
    loaded_loss = loaded(input_ids=calibration, labels=calibration).loss.item()

metrics = {"kept": names, "distances": distances, "losses": losses, "eval_loss": eval_loss, "loaded_loss": loaded_loss}
(output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, evaluated {eval_loss:.4f}")
