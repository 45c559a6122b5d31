"""Arrow: several LoRA adapters of different tasks in one model; each token is routed to those that fit it, without training.

python arrow_routing.py results
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from peft import ArrowConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model

output_dir = Path(sys.argv[1])

set_seed(0)
llama_config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1
)
LlamaForCausalLM(llama_config).save_pretrained(output_dir / "base")


def load_base():
    return AutoModelForCausalLM.from_pretrained(output_dir / "base")


def make_task(step, number=16, seed=1):
    """Rows that count upwards by `step`; 0 stands for random rows, the general text."""
    generator = torch.Generator().manual_seed(seed + step)
    start = torch.randint(0, 64, (number, 1), generator=generator)
    return (start + step * torch.arange(12)) % 64 if step else torch.randint(0, 64, (number, 12), generator=generator)


# 1. train one adapter for each task, and one on general text
losses = {}
for name, step in [("one", 1), ("two", 2), ("three", 3), ("general", 0)]:
    set_seed(step)
    model = get_peft_model(load_base(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows, losses[name] = make_task(step), []
    for i in range(10):
        batch = rows[8 * (i % 2) : 8 * (i % 2) + 8]
        loss = model(input_ids=batch, labels=batch).loss
        losses[name].append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(output_dir / name)

# 2. route between them
task_adapters = [str(output_dir / name) for name in ["one", "two", "three"]]
arrow_config = ArrowConfig(top_k=2, router_temperature=1.0, rng_seed=42)
model = create_arrow_model(base_model=load_base(), task_specific_adapter_paths=task_adapters, arrow_config=arrow_config)
model.eval()
arrow_losses = {}
with torch.no_grad():
    for step in [1, 2, 3, 5]:
        rows = make_task(step, number=8, seed=9)
        arrow_losses[f"step {step}"] = model(input_ids=rows, labels=rows).loss.item()
prompt = make_task(2, number=1, seed=9)[:, :6]
generated = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)[0].tolist()

# 3. an adapter can still be used by itself
model.set_adapter("task_1")
alone = PeftModel.from_pretrained(load_base(), task_adapters[1])
with torch.no_grad():
    torch.testing.assert_close(model(input_ids=prompt).logits, alone(input_ids=prompt).logits)

# 4. the same with the general adapter's knowledge subtracted
gks_config = ArrowConfig(top_k=2, router_temperature=1.0, use_gks=True, rng_seed=42)
model = create_arrow_model(
    base_model=load_base(),
    task_specific_adapter_paths=task_adapters,
    general_adapter_paths=[str(output_dir / "general")],
    arrow_config=gks_config,
)
model.eval()
with torch.no_grad():
    rows = make_task(2, number=8, seed=9)
    gks_loss = model(input_ids=rows, labels=rows).loss.item()

metrics = {"losses": losses, "arrow_losses": arrow_losses, "generated": generated, "gks_loss": gks_loss}
(output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
print(arrow_losses, gks_loss)
