"""optimum-quanto: LoRA on a model whose linear layers it quantised to 8 bits, trained, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _client import ids, llama, some, weights, write

# isort: split

import torch
from optimum.quanto import freeze, qint8, quantize

from peft import LoraConfig, PeftModel, get_peft_model


def numbers(room: Path) -> dict[str, Any]:
    out = room / "adapter"
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base(), config).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for step in range(5):
        batch = ids(4, 12, seed=step)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(out)
    loaded = PeftModel.from_pretrained(base(), out)
    return {"losses": losses, "file": weights(out / "adapter_model.safetensors"), "after": logits(model), "loaded": logits(loaded)}


def base() -> Any:
    model = llama(initializer_range=0.2)
    quantize(model, weights=qint8, exclude="lm_head")
    freeze(model)
    return model


def logits(model: Any) -> list[float]:
    with torch.no_grad():
        return some(model.eval()(input_ids=ids()).logits)


if __name__ == "__main__":
    write(numbers)
