"""Fine-tune a causal language model with LoRA: written for `peft`, as its documentation does it, and run on either package.

    python finetune_lora.py losses.json

Needs transformers, accelerate and a module `peft`. Nothing is downloaded: the model is made from a config, the text is made here.
"""

import json
import sys
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, TaskType, get_peft_model


class Counting(Dataset):
    """Rows that count upwards from anywhere, by steps of 1 or 2."""

    def __init__(self, rows, length=16, vocabulary=64):
        generator = torch.Generator().manual_seed(0)
        start = torch.randint(0, vocabulary, (rows, 1), generator=generator)
        step = torch.randint(1, 3, (rows, 1), generator=generator)
        self.ids = (start + step * torch.arange(length)) % vocabulary

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        return {"input_ids": self.ids[row], "labels": self.ids[row], "attention_mask": torch.ones_like(self.ids[row])}


class NotingTrainer(Trainer):
    """Keeps each step's loss with all its digits; logs round it."""

    losses = ()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses = (*self.losses, (loss[0] if isinstance(loss, tuple) else loss).item())
        return loss


def base_model(folder):
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def main(out):
    with tempfile.TemporaryDirectory() as folder:
        model = base_model(f"{folder}/base")
        peft_config = LoraConfig(
            task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"]
        )
        set_seed(1)
        model = get_peft_model(model, peft_config)
        model.print_trainable_parameters()
        arguments = TrainingArguments(
            output_dir=f"{folder}/run",
            learning_rate=1e-2,
            per_device_train_batch_size=8,
            max_steps=20,
            logging_steps=1,
            save_steps=10,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=2,
        )
        trainer = NotingTrainer(model=model, args=arguments, train_dataset=Counting(160))
        trainer.train()

        model.eval()
        batch = {name: value.unsqueeze(0) for name, value in Counting(4)[3].items()}
        with torch.no_grad():
            trained = model(**batch).loss.item()
            with model.disable_adapter():
                untrained = model(**batch).loss.item()
        model.save_pretrained(f"{folder}/adapter")
        loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(f"{folder}/base"), f"{folder}/adapter")
        auto = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter")
        merged = loaded.merge_and_unload()
        with torch.no_grad():
            again = [each.eval()(**batch).loss.item() for each in (auto, merged)]
        generated = model.generate(input_ids=batch["input_ids"][:, :6], max_new_tokens=6, do_sample=False)[0].tolist()

    result = {"losses": list(trainer.losses), "trained": trained, "untrained": untrained, "again": again, "generated": generated}
    with open(out, "w") as file:
        json.dump(result, file, indent=1)
    print(f"loss {trainer.losses[0]:.4f} -> {trainer.losses[-1]:.4f}, evaluated {untrained:.4f} -> {trained:.4f}")
    print(f"loaded and merged {again}, generated {generated}")


if __name__ == "__main__":
    main(sys.argv[1])
