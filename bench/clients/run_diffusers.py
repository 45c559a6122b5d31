"""diffusers: a UNet trained with `add_adapter`, a pipeline's LoRA files saved, loaded, weighted, fused and unloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _client import some, weights, write

# isort: split

import torch
from _diffusers import ATTENTION, drawn, inputs, pipeline, unet
from safetensors.torch import load_file, save_file
from torch import nn

from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

FILE = "pytorch_lora_weights.safetensors"


def numbers(room: Path) -> dict[str, Any]:
    return {"training": training(), "pipeline": files(room)}


def training() -> dict[str, Any]:
    model = unet()
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, init_lora_weights="gaussian"))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(5):
        latent, step, text = inputs()
        loss = nn.functional.mse_loss(model(latent, step, text).sample, latent)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "weights": {name: some(tensor, 6) for name, tensor in sorted(get_peft_model_state_dict(model).items())}}


def files(room: Path) -> dict[str, Any]:
    for seed, name in enumerate(("first", "second")):
        written(room / name, seed)
    pipe = pipeline()
    found = {"file": weights(room / "first" / FILE), "bare": some(drawn(pipe))}
    for name in ("first", "second"):
        pipe.load_lora_weights(room / name, adapter_name=name)
        found[f"loaded {name}"] = some(drawn(pipe))
    found["adapters"] = pipe.get_list_adapters()
    pipe.set_adapters(["first", "second"], [0.5, 1.0])
    found["weighted"] = some(drawn(pipe))
    found["scaled"] = some(drawn(pipe, cross_attention_kwargs={"scale": 0.25}))
    pipe.fuse_lora(adapter_names=["first"])
    found["fused"] = some(drawn(pipe))
    pipe.unfuse_lora()
    pipe.delete_adapters("first")
    found["deleted first"] = some(drawn(pipe))
    pipe.disable_lora()
    found["disabled"] = some(drawn(pipe))
    pipe.unload_lora_weights()
    return {**found, "unloaded": some(drawn(pipe))}


def written(place: Path, seed: int) -> None:
    """Write a LoRA file of a pipeline, for its UNet and text encoder, with noise that depends on names and the seed alone."""
    source = pipeline()
    parts: dict[str, Any] = {}
    for part, targets in {"unet": ATTENTION, "text_encoder": ["q_proj", "v_proj"]}.items():
        model = getattr(source, part)
        model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets))
        parts[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        parts[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    source.save_lora_weights(place, **parts)
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(tensor.shape, generator=generator) * 0.1 for name, tensor in sorted(load_file(place / FILE).items())}
    save_file(noise, place / FILE, metadata=metadata(place / FILE))


def metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


if __name__ == "__main__":
    write(numbers)
