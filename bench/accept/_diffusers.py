"""What the checks of diffusers act on: a tiny UNet, a Stable Diffusion pipeline without a tokenizer, a Flux transformer; all from configs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _common import folder, randomise  # first: it sets the environment

# isort: split

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def unet(seed: int = 0) -> Any:
    """Return a UNet of two levels with cross attention (width 16 and 32, text width 32), in eval mode."""
    torch.manual_seed(seed)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8,
    )  # fmt: skip
    return model.eval()


def sampled(model: Any, **extra: Any) -> Tensor:
    """Return what the UNet predicts for one fixed latent (2, 4, 8, 8), timestep and text, without gradients."""
    with torch.no_grad():
        output: Tensor = model(*inputs(), **extra).sample
    return output


def inputs() -> tuple[Tensor, int, Tensor]:
    """Return a latent (2, 4, 8, 8), a timestep and text states (2, 5, 32)."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 4, 8, 8, generator=generator), 10, torch.randn(2, 5, 32, generator=generator)


def adapted(*adapters: str, r: int = 4, alpha: int = 8, targets: list[str] = ATTENTION, **settings: Any) -> Any:
    """Return the UNet with LoRA adapters of these names, filled with noise that differs by name; the last one is active."""
    model = unet()
    for seed, name in enumerate(adapters or ("default",)):
        model.add_adapter(LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **settings), name)
        randomise(model, name, seed=20 + seed)
    return model


def named_layers(model: nn.Module) -> dict[str, Any]:
    """Return the adapter layers of the model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def layers(model: nn.Module) -> list[Any]:
    """Return the adapter layers of the model."""
    return list(named_layers(model).values())


def listed(config: Any) -> dict[str, Any]:
    """Return `to_dict` of a config with sets and lists sorted, as JSON does not tell them apart."""
    return {key: sorted(value) if isinstance(value, (set, list)) else value for key, value in config.to_dict().items()}


@contextmanager
def warnings_of(logger: str) -> Iterator[list[str]]:
    """Collect what this logger of diffusers says at level warning or above."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.WARNING)
    found.addHandler(handler)
    try:
        yield said
    finally:
        found.removeHandler(handler)
        found.setLevel(level)


def pipeline() -> Any:
    """Return a Stable Diffusion pipeline of tiny parts: the UNet above, CLIP text (width 32), a VAE of two levels; no tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, max_position_embeddings=8,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    text_model: Any = CLIPTextModel(text)
    made = diffusers.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text_model.eval(), tokenizer=None, unet=unet(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipe: Any, **extra: Any) -> Tensor:
    """Return the latents (1, 4, 8, 8) that the pipeline draws from one fixed prompt through its text encoder."""
    words = torch.tensor([[1, 5, 6, 7, 8, 9, 3, 2]])
    with torch.no_grad():
        states = pipe.text_encoder(words)[0]
        blank = torch.zeros_like(states)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        settings = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 2.0, "latents": latents}
        drawing: Tensor = pipe(prompt_embeds=states, negative_prompt_embeds=blank, **settings, **extra).images
    return drawing


def written(seed: int) -> tuple[Path, Tensor]:
    """Return the folder of a pipeline's LoRA file, made for UNet and text encoder from `seed`, and what that pipeline draws."""
    source, place = pipeline(), folder()
    parts, metadata = {}, {}
    for part, targets in {"unet": ATTENTION, "text_encoder": ["q_proj", "v_proj"]}.items():
        model = getattr(source, part)
        model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets))
        randomise(model, scale=0.3, seed=seed)
        parts[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        metadata[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    source.save_lora_weights(place, **parts, **metadata)
    return place, drawn(source)


def flux() -> Any:
    """Return a Flux transformer of one double and one single block (two heads of 16), in eval mode."""
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], **sizes
    ).eval()


def seen(model: Any, **extra: Any) -> Tensor:
    """Return what the transformer predicts (1, 4, 4) for fixed latents, text and timestep, without gradients."""
    generator = torch.Generator().manual_seed(2)
    states, text, pooled = (torch.randn(*shape, generator=generator) for shape in ((1, 4, 4), (1, 3, 32), (1, 32)))
    where, time = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}, torch.tensor([0.5])
    with torch.no_grad():
        output: Tensor = model(hidden_states=states, encoder_hidden_states=text, pooled_projections=pooled, timestep=time, **where, **extra).sample
    return output
