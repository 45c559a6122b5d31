"""Find every tuner, train one step, save and load, with installed packages only.

`nox -s wheels` runs it in a bare environment, away from the checkout.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import peft_core

EXTRAS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "LOHA": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5]},
}


def check(holds: object, message: str) -> None:  # not `assert`, which python -O drops
    if not holds:
        raise SystemExit(f"wheel_smoke: {message}")


def check_light() -> None:
    found = {tuner.peft_type for tuner in peft_core.list_tuners()}
    check(set(EXTRAS) <= found, f"not found through entry points: {sorted(set(EXTRAS) - found)}")
    heavy = sorted({"torch", "transformers"} & set(sys.modules))
    check(not heavy, f"importing peft_core and listing tuners loaded {heavy}")
    print(f"found {', '.join(sorted(found))}; {peft_core.__file__}")


def check_tuner(peft_type: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def base() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
            )
        ).eval()

    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        plain = base()(input_ids=ids).logits

    config = peft_core.get_peft_config({"peft_type": peft_type, "task_type": "CAUSAL_LM", **EXTRAS[peft_type]})
    model = peft_core.get_peft_model(base(), config)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check(trainable, f"{peft_type}: nothing is trainable")
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, p in trainable.items():
        check(p.grad is not None and bool(p.grad.isfinite().all()), f"{peft_type}: no finite gradient in {name}")
    optimizer.step()
    model.eval()

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        trained = model(input_ids=ids).logits
        check(not torch.equal(trained, plain), f"{peft_type}: the trained adapter has no effect")
        model.save_pretrained(folder)
        loaded = peft_core.PeftModel.from_pretrained(base(), folder).eval()
        check(torch.equal(loaded(input_ids=ids).logits, trained), f"{peft_type}: reloaded logits differ")
    count = sum(p.numel() for p in trainable.values())
    print(f"{peft_type}: trained {count} parameters one step, saved, reloaded; logits bit-equal")


if __name__ == "__main__":
    check_light()
    for peft_type in EXTRAS:
        check_tuner(peft_type)
