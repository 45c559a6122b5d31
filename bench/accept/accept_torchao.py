"""What a torchao base needs of the module `peft` (integrations.md §8): int8 weights, loaded by transformers or made by `quantize_`.

Run `python accept_torchao.py` where torchao 0.18 and a module `peft` are installed; see `_common.py` for what is printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _common import better, check, differ, folder, ids, llama, logits, randomise, run  # first: it sets the environment

# isort: split

import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer

TARGETS = ["q_proj", "v_proj", "down_proj"]

_dense: list[Path] = []


def dense_folder() -> Path:
    """Return the folder with the dense model; made once."""
    if not _dense:
        place = folder()
        llama().save_pretrained(place)
        _dense.append(place)
    return _dense[0]


def loaded() -> Any:
    """Return the model with int8 weights, quantised by transformers while loading, in eval mode."""
    config = TorchAoConfig(Int8WeightOnlyConfig())
    made: Any = AutoModelForCausalLM.from_pretrained(
        dense_folder(), quantization_config=config, dtype=torch.float32, attn_implementation="eager", device_map="cpu"
    )
    return made.eval()


def converted() -> Any:
    """Return the same model, quantised in place by torchao's `quantize_`: transformers knows nothing of it."""
    made: Any = AutoModelForCausalLM.from_pretrained(dense_folder(), dtype=torch.float32, attn_implementation="eager")
    quantize_(made, Int8WeightOnlyConfig())
    return made.eval()


MAKERS = {"TorchAoConfig": loaded, "quantize_": converted}


def lora(**settings: Any) -> LoraConfig:
    """Return a LoRA config of rank 4 on q_proj, v_proj and down_proj, for causal language models."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **settings})


def wrapped(how: str, **settings: Any) -> Any:
    """Return the quantised model with a new LoRA adapter."""
    return get_peft_model(MAKERS[how](), lora(**settings))


def first(model: Any) -> Any:
    """Return the first wrapped query projection."""
    return model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")


def weight_of(layer: nn.Module) -> Tensor:
    """Return the dense weight (out, in) that a quantised layer stands for, in float32."""
    quantised: Any = layer.weight
    weight: Tensor = quantised.dequantize().float()
    return weight


# ---- themes -----------------------------------------------------------------------------------------------------------------------


def acts() -> None:
    for how, make in MAKERS.items():
        plain, model = logits(make()), wrapped(how)
        check(f"{how}: a new adapter changes nothing", torch.equal(logits(model), plain))
        one = first(model)
        base = one.get_base_layer()
        kept = isinstance(one, LoraLayer) and type(base) is nn.Linear and hasattr(base.weight, "dequantize") and base.weight.dtype != torch.int8
        check(f"{how}: a LoRA layer around a Linear with a quantised weight", kept and type(base.weight).__name__ == "Int8Tensor", type(base.weight))
        sizes, dtypes = (one.in_features, one.out_features), {value.dtype for name, value in model.named_parameters() if ".lora_" in name}
        check(f"{how}: dense sizes and float32 adapters", sizes == (32, 32) and dtypes == {torch.float32}, (sizes, dtypes))
        randomise(model)
        acting = logits(model)
        with model.disable_adapter():
            off = logits(model)
        check(f"{how}: the adapter acts, and is disabled", differ(acting, plain) and torch.equal(off, plain))


def trains() -> None:
    tokens: Any = [{"input_ids": row, "labels": row} for row in ids(8, 8).tolist()]
    prepare: Any = prepare_model_for_kbit_training
    model: Any = get_peft_model(prepare(loaded()), lora())
    before = weight_of(first(model).get_base_layer())
    args = TrainingArguments(
        output_dir=str(folder()), max_steps=6, per_device_train_batch_size=4, learning_rate=0.02, logging_steps=1, report_to="none", seed=1,
        save_strategy="no", use_cpu=True, gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=tokens)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    check("Trainer with checkpointing lowers the loss", losses[-1] < losses[0], losses)
    check("training leaves the quantised weights as they were", torch.equal(weight_of(first(model).get_base_layer()), before))


def files() -> None:
    for how, make in MAKERS.items():
        model, place = wrapped(how), folder()
        randomise(model)
        model.save_pretrained(place)
        again = PeftModel.from_pretrained(make(), place)
        check(f"{how}: a file comes back as it was", torch.equal(logits(again), logits(model)) and differ(logits(again), logits(make())))


def merges() -> None:
    model = wrapped("TorchAoConfig")
    randomise(model)
    plain_class = type(first(model).get_base_layer().weight)
    loose = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    one = first(model)
    before, delta = weight_of(one.get_base_layer()), one.get_delta_weight("default").detach().float()
    model.merge_adapter(safe_merge=True)
    wanted = before + delta
    step = float(wanted.abs().max()) / 127
    moved = float((weight_of(one.get_base_layer()) - wanted).abs().max())
    check("merged weights are W+Δ to the accuracy of int8", moved <= step, (moved, step))
    check("merging quantises again", type(one.get_base_layer().weight) is plain_class)
    near = float((logits(model) - loose).norm() / loose.norm())
    check("merged logits are near the loose ones", near < 0.05 and differ(logits(model), plain), near)
    model.unmerge_adapter()
    back = float((weight_of(one.get_base_layer()) - before).abs().max())
    check("unmerged weights are W to the accuracy of int8", back <= 2 * step, back)
    final = model.merge_and_unload()
    query = final.model.layers[0].self_attn.q_proj
    kept = type(query) is nn.Linear and type(query.weight) is plain_class
    check("merge_and_unload leaves a quantised Linear", kept and differ(logits(final), plain))


def ours_alone() -> None:
    def bare() -> bool:
        """After `quantize_` alone: merging works, or the error says what to do."""
        model = wrapped("quantize_")
        randomise(model)
        loose = logits(model)
        try:
            model.merge_adapter()
        except ValueError as error:
            return "TorchAoConfig" in str(error)
        return float((logits(model) - loose).norm() / loose.norm()) < 0.05

    def not_finite() -> bool:
        model = wrapped("TorchAoConfig")
        randomise(model)
        next(value for name, value in model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
        try:
            model.merge_adapter(safe_merge=True)
        except ValueError:
            return True
        return False

    better("safe_merge refuses weights that are not finite", not_finite)
    better("merging after quantize_ works or names TorchAoConfig", bare)
    better("the status names the backend", lambda: all(status.quantization_backend for status in wrapped("TorchAoConfig").get_layer_status()))


if __name__ == "__main__":
    run("accept_torchao", [acts, trains, files, merges, ours_alone])
