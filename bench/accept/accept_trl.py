"""What trl needs of the module `peft` (integrations.md §5): SFT, DPO with and without a "ref" adapter, KTO, reward, GRPO, weights for vLLM.

Run `python accept_trl.py` where trl 1.16 and a module `peft` are installed; see `_common.py` for what is printed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _common import (  # first: it sets the environment
    VOCAB,
    better,
    check,
    close,
    differ,
    folder,
    ids,
    llama,
    logits,
    raises,
    randomise,
    run,
    same,
    tokenizer,
)

# isort: split

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers.trainer_callback import PrinterCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    ModelConfig,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
    get_peft_config,
)
from trl.trainer.utils import use_adapter

from peft import (
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

TARGETS = ["q_proj", "v_proj"]
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


# ---- data and arguments -----------------------------------------------------------------------------------------------------------


def lora(**settings: Any) -> LoraConfig:
    """Return a LoRA config of rank 4 on q_proj and v_proj, for causal language models."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **settings})


def words(seed: int, count: int) -> str:
    """Return a sentence of `count` words of the vocabulary."""
    return " ".join(f"w{token}" for token in ids(1, count, seed).clamp(min=4)[0].tolist())


def arguments(kind: Any, steps: int = 4, **settings: Any) -> Any:
    """Return training arguments of the class `kind`: CPU, float32, a large learning rate, nothing reported or saved."""
    common = {
        "output_dir": str(folder()), "max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 0.05, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "seed": 1, "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return kind(**{**common, **settings})


def history(trainer: Any, key: str = "loss") -> list[float]:
    """Return what the trainer logged under `key`, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def train(trainer: Any) -> None:
    """Train without a print per step."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def trained(trainer: Any, least: float = 0.98) -> bool:
    """Train; whether the last loss is below `least` times the first."""
    train(trainer)
    losses = history(trainer)
    return losses[-1] < least * losses[0]


def frozen(model: Any) -> dict[str, Tensor]:
    """Return copies of the parameters that do not train, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}


def unmoved(model: Any, before: Mapping[str, Tensor]) -> bool:
    """Whether these parameters of the model are what they were."""
    now = dict(model.named_parameters())
    return bool(before) and all(torch.equal(now[name], value) for name, value in before.items())


def texts(rows: int = 8) -> Dataset:
    """Return rows of one repeated sentence, which is quick to learn."""
    return Dataset.from_list([{"text": words(1, 8)}] * rows)


def preferences(rows: int = 8) -> Dataset:
    """Return rows of a prompt, a chosen and a rejected answer."""
    return Dataset.from_list([{"prompt": words(row, 4), "chosen": " " + words(50, 4), "rejected": " " + words(60, 4)} for row in range(rows)])


def processor() -> Any:
    """Return the word-level tokenizer with a chat template."""
    made = tokenizer()
    made.chat_template = CHAT
    return made


# ---- themes -----------------------------------------------------------------------------------------------------------------------


def sft(model: Any, config: Any = None, **settings: Any) -> Any:
    """Return an SFT trainer of this model (gradient checkpointing is trl's default) with a `peft_config`."""
    return SFTTrainer(model=model, args=arguments(SFTConfig, **settings), train_dataset=texts(), processing_class=processor(), peft_config=config)


def supervised() -> None:
    trainer = sft(llama(), lora())
    check("SFT wraps the model", isinstance(trainer.model, PeftModel) and trainer.args.gradient_checkpointing)
    before = frozen(trainer.model)
    check("SFT with LoRA lowers the loss", trained(trainer), history(trainer))
    check("SFT leaves the base as it was", unmoved(trainer.model, before))
    trainer.save_model()
    place = trainer.args.output_dir
    again = PeftModel.from_pretrained(llama(), place)
    check("SFT saves an adapter", close(logits(again), logits(trainer.model)) and differ(logits(again), logits(llama())))
    card = Path(place, "README.md").read_text(encoding="utf-8")
    check("the model card names the library", "library_name: peft" in card, card[:300])
    trainer.create_model_card(model_name="tiny")
    check("trl writes its own card over it", "trl" in Path(place, "README.md").read_text(encoding="utf-8"))

    given = get_peft_model(llama(), lora())
    check("SFT takes a PeftModel", trained(sft(given)))
    raises("a PeftModel and a peft_config are too much", ValueError, lambda: sft(given, lora()), "PeftModel")
    raises("a peft_config is a PeftConfig", TypeError, lambda: sft(llama(), {"r": 4}), "PeftConfig")
    raises("LoRA on lm_head is refused by trl", ValueError, lambda: sft(llama(), lora(target_modules=["q_proj", "lm_head"])), "lm_head")
    check("SFT with LoHa lowers the loss", trained(sft(llama(), LoHaConfig(r=4, alpha=4, target_modules=TARGETS, task_type="CAUSAL_LM"))))
    prompted = sft(llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), learning_rate=1.0)
    check("SFT with prompt tuning lowers the loss", trained(prompted), history(prompted))
    prefixed = sft(llama(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), learning_rate=1.0, gradient_checkpointing=False)
    check("SFT with prefix tuning lowers the loss", trained(prefixed), history(prefixed))
    packed = sft(llama(), lora(), packing=True, max_length=16, packing_strategy="wrapped")
    check("SFT with packing lowers the loss", trained(packed), history(packed))


def saved_head() -> None:
    trainer = sft(llama(), lora(modules_to_save=["lm_head"]))
    head = trainer.model.get_output_embeddings()
    check("the head is a ModulesToSaveWrapper", isinstance(head, ModulesToSaveWrapper))
    active = head.modules_to_save["default"].weight
    check("a saved head shows the weight of its active copy", head.weight is active and active.requires_grad and head.bias is None)
    copy, original = active.detach().clone(), head.original_module.weight.detach().clone()
    check("SFT with a saved head lowers the loss", trained(trainer))
    check("the copy of the head trains, the original does not", differ(active, copy) and torch.equal(head.original_module.weight, original))


def new_tokens() -> None:
    source = processor()
    source.add_tokens(["<new>"])
    source.save_pretrained(place := folder())
    config = lora()
    trainer = sft(llama(), config, chat_template_path=str(place))
    added = list(range(VOCAB, 2 * VOCAB))  # trl fills up to a multiple of 64
    rows = config.trainable_token_indices
    check("trl's new tokens reach the config before wrapping", rows == {"embed_tokens": added}, rows)
    check("trl's saved head reaches the config before wrapping", config.modules_to_save == ["lm_head"], config.modules_to_save)
    named = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    parts = ("trainable_tokens_delta", "lm_head.modules_to_save", "lora_")
    check("token rows, head and LoRA train", all(any(part in name for name in named) for part in parts), named)
    check("SFT with new tokens lowers the loss", trained(trainer))
    held = lora(trainable_token_indices={"embed_tokens": [5]}, modules_to_save=["lm_head"])
    sft(llama(), held, chat_template_path=str(place))
    rows = held.trainable_token_indices
    check("trl extends the list of token rows", rows == {"embed_tokens": [5, *added]}, rows)


def dpo(model: Any, config: Any = None, **settings: Any) -> Any:
    """Return a DPO trainer of this model without a reference model."""
    args = arguments(DPOConfig, **settings)
    return DPOTrainer(model=model, args=args, train_dataset=preferences(), processing_class=processor(), peft_config=config)


def preference() -> None:
    trainer = dpo(llama(), lora())
    before = frozen(trainer.model)
    lowered = trained(trainer)
    check("DPO's reference is the base: the first loss is ln 2", abs(history(trainer)[0] - math.log(2)) < 1e-4, history(trainer))
    check("DPO lowers the loss and leaves the base", lowered and unmoved(trainer.model, before), history(trainer))
    with torch.no_grad(), use_adapter(trainer.model, None):
        plain = logits(trainer.model)
    check("trl's use_adapter(None) shows the base", close(plain, logits(llama()), 1e-6) and differ(logits(trainer.model), plain))
    made = [get_peft_model(llama(), kind) for kind in (lora(), lora(modules_to_save=["lm_head"]))]
    for what, model in zip(("LoRA", "LoRA and a saved head"), made, strict=True):
        randomise(model)
        config, first = model.peft_config["default"], logits(model)
        trainer = dpo(model)
        parameters = dict(model.named_parameters())
        own = {name: value for name, value in parameters.items() if ".default." in name}
        copied = all(torch.equal(value, parameters[name.replace(".default.", ".ref.")]) for name, value in own.items())
        check(f"{what}: trl copies the adapter to ref", own and copied and set(model.peft_config) == {"default", "ref"})
        check(f"{what}: one config object serves two names", model.peft_config["ref"] is config or model.peft_config["ref"] == config)
        reference = [value for name, value in parameters.items() if ".ref." in name]
        still = model.active_adapter == "default" and all(value.requires_grad for value in own.values())
        check(f"{what}: default stays active and trains", still and not any(value.requires_grad for value in reference))
        check(f"{what}: DPO against the copy lowers the loss", trained(trainer) and abs(history(trainer)[0] - math.log(2)) < 1e-4, history(trainer))
        optimised = {id(value) for group in trainer.optimizer.param_groups for value in group["params"]}
        check(f"{what}: the optimizer holds default's parameters alone", optimised == {id(value) for value in own.values()})
        after = dict(model.named_parameters())
        back = all(after[name] is value and value.requires_grad for name, value in own.items()) and model.active_adapter == "default"
        check(f"{what}: after each look at ref, default trains again", back and not any(value.requires_grad for value in reference))
        with use_adapter(model, "ref"):
            check(f"{what}: ref is what default was", close(logits(model), first, 1e-6))


def kto_and_reward() -> None:
    rows = [{"prompt": words(row, 4), "completion": " " + words(50 + row % 2, 4), "label": row % 2 == 0} for row in range(8)]
    args = arguments(KTOConfig, learning_rate=0.05)
    trainer = KTOTrainer(model=llama(), args=args, train_dataset=Dataset.from_list(rows), processing_class=processor(), peft_config=lora())
    train(trainer)
    kl, losses = history(trainer, "kl"), history(trainer)
    check("KTO starts at KL 0", abs(kl[0]) < 1e-4, kl)
    check("KTO lowers the loss", losses[-1] < losses[0], losses)
    given = get_peft_model(llama(), lora())
    randomise(given)
    trainer = KTOTrainer(model=given, args=args, train_dataset=Dataset.from_list(rows), processing_class=processor())
    train(trainer)
    kl = history(trainer, "kl")
    check("KTO with a PeftModel starts at KL 0 against ref", set(given.peft_config) == {"default", "ref"} and abs(kl[0]) < 1e-4, kl)
    config = lora(task_type="SEQ_CLS", modules_to_save=["score"])
    model = llama(cls="LlamaForSequenceClassification", num_labels=1)
    pairs = Dataset.from_list([{"chosen": words(1, 6), "rejected": words(2, 6)} for _ in range(8)])
    trainer = RewardTrainer(model=model, args=arguments(RewardConfig), train_dataset=pairs, processing_class=processor(), peft_config=config)
    check("reward training lowers the loss", trained(trainer), history(trainer))
    trainer.save_model()
    written = load_file(f"{trainer.args.output_dir}/adapter_model.safetensors")
    check("reward saves the head", any(key.endswith("score.weight") for key in written), list(written))


def with_rewards() -> None:
    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    prompts = Dataset.from_list([{"prompt": words(row, 4)} for row in range(8)])
    shape: dict[str, Any] = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "steps": 2, "learning_rate": 0.05}
    for kind, settings in ((GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)):
        for what, model, config in (("a peft_config", llama(), lora()), ("a PeftModel", get_peft_model(llama(), lora()), None)):
            name, args = f"{kind.__name__} with {what}", arguments(settings, **shape)
            make: Any = kind
            trainer = make(model=model, reward_funcs=length, args=args, train_dataset=prompts, processing_class=processor(), peft_config=config)
            before = {key: value.clone() for key, value in get_peft_model_state_dict(trainer.model).items()}
            train(trainer)
            moved = any(differ(value, before[key], 1e-6) for key, value in get_peft_model_state_dict(trainer.model).items())
            kl = history(trainer, "kl")
            check(f"{name} starts at KL 0 and trains", moved and abs(kl[0]) < 1e-5, kl)
            check(f"{name} has its reference", ("ref" in trainer.model.peft_config) == (config is None))


def weights_for_a_server() -> None:
    """What trl sends to vLLM: merged weights under the names of the plain model; `prefix` tells the adapters' parameters."""
    model: Any = get_peft_model(llama(), lora(modules_to_save=["lm_head"]))
    randomise(model)
    before, loose = {name: value.clone() for name, value in model.named_parameters()}, logits(model)
    check("the wrapper forwards prefix", model.prefix == "lora_")
    model.merge_adapter()
    sent = {}
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix not in plain and "original_module" not in plain:
            sent[plain.replace("modules_to_save.default.", "")] = parameter.data.clone()
    model.unmerge_adapter()
    check("the names are those of the plain model", set(sent) == {name for name, _ in llama().named_parameters()})
    target = llama()
    target.load_state_dict(sent)
    check("the plain model with these weights is the adapted one", close(logits(target), loose))
    check("unmerging brings the weights back", all(close(value, before[name], 1e-6) for name, value in model.named_parameters()))
    alone = get_peft_model(llama(), lora())
    served = [alone.peft_config[name] for name in alone.active_adapters]
    check("an adapter to serve: one, active, LoRA", len(served) == 1 and isinstance(served[0], LoraConfig))


def teacher() -> None:
    """SDFT and SDPO: a moving average of the student's weights under another name."""
    model = get_peft_model(llama(), lora())
    model.add_adapter("teacher", lora())
    randomise(model, "default")
    student = get_peft_model_state_dict(model)
    averaged = {name: value.detach().clone() for name, value in student.items()}
    set_peft_model_state_dict(model, averaged, adapter_name="teacher")
    taught = get_peft_model_state_dict(model, adapter_name="teacher")
    check("a state dict goes from one adapter to another", same(taught, student))
    learned = logits(model)
    model.set_adapter("teacher")
    check("the teacher says what the student says", torch.equal(logits(model), learned))


def command_line() -> None:
    config = get_peft_config(ModelConfig(use_peft=True, lora_r=3, lora_alpha=6, lora_target_modules=["all-linear"], use_rslora=True))
    model = get_peft_model(llama(), config)
    wrapped = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    check("trl's activation offloading sees a PeftModel", hasattr(model, "base_model") and hasattr(model, "peft_config"))
    half = get_peft_model(llama().to(torch.bfloat16), lora(), autocast_adapter_dtype=False)
    dtypes = {value.dtype for name, value in half.named_parameters() if ".lora_" in name}
    check("autocast_adapter_dtype=False keeps the base's dtype", dtypes == {torch.bfloat16}, dtypes)
    check("trl's command line gives a config for all linear layers", wrapped == linear and config.use_rslora and config.r == 3, wrapped)


def ours_alone() -> None:
    def advice() -> bool:
        try:
            sft(llama(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).train()
        except ValueError as error:
            return "checkpointing" in str(error)
        return True  # it works: as good

    better("prefix tuning under checkpointing works or says what to do", advice)


if __name__ == "__main__":
    themes = [supervised, saved_head, new_tokens, preference, kto_and_reward, with_rewards, weights_for_a_server, teacher, command_line, ours_alone]
    run("accept_trl", themes)
