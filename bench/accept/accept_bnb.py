"""What a bitsandbytes base needs of the module `peft` (integrations.md §8): int8, nf4 and fp4 on the CPU; act, train, files, merge, switch.

Run `python accept_bnb.py` where bitsandbytes 0.50 and a module `peft` are installed; see `_common.py` for what is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from _common import better, check, close, differ, folder, ids, llama, logits, raises, randomise, run, same  # first: it sets the environment

# isort: split

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from peft import LoftQConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.tuners_utils import BaseTunerLayer

KINDS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 64 are quantised together

_dense: list[Path] = []


def dense_folder() -> Path:
    """Return the folder with the dense model that all kinds are loaded from; made once."""
    if not _dense:
        place = folder()
        llama(**SIZES).save_pretrained(place)
        _dense.append(place)
    return _dense[0]


def dense() -> Any:
    """Return the dense model, in eval mode."""
    made: Any = AutoModelForCausalLM.from_pretrained(dense_folder(), dtype=torch.float32, attn_implementation="eager")
    return made.eval()


def quantised(kind: str) -> Any:
    """Return the model quantised at load to int8, nf4 (double quantisation) or fp4, computing in float32, in eval mode."""
    settings = {**KINDS[kind], **({"bnb_4bit_compute_dtype": torch.float32} if "load_in_4bit" in KINDS[kind] else {})}
    make: Any = BitsAndBytesConfig
    config = make(**settings)
    made: Any = AutoModelForCausalLM.from_pretrained(
        dense_folder(), quantization_config=config, dtype=torch.float32, attn_implementation="eager", device_map="cpu"
    )
    return made.eval()


def said(model: Any) -> Tensor:
    """Return the logits in training mode (nothing here is random): in eval mode, bitsandbytes packs 4-bit weights anew on some CPUs."""
    model.train()
    with torch.no_grad():
        output: Tensor = model(input_ids=ids()).logits
    return output


def lora(**settings: Any) -> LoraConfig:
    """Return a LoRA config of rank 4 on q_proj, v_proj and down_proj, for causal language models."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **settings})


def wrapped(kind: str, **settings: Any) -> Any:
    """Return the quantised model with a new LoRA adapter."""
    return get_peft_model(quantised(kind), lora(**settings))


def layers(model: nn.Module) -> list[Any]:
    """Return the adapter layers of the model."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def packed(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the quantised weights, by their names in the plain model."""
    found = {name: value for name, value in model.named_parameters() if value.dtype in (torch.int8, torch.uint8)}
    return {name.removeprefix("base_model.model.").replace(".base_layer", ""): value.detach().clone() for name, value in found.items()}


def weight_of(layer: Any) -> Tensor:
    """Return the dense weight (out, in) that a quantised layer stands for, in float32."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scale = layer.weight.SCB if getattr(layer.weight, "SCB", None) is not None else layer.state.SCB
        weight: Tensor = layer.weight.data.float() * scale.view(-1, 1).float() / 127
        return weight
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return weight


def size_of_error(kind: str, weight: Tensor) -> float:
    """Return how far a weight may move when it is quantised again: half a step of int8, or what the widest gap of a 4-bit table leaves."""
    return float(weight.abs().max()) * {"int8": 1 / 127, "nf4": 0.17, "fp4": 0.19}[kind]


# ---- themes: each goes through int8, nf4 and fp4 ----------------------------------------------------------------------------------


def acts() -> None:
    wrap: Any = get_peft_model
    for kind in KINDS:
        model = quantised(kind)
        plain, before = logits(model), packed(model)
        classes = {name: type(module) for name, module in model.named_modules()}
        model = wrap(model, lora())
        check(f"{kind}: a new adapter changes nothing", torch.equal(logits(model), plain))
        cls = Linear8bitLt if kind == "int8" else Linear4bit
        found = layers(model)
        kept = all(isinstance(layer, LoraLayer) and isinstance(layer, cls) for layer in found)
        check(f"{kind}: the layer's class is that of the base's kind", kept and len(found) == 6, {type(layer).__name__ for layer in found})
        same_base = all(isinstance(layer.get_base_layer(), bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit) for layer in found)
        check(f"{kind}: get_base_layer is the quantised layer", same_base)
        shapes = {(layer.in_features, layer.out_features) for layer in found}
        check(f"{kind}: in and out features are dense sizes", shapes == {(64, 64), (64, 32), (128, 64)}, shapes)
        weights = [value for name, value in model.named_parameters() if ".lora_" in name]
        check(f"{kind}: adapter weights are float32 on the CPU", {(value.dtype, value.device.type) for value in weights} == {(torch.float32, "cpu")})
        named = [name for name, value in model.named_parameters() if value.requires_grad]
        check(f"{kind}: only the adapter trains", named and all(".lora_" in name for name in named))
        trainable, total = model.get_nb_trainable_parameters()
        dense_total = sum(value.numel() for value in dense().parameters())
        counted = trainable == sum(value.numel() for value in weights) and total == dense_total + trainable
        check(f"{kind}: parameters are counted as dense ones", counted, (trainable, total, dense_total))
        randomise(model)
        acting = logits(model)
        check(f"{kind}: the adapter acts", differ(acting, plain))
        with model.disable_adapter():
            off = logits(model)
        check(f"{kind}: disabled, the base is what it was", torch.equal(off, plain) and same(packed(model), before))
        one = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = one.base_layer(x) + one.scaling["default"] * x @ one.lora_A["default"].weight.T @ one.lora_B["default"].weight.T
            check(f"{kind}: the layer adds scaling·B·A·x", close(one(x), wanted, 1e-4))
            half = one.base_layer(x.bfloat16()).dtype
            check(f"{kind}: the result has the dtype of the base's", one(x.bfloat16()).dtype == half)
        for _, value in model.named_parameters():
            if value.requires_grad:
                value.data = value.data.to(torch.bfloat16)
        check(f"{kind}: adapter weights cast to bfloat16, as trl does, act alike", close(logits(model), acting, 0.05))
        model = model.unload()
        unwrapped = {name: type(module) for name, module in model.named_modules()} == classes
        check(f"{kind}: unloading leaves the quantised model", unwrapped and torch.equal(logits(model), plain) and same(packed(model), before))


def trains() -> None:
    tokens = [{"input_ids": row, "labels": row} for row in ids(8, 8).tolist()]
    prepare: Any = prepare_model_for_kbit_training
    for kind in KINDS:
        model = prepare(quantised(kind))
        norms = {value.dtype for name, value in model.named_parameters() if "norm" in name}
        frozen = not any(value.requires_grad for value in model.parameters())
        check(f"{kind}: preparing freezes, and keeps norms in float32", norms == {torch.float32} and frozen, norms)
        model = get_peft_model(model, lora())
        before = packed(model)
        args = TrainingArguments(
            output_dir=str(folder()), max_steps=6, per_device_train_batch_size=4, learning_rate=0.02, logging_steps=1, report_to="none", seed=1,
            save_strategy="no", use_cpu=True, gradient_checkpointing=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=tokens)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        check(f"{kind}: Trainer with checkpointing lowers the loss", losses[-1] < losses[0], losses)
        check(f"{kind}: training leaves the packed weights as they were", before and same(packed(model), before))


def files() -> None:
    for kind in KINDS:
        model, place = wrapped(kind), folder()
        randomise(model)
        acting = logits(model)
        model.save_pretrained(place)
        again = PeftModel.from_pretrained(quantised(kind), place)
        check(f"{kind}: a file comes back as it was", torch.equal(logits(again), acting))
        loose, plain = logits(PeftModel.from_pretrained(dense(), place)), logits(dense())
        check(f"{kind}: the file loads onto the dense base", differ(loose, plain) and close(loose - plain, acting - logits(quantised(kind)), 0.5))


def merges() -> None:
    for kind in KINDS:
        model = wrapped(kind)
        randomise(model, scale=0.05)
        loose = said(model)
        with model.disable_adapter():
            plain = said(model)
        one = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        before, delta = weight_of(one.get_base_layer()), one.get_delta_weight("default").detach().float()
        model.merge_adapter(safe_merge=True)
        wanted = before + delta
        limit, moved = size_of_error(kind, wanted) + 1e-6, float((weight_of(one.get_base_layer()) - wanted).abs().max())
        check(f"{kind}: merged weights are W+Δ to the kind's accuracy", moved <= limit, (moved, limit))
        check(f"{kind}: merging keeps the layer's class", type(one.get_base_layer()).__name__ == ("Linear8bitLt" if kind == "int8" else "Linear4bit"))
        merged = said(model)
        near, least = float((merged - loose).norm() / loose.norm()), {"int8": 0.05, "nf4": 0.25, "fp4": 0.35}[kind]
        check(f"{kind}: merged logits are near the loose ones", near < least and differ(merged, plain), near)
        model.unmerge_adapter()
        back = float((weight_of(one.get_base_layer()) - before).abs().max())
        check(f"{kind}: unmerged weights are W to the kind's accuracy", back <= 2 * limit, (back, 2 * limit))
        final = model.merge_and_unload()
        kept = not layers(final) and type(final.model.layers[0].self_attn.q_proj) is (bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit)
        check(f"{kind}: merge_and_unload leaves a quantised layer", kept and differ(said(final), plain))
        if kind != "int8":
            state = final.model.layers[0].self_attn.q_proj.weight.quant_state
            settings = (state.quant_type, state.nested, state.blocksize)
            check(f"{kind}: it keeps the settings of its kind", settings == (kind, kind == "nf4", 64), settings)
        broken = wrapped(kind)
        randomise(broken)
        next(value for name, value in broken.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
        raises(f"{kind}: safe_merge refuses weights that are not finite", ValueError, partial(broken.merge_adapter, safe_merge=True))


def switches() -> None:
    for kind in KINDS:
        model = get_peft_model(quantised(kind), lora(), adapter_name="a")
        model.add_adapter("b", lora(r=2))
        randomise(model, "a")
        randomise(model, "b", seed=8)
        of_a = logits(model)
        model.set_adapter("b")
        of_b = logits(model)
        model.set_adapter("a")
        check(f"{kind}: adapters switch", differ(of_a, of_b) and torch.equal(logits(model), of_a))
        with torch.no_grad():
            mixed = model.eval()(input_ids=ids(), adapter_names=["a", "b"]).logits
        check(f"{kind}: each row has its adapter", close(mixed[0], of_a[0], 2e-2) and close(mixed[1], of_b[1], 2e-2))
        dora = wrapped(kind, use_dora=True)  # no forward yet: bitsandbytes moves the scales of int8 in the first one
        one = dora.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        norms = weight_of(one.get_base_layer()).norm(dim=1)
        started = close(one.lora_magnitude_vector["default"].weight, norms, 1e-3)
        check(f"{kind}: DoRA starts at the norms of the weights and changes nothing", started and close(said(dora), said(quantised(kind)), 2e-2))
        model.delete_adapter("b")
        check(f"{kind}: an adapter is deleted", torch.equal(logits(model), of_a) and list(model.peft_config) == ["a"])


def ours_alone() -> None:
    def backend(kind: str) -> bool:
        model = wrapped(kind)
        return all(status.quantization_backend for status in model.get_layer_status())

    def exact(kind: str) -> bool:
        model = wrapped(kind)
        randomise(model)
        before: Mapping[str, Tensor] = packed(model)
        model.merge_adapter()
        moved = not same(packed(model), before)
        model.unmerge_adapter()
        return moved and same(packed(model), before)

    def after_eval(kind: str) -> bool:
        model = wrapped(kind).eval()
        randomise(model, scale=0.05)
        loose = logits(model)
        model.merge_adapter()
        return float((logits(model) - loose).norm() / loose.norm()) < 0.35

    def loha(kind: str) -> bool:
        wrap: Any = get_peft_model
        plain = quantised(kind)
        base = logits(plain)
        try:
            model = wrap(plain, LoHaConfig(r=4, alpha=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
        except (ValueError, TypeError) as error:
            return "quant" in str(error).lower()
        randomise(model, scale=0.5)
        loose = said(model)
        model.merge_adapter()
        return differ(loose, base) and float((said(model) - loose).norm() / loose.norm()) < 0.35

    for kind in KINDS:
        better(f"{kind}: the status names the backend", partial(backend, kind))
        better(f"{kind}: unmerging brings the packed weights back bit by bit", partial(exact, kind))
        better(f"{kind}: LoHa works, or is refused when it is added", partial(loha, kind))

    def loftq() -> bool:
        """LoftQ computes on the device of the weight, and starts nearer to the dense weight than the quantised one is."""
        make: Any = LoftQConfig
        config = lora(init_lora_weights="loftq", loftq_config=make(loftq_bits=4))
        wrap: Any = get_peft_model
        one = wrap(dense(), config).get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        wanted, left = dense().model.layers[0].self_attn.q_proj.weight, one.base_layer.weight
        return float((left + one.get_delta_weight("default") - wanted).norm()) < 0.95 * float((left - wanted).norm())

    def dora_in_eval_mode(kind: str) -> bool:
        model = wrapped(kind, use_dora=True).eval()
        return close(logits(model), logits(model), 0.0) and close(logits(model), logits(quantised(kind)), 2e-2)

    for kind in ("nf4", "fp4"):
        better(f"{kind}: merging after the CPU's packing", partial(after_eval, kind))
    for kind in KINDS:
        better(f"{kind}: DoRA in eval mode, before and after the CPU's packing", partial(dora_in_eval_mode, kind))
    better("LoftQ initialises on the CPU", loftq)


if __name__ == "__main__":
    run("accept_bnb", [acts, trains, files, merges, switches, ours_alone])
