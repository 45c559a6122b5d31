"""PiSSA: start from the principal singular vectors, train, and convert the result to a LoRA file for the untouched base model.

python pissa_conversion.py results
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from peft import LoraConfig, PeftModel, get_peft_model

output_dir = Path(sys.argv[1])

set_seed(0)
llama_config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1
)
LlamaForCausalLM(llama_config).save_pretrained(output_dir / "base")
generator = torch.Generator().manual_seed(1)
rows = (torch.randint(0, 64, (48, 1), generator=generator) + torch.arange(12) * torch.randint(1, 4, (48, 1), generator=generator)) % 64
dataset = [{"input_ids": row, "labels": row} for row in rows]

# 1. PiSSA changes the base model: its weights become the residual
model = AutoModelForCausalLM.from_pretrained(output_dir / "base")
lora_config = LoraConfig(
    init_lora_weights="pissa",
    r=4,
    lora_alpha=8,
    lora_dropout=0,  # with PiSSA, the dropout is 0
    target_modules=["q_proj", "o_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)
peft_model = get_peft_model(model, lora_config)
peft_model.print_trainable_parameters()

# 2. keep the start: it is what the conversion subtracts
peft_model.peft_config["default"].init_lora_weights = True
peft_model.save_pretrained(output_dir / "pissa_init")
peft_model.peft_config["default"].init_lora_weights = "pissa"

# 3. train
training_args = TrainingArguments(
    output_dir=str(output_dir / "run"),
    max_steps=12,
    per_device_train_batch_size=8,
    learning_rate=2e-3,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
    seed=2,
)
trainer = Trainer(model=peft_model, args=training_args, train_dataset=dataset[:40])
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
eval_loss = trainer.evaluate(dataset[40:])["eval_loss"]

# 4. save twice: as PiSSA, for the residual model, and as a LoRA of twice the rank, for the base model as it was
peft_model.save_pretrained(output_dir / "pissa_ft")
peft_model.save_pretrained(output_dir / "pissa_lora", path_initial_model_for_weight_conversion=str(output_dir / "pissa_init"))

# 5. the converted file needs no singular value decomposition when it is loaded
results = {}
peft_model.eval()
with torch.no_grad():
    wanted = peft_model(input_ids=rows[40:]).logits
    for name in ["pissa_ft", "pissa_lora"]:
        base = AutoModelForCausalLM.from_pretrained(output_dir / "base")
        loaded = PeftModel.from_pretrained(base, output_dir / name)
        results[name] = loaded(input_ids=rows[40:], labels=rows[40:]).loss.item()
        torch.testing.assert_close(loaded(input_ids=rows[40:]).logits, wanted, atol=1e-4, rtol=1e-4)
        config = loaded.peft_config["default"]
        print(name, config.init_lora_weights, config.r, config.lora_alpha)
    merged = loaded.merge_and_unload()
    results["merged"] = merged(input_ids=rows[40:], labels=rows[40:]).loss.item()

metrics = {"losses": losses, "eval_loss": eval_loss, **results}
(output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
