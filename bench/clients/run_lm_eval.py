"""lm-eval: `HFLM(pretrained=..., peft=...)`, asked for likelihoods, text and the scores of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _client import adapter, llama, saved, sentences, write

# isort: split

from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from peft import LoraConfig


def numbers(room: Path) -> dict[str, Any]:
    base = saved(llama(), room / "base")
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    folder = adapter(llama(), config, room / "adapter", scale=0.3, base=base)
    found = {}
    for name, peft in (("bare", None), ("adapted", folder)):
        model = HFLM(pretrained=base, peft=peft, device="cpu", dtype="float32", batch_size=2)
        found[name] = {"loglikelihood": likelihoods(model), "text": texts(model), "task": scores(model)}
    return found


def likelihoods(model: HFLM) -> list[list[Any]]:
    requests = [Instance("loglikelihood", {}, (text, " w10 w11"), index) for index, text in enumerate(sentences(6))]
    return [list(answer) for answer in model.loglikelihood(requests, disable_tqdm=True)]


def texts(model: HFLM) -> list[str]:
    until = {"until": ["[EOS]"], "max_gen_toks": 6, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, until), index) for index, text in enumerate(sentences(3))]
    return model.generate_until(requests, disable_tqdm=True)


def scores(model: HFLM) -> dict[str, Any]:
    rows = [{"question": text, "choices": ["w20 w21", "w30", "w40 w41"], "answer": index % 3} for index, text in enumerate(sentences(12))]
    task = ConfigurableTask(
        config={
            "task": "tiny",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
        }
    )
    results = simple_evaluate(model, tasks=[task], bootstrap_iters=0)
    return {name: value for name, value in results["results"]["tiny"].items() if isinstance(value, float)}


if __name__ == "__main__":
    write(numbers)
