"""§5: `PeftMixedModel`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import support
from page.making import (
    CONFIGS,
    IDS,
    LAYERS,
    PROMPTS,
    SORTS,
    TASK_IDS,
    config,
    fresh,
    get_peft_model,
    made,
    mixed,
    over,
    parameters_of,
    refused,
    run,
    same,
    tiny,
    trains,
)
from peft_core import PeftMixedModel, get_layer_status, get_model_status

DENSE = {"peft_type": "DENSE", "target_modules": ["o_proj"], "start": "random"}


def _set(model: PeftMixedModel, *names: str) -> PeftMixedModel:
    model.set_adapter(list(names))
    return model


def it_is_made_by_get_peft_model() -> None:
    base = tiny()
    model = get_peft_model(base, config("lora"), "a", mixed=True)
    assert type(model) is PeftMixedModel
    assert model.get_base_model() is base
    assert model.active_adapters == ["a"]


@over(*LAYERS, *PROMPTS)
def any_type_can_take_part(kind: str) -> None:
    other = "lora" if kind == "loha" else "loha"
    model = mixed(other, kind)
    tasks: dict[str, Any] = {"task_ids": TASK_IDS} if kind == "multitask" else {}
    alone = run(_set(model, other), **tasks)
    assert same(run(_set(model, other, kind), **tasks)[:, -6:], alone) is False
    assert same(run(_set(model, kind), **tasks), run(_only(model, kind), **tasks))


def _only(model: PeftMixedModel, kind: str) -> Any:
    single = made(kind)
    with torch.no_grad():
        for ours, theirs in zip(parameters_of(single, "default").values(), parameters_of(model, kind).values(), strict=True):
            ours.copy_(theirs)
    return single


def third_parties_can_take_part() -> None:
    with support.registered(support.DENSE):
        model = mixed("lora")
        before = run(model)
        from peft_core import get_peft_config

        model.add_adapter("dense", get_peft_config(DENSE))
        assert torch.equal(run(model), before)
        assert not same(run(_set(model, "lora", "dense")), before)


@over(*SORTS)
def added_ones_are_not_active(kind: str) -> None:
    model = mixed("lora")
    model.add_adapter("b", config(kind), low_cpu_mem_usage=False)
    assert model.active_adapters == ["lora"]
    assert not trains(model, "b")
    with refused(ValueError, "already exists"):
        model.add_adapter("b", config(kind))


def several_are_active_and_train() -> None:
    model = mixed("lora", "loha", "prompt")
    model.set_adapter(["lora", "prompt"])
    assert model.active_adapters == ["lora", "prompt"]
    assert [trains(model, name) for name in ("lora", "loha", "prompt")] == [True, False, True]
    model.set_adapter("loha")
    assert model.active_adapters == ["loha"]


def unknown_ones_are_refused() -> None:
    model = mixed("lora", "loha")
    for names in ("lor", ["lora", "lor"]):
        with refused(ValueError, "'lor' not found.*'lora', 'loha'"):
            model.set_adapter(names)
    assert model.active_adapters == ["lora"]


def order_is_load_order() -> None:
    model = mixed("prefix", "lora", "loha")
    assert _set(model, "loha", "prefix", "lora").active_adapters == ["loha", "prefix", "lora"]
    found = run(model)
    assert torch.equal(run(_set(model, "lora", "loha", "prefix")), found)


def outputs_add_up() -> None:
    """Both wrap one layer: what it gives is W x plus what each adds."""
    model = mixed("lora", "loha")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 32)
    with torch.no_grad():
        single = {name: _at(_set(model, name), layer, x) for name in ("lora", "loha")}
        with model.disable_adapter():
            base = layer(x)
        assert same(_at(_set(model, "lora", "loha"), layer, x), single["lora"] + single["loha"] - base)


def _at(model: Any, layer: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = layer(x)
    return found


def files_of_single_adapters_are_read(tmp_path: Path) -> None:
    """The page's example."""
    for kind in LAYERS:
        made(kind).save_pretrained(tmp_path / kind)
    model = PeftMixedModel.from_pretrained(tiny(), tmp_path / "lora", "adapter1")
    assert type(model) is PeftMixedModel
    model.load_adapter(tmp_path / "loha", "adapter2", torch_device="cpu", autocast_adapter_dtype=True, low_cpu_mem_usage=True)
    assert model.active_adapters == ["adapter1"]
    assert same(run(model), run(made("lora")))
    model.set_adapter(["adapter1", "adapter2"])
    assert not same(run(model), run(made("lora")))
    model.set_adapter("adapter2")
    assert same(run(model), run(made("loha")))


def reading_takes_the_arguments_of_the_page(tmp_path: Path) -> None:
    made("lora").save_pretrained(tmp_path)
    own = config("lora")
    model = PeftMixedModel.from_pretrained(tiny(), tmp_path, is_trainable=True, config=own, low_cpu_mem_usage=True)
    assert model.peft_config["default"] is own
    assert trains(model, "default")


@over(*SORTS)
def disabled_it_is_the_base(kind: str) -> None:
    model = _set(mixed(kind, "loha" if kind == "lora" else "lora"), *dict.fromkeys([kind, "lora"]))
    before = run(model)
    with model.disable_adapter():
        assert torch.equal(run(model), run(tiny()))
    assert torch.equal(run(model), before)


@torch.no_grad()
def forward_and_generate_delegate() -> None:
    model = _set(mixed("lora", "loha", "prefix"), "lora", "loha", "prefix")
    expected = IDS
    for _ in range(3):
        expected = torch.cat([expected, model(input_ids=expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False), expected)


def numbers_are_counted_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = _set(mixed("lora", "prompt"), "lora", "prompt")
    parameters = list(model.parameters())
    expected = sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
    assert model.get_nb_trainable_parameters() == expected
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {expected[0]:,d} || all params: {expected[1]:,d} || trainable%: {100 * expected[0] / expected[1]:.4f}\n"
    )


def merging_returns_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    model = _set(mixed("lora", "loha"), "lora", "loha")
    before, base = run(model), model.get_base_model()
    found = model.merge_and_unload(progressbar=True, safe_merge=True)
    assert found is base
    assert "it/s" in capsys.readouterr().err
    assert not any("lora" in name or "hada" in name for name, _ in base.named_modules())
    assert same(run(found), before, atol=1e-4)
    one = mixed("lora", "loha")
    alone = run(_set(one, "loha"))
    assert same(run(_set(one, "lora").merge_and_unload(adapter_names=["loha"])), alone, atol=1e-4)


def unloading_returns_the_base() -> None:
    model = _set(mixed("lora", "loha", "prompt"), "lora", "loha")
    base = model.get_base_model()
    assert model.unload() is base
    assert torch.equal(run(base), run(tiny()))


def one_or_several_are_deleted() -> None:
    model = _set(mixed("lora", "loha", "prompt", "prefix"), "prefix")
    model.delete_adapter("lora")
    model.delete_adapter(["loha", "prompt"])
    assert list(model.peft_config) == ["prefix"]
    with refused(ValueError, "not found"):
        model.delete_adapter(["prefix", "nobody"])
    assert list(model.peft_config) == ["prefix"]


def names_and_configs_are_shown() -> None:
    model = mixed("lora", "loha")
    assert model.active_adapter == "lora"
    assert _set(model, "loha", "lora").active_adapter == ["loha", "lora"]
    assert model.active_adapters == ["loha", "lora"]
    assert {name: str(own.peft_type) for name, own in model.peft_config.items()} == {name: CONFIGS[name]["peft_type"] for name in LAYERS}


def stacks_are_saved_and_read(tmp_path: Path) -> None:
    model = _set(mixed("prefix", "loha", "lora"), "lora", "prefix")
    model.save_pretrained(tmp_path)
    found = PeftMixedModel.from_stack(tiny(), tmp_path)
    assert list(found.peft_config) == ["prefix", "loha", "lora"]
    assert found.active_adapters == ["lora", "prefix"]
    assert same(run(found), run(model))
    assert {path.name for path in tmp_path.iterdir()} >= {"README.md", "prefix", "loha", "lora"}


def model_cards_are_written(tmp_path: Path) -> None:
    mixed("lora", "loha").create_or_update_model_card(tmp_path)
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


def status_is_told() -> None:
    model = _set(mixed("lora", "loha", "prompt"), "lora", "prompt")
    status = model.get_model_status()
    assert status == get_model_status(model)
    assert model.get_layer_status() == get_layer_status(model)
    assert status.peft_types == {"lora": "LORA", "loha": "LOHA", "prompt": "PROMPT_TUNING"}
    assert status.active_adapters == ["lora", "prompt"]


def weighted_ones_need_one_method() -> None:
    model = mixed("lora", "loha")
    model.add_adapter("b", config("lora"))
    model.add_weighted_adapter(["lora", "b"], [1.0, 1.0], "sum", combination_type="cat")
    assert "sum" in model.peft_config
    with refused(ValueError):
        model.add_weighted_adapter(["lora", "loha"], [1.0, 1.0], "other", combination_type="cat")
    assert "other" not in model.peft_config


def all_active_ones_train() -> None:
    model = _set(mixed("lora", "loha", "prompt"), "lora", "loha", "prompt").train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name in model.peft_config:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters_of(model, name).values())


def wrapping_again_is_unwound() -> None:
    model = mixed("lora", "loha")
    q = model.get_base_model().model.layers[0].self_attn.q_proj
    assert q.base_layer.base_layer is not None
    assert type(model.unload().model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert fresh("lora").active_adapter == "default"
