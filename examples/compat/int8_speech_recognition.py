"""LoRA on a speech model whose weights are 8-bit integers (bitsandbytes), trained with `Seq2SeqTrainer`.

    python int8_speech_recognition.py results

Needs bitsandbytes.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForSpeechSeq2Seq,
    BitsAndBytesConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    set_seed,
)

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

output_dir = Path(sys.argv[1])

# tones instead of speech: three notes in a second, and their numbers as the text
feature_extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
generator = np.random.default_rng(0)
time = np.arange(16000 // 3) / 16000
rows = []
for _ in range(40):
    notes = generator.integers(0, 5, 3)
    audio = np.concatenate([np.sin(2 * np.pi * 220 * 2 ** (note / 2) * time) for note in notes]).astype(np.float32)
    features = feature_extractor(audio, sampling_rate=16000).input_features[0]
    rows.append({"input_features": features, "labels": [*(10 + note for note in notes.tolist()), 2]})


def data_collator(features):
    input_features = torch.tensor(np.stack([feature["input_features"] for feature in features]), dtype=torch.float32)
    return {"input_features": input_features, "labels": torch.tensor([feature["labels"] for feature in features])}


set_seed(0)
whisper_config = WhisperConfig(
    vocab_size=32, num_mel_bins=16, max_source_positions=50, max_target_positions=16, d_model=32, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, init_std=0.1, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None, use_cache=False,
)  # fmt: skip
WhisperForConditionalGeneration(whisper_config).save_pretrained(output_dir / "base")


def load_in_8bit():
    return AutoModelForSpeechSeq2Seq.from_pretrained(
        output_dir / "base", quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32, device_map="cpu"
    )


model = prepare_model_for_kbit_training(load_in_8bit())


def make_inputs_require_grad(module, input, output):
    output.requires_grad_(True)


model.model.encoder.conv1.register_forward_hook(make_inputs_require_grad)

config = LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none")
set_seed(1)
model = get_peft_model(model, config)
model.print_trainable_parameters()


class SavePeftModelCallback(TrainerCallback):
    """Save only the adapter with each checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        kwargs["model"].save_pretrained(f"{args.output_dir}/adapter-{state.global_step}")
        return control


training_args = Seq2SeqTrainingArguments(
    output_dir=str(output_dir / "run"),
    per_device_train_batch_size=8,
    per_device_eval_batch_size=8,
    learning_rate=2e-3,
    warmup_steps=2,
    max_steps=12,
    eval_strategy="steps",
    eval_steps=6,
    save_steps=6,
    logging_steps=1,
    gradient_checkpointing=True,
    remove_unused_columns=False,  # the PeftModel's forward has another signature than the model's
    label_names=["labels"],
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
trainer = Seq2SeqTrainer(
    args=training_args,
    model=model,
    train_dataset=rows[:32],
    eval_dataset=rows[32:],
    data_collator=data_collator,
    callbacks=[SavePeftModelCallback],
)
model.config.use_cache = False
trainer.train()
history = trainer.state.log_history
losses = [entry["loss"] for entry in history if "loss" in entry]
eval_losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
model.save_pretrained(output_dir / "adapter")

peft_config = PeftConfig.from_pretrained(output_dir / "adapter")
model = PeftModel.from_pretrained(load_in_8bit(), output_dir / "adapter")
model.eval()
batch = data_collator(rows[32:36])
with torch.no_grad():
    loss = model(**batch).loss.item()
    tokens = model.generate(input_features=batch["input_features"], max_new_tokens=4, do_sample=False).tolist()

metrics = {"losses": losses, "eval_losses": eval_losses, "loss": loss, "tokens": tokens}
(output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {tokens}")
