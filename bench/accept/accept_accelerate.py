"""What accelerate needs of the module `peft`: detection, unwrapping, state saving, mixed precision, dispatch with offloading, meta bases."""

# mypy: disable-error-code="import-untyped,no-untyped-call"

from __future__ import annotations

from typing import Any

import _common  # first: it sets the environment
import torch
from _common import better, check, close, differ, folder, ids, llama, logits, no_meta, randomise, same
from accelerate import Accelerator, cpu_offload, dispatch_model, init_empty_weights
from accelerate.utils import extract_model_from_parallel
from accelerate.utils.imports import is_peft_available
from accelerate.utils.modeling import is_peft_model
from torch import Tensor, nn

from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, set_peft_model_state_dict

#: the tiny Llama with its second decoder layer on the disk
DEVICES = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


def lora(**changes: Any) -> Any:
    """Return a LoRA config for a causal model."""
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})


def tuned(seed: int = 1, **changes: Any) -> Any:
    """Return a tiny Llama with LoRA, started from `seed`."""
    base = llama()
    torch.manual_seed(seed)  # only now: the base seeds, too
    return get_peft_model(base, lora(init_lora_weights=False, **changes))


def accelerator(**changes: Any) -> Any:
    """Return an accelerator on the CPU, whatever an earlier one said."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return Accelerator(**{"cpu": True, **changes})


def sgd(model: Any) -> torch.optim.Optimizer:
    """Return plain SGD over what trains."""
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)


def weights(model: Any) -> dict[str, Tensor]:
    """Return copies of the adapter's parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}


def alike(left: Any, right: Any, atol: float = 1e-5) -> bool:
    """Whether two models hold the same adapter."""
    ours, theirs = weights(left), weights(right)
    return ours.keys() == theirs.keys() and len(ours) == 8 and all(close(ours[key], theirs[key], atol) for key in ours)


def no_meta_adapter(model: Any) -> bool:
    """Whether all weights of the adapter are on the CPU."""
    return len(weights(model)) == 8 and {value.device.type for value in weights(model).values()} == {"cpu"}


def detection() -> None:
    """`is_peft_model` and unwrapping (§4)."""
    model = tuned()
    check("is_peft_available", is_peft_available())
    check("is_peft_model: a PeftModel", is_peft_model(model) and not is_peft_model(llama()))
    check("…of any method", is_peft_model(get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))))
    mixed = get_peft_model(llama(), lora(), mixed=True)
    check("a PeftMixedModel is none", not is_peft_model(mixed))
    check("the wrapper has no .module", not hasattr(model, "module") and not hasattr(mixed, "module"))
    helper = accelerator()
    check("unwrap_model stops at the PeftModel", helper.unwrap_model(helper.prepare(model)) is model and extract_model_from_parallel(model) is model)


def training() -> None:
    """prepare, accumulate, clip_grad_norm_ and autocast."""
    tokens = ids(4, 8)
    whole = tuned()
    optimizer = sgd(whole)
    for _ in range(2):
        whole(input_ids=tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    helper = accelerator(gradient_accumulation_steps=2)
    model = tuned()
    model, optimizer = helper.prepare(model, sgd(model))
    for _ in range(2):
        for half in tokens.split(2):
            with helper.accumulate(model):
                helper.backward(model(input_ids=half, labels=half).loss)
                if helper.sync_gradients:
                    helper.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    check("accumulated halves equal the whole batch", alike(whole, model) and not alike(whole, tuned()))
    half = accelerator(mixed_precision="bf16")
    model = tuned()
    model, optimizer = half.prepare(model, sgd(model))
    before = weights(model)
    output = model(input_ids=tokens, labels=tokens)
    half.backward(output.loss)
    optimizer.step()
    check(
        "bf16: float32 out, float32 adapters", output.logits.dtype == torch.float32 and {v.dtype for v in weights(model).values()} == {torch.float32}
    )
    moved = [name for name, value in weights(model).items() if differ(value, before[name], 1e-7)]
    check("bf16: every adapter weight moved", len(moved) == 8, moved)
    accelerator()


def states() -> None:
    """save_state and load_state, and the recipe with hooks that keeps the adapter alone."""
    tokens = ids(4, 8)

    def step(helper: Any, model: Any, optimizer: Any) -> None:
        helper.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()

    helper = accelerator()
    model = tuned()
    model, optimizer = helper.prepare(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05))
    step(helper, model, optimizer)
    path = folder()
    helper.save_state(str(path))
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    step(helper, model, optimizer)
    want = weights(model)
    helper.load_state(str(path))
    check("load_state: every tensor is back", same(kept, dict(model.state_dict())))
    step(helper, model, optimizer)
    check("…and the optimizer's, so that the next step is the same", same(want, weights(model)))
    check("get_state_dict: the wrapper's own names", list(helper.get_state_dict(model)) == list(model.state_dict()))

    other = accelerator()
    model = tuned()
    model = other.prepare(model)

    def save(models: list[Any], tensors: list[dict[str, Tensor]], directory: str) -> None:
        for one in models:
            other.unwrap_model(one).save_pretrained(directory)
            tensors.pop()

    def load(models: list[Any], directory: str) -> None:
        from peft import load_peft_weights

        while models:
            set_peft_model_state_dict(other.unwrap_model(models.pop()), load_peft_weights(directory))

    other.register_save_state_pre_hook(save)
    other.register_load_state_pre_hook(load)
    hooked = folder()
    other.save_state(str(hooked))
    names = {file.name for file in hooked.iterdir()}
    check("hooks: the adapter alone is written", "adapter_model.safetensors" in names and "model.safetensors" not in names, names)
    want = weights(model)
    randomise(model)
    other.load_state(str(hooked))
    check("hooks: and read", same(want, weights(model)) and alike(model, PeftModel.from_pretrained(llama(), hooked)))


def offloading() -> None:
    """Bases dispatched to the CPU and the disk, and meta bases (§4, §11.3)."""
    path = folder()
    source = tuned()
    source.save_pretrained(path)
    want = logits(source)
    base = dispatch_model(llama(), DEVICES, offload_dir=str(folder()))
    model: Any = PeftModel.from_pretrained(base, path)
    check("dispatched with a layer on the disk: the same output", close(logits(model), want))
    check("the adapter's weights are on the CPU, also of the layer on the disk", no_meta_adapter(model))
    again = folder()
    model.save_pretrained(again)
    check("saved from there: the same adapter", alike(PeftModel.from_pretrained(llama(), again), source))
    plain: Any = PeftModel.from_pretrained(dispatch_model(llama(), {"": "cpu"}, force_hooks=True), path, is_trainable=True)
    check("hooks on the CPU alone: the same output", close(logits(plain), want))
    plain(input_ids=ids(), labels=ids()).loss.backward()
    gradients = [parameter.grad for parameter in plain.parameters() if parameter.requires_grad]
    check("…and gradients", len(gradients) == 8 and all(g is not None and bool(g.abs().sum() > 0) for g in gradients))
    with init_empty_weights():
        empty = llama()
    wrapped: Any = get_peft_model(empty, lora())
    check("a meta base can be wrapped", all(parameter.is_meta for name, parameter in wrapped.named_parameters() if "lora_" not in name))
    check("…and counted", wrapped.get_nb_trainable_parameters() == get_peft_model(llama(), lora()).get_nb_trainable_parameters())
    low = PeftModel.from_pretrained(llama(), path, low_cpu_mem_usage=True)
    check("low_cpu_mem_usage: nothing is left on meta", no_meta(low) and close(logits(low), want))

    def made_on_offloaded() -> bool:
        late = get_peft_model(dispatch_model(llama(), DEVICES, offload_dir=str(folder())), lora())
        late.load_state_dict(weights(source), strict=False)
        return no_meta_adapter(late) and close(logits(late), want)

    better("§11.3: a new adapter on an offloaded layer is not on meta", made_on_offloaded)

    def offloaded_by_hooks_alone() -> bool:
        hooked: Any = PeftModel.from_pretrained(cpu_offload(llama(), torch.device("cpu")), path)
        return all(not value.is_meta for value in weights(hooked).values()) and close(logits(hooked), want)

    better("§11.3: a base offloaded without hf_device_map gets its adapter", offloaded_by_hooks_alone)


if __name__ == "__main__":
    _common.run("accept_accelerate", [detection, training, states, offloading])
