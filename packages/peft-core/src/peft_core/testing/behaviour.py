"""Checks of an adapter's outputs and of its files."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial

import torch

from .. import (
    AdapterWeightsError,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from ..tensor_names import WRAPPER_PREFIX, file_key, has_part
from .base import SuiteBase
from .helpers import parameters_of, quiet, raises, trainability


class BehaviourChecks(SuiteBase):
    """Checks of an adapter's outputs and of its files."""

    # ---- config and files ------------------------------------------------------------------------------------------
    def test_config_survives_json(self, name: str) -> None:
        """A config stores every field that it is given, and is equal after it was written to `adapter_config.json` and read again.

        Protects from an adapter that is loaded with settings other than those with which it was trained.
        """
        config = self.config(name)
        _same_fields(config, self.config_from_keywords(name), "made of a dict, not with keywords")
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            reloaded = PeftConfig.from_pretrained(folder)
        assert type(reloaded) is type(config), f"read back as {type(reloaded).__name__}"
        assert reloaded.to_json() == config.to_json(), "the config changes when it is written and read"
        _same_fields(reloaded, config, "written and read")

    def test_save_and_load(self, name: str) -> None:
        """A saved adapter that is loaded on a fresh base model gives bitwise equal outputs; no parameter stays on the meta device or is trainable.

        Protects from trained weights that are lost or changed by saving and loading.
        """
        model = self.model(name)
        expected = self.output(model, name)
        with tempfile.TemporaryDirectory() as folder, quiet():
            model.save_pretrained(folder)
            for low_cpu in (False, True):
                loaded = PeftModel.from_pretrained(self.base(name), folder, low_cpu_mem_usage=low_cpu)
                stuck = [key for key, parameter in loaded.named_parameters() if parameter.is_meta]
                assert not stuck, f"still on the meta device: {stuck[:3]}"
                found = self.output(loaded, name)
                assert torch.equal(found, expected), f"a loaded adapter computes something else (by {float((found - expected).abs().max()):.2e})"
                trains = [key for key, parameter in loaded.named_parameters() if parameter.requires_grad]
                assert not trains, f"loaded for inference, but {trains[:3]} train"

    def test_files_hold_everything_and_no_names(self, name: str) -> None:
        """The tensors of a file determine the adapter's outputs, and their keys do not contain the adapter's name.

        Protects from incomplete files, and from files that can only be loaded under the adapter name with which they were saved.
        """
        first, second = self.model(name, "zebra", seed=1), self.model(name, "zebra", seed=7)
        with quiet():
            state = get_peft_model_state_dict(first, adapter_name="zebra")
        assert state, "the file is empty"
        named = [key for key in state if has_part(key, "zebra")]
        assert not named, f"file keys contain the adapter's name: {named[:3]}"
        set_peft_model_state_dict(second, {key: value.clone() for key, value in state.items()}, "zebra", strict=True)
        assert torch.equal(self.output(second, name), self.output(first, name)), "the file does not determine what the adapter computes"

    def test_strict_keys(self, name: str) -> None:
        """With `strict=True`, missing tensors, unexpected tensors and tensors of a wrong shape raise an error, and the adapter does not change.

        Protects from a file that does not fit the adapter and is partly loaded without an error.
        """
        model = self.model(name)
        before = self.output(model, name)
        with quiet():
            state = {key: value + 1 for key, value in get_peft_model_state_dict(model).items()}
        first = next(iter(state))
        wrong = {
            "missing": {key: value for key, value in state.items() if key != first},
            "surplus": {**state, file_key(WRAPPER_PREFIX, "nowhere", "weight"): torch.zeros(1)},
            "misshapen": {**state, first: torch.zeros(*state[first].shape, 2)},
        }
        for fault, tensors in wrong.items():
            raises(AdapterWeightsError, partial(set_peft_model_state_dict, model, tensors, strict=True), f"a {fault} tensor")
            assert torch.equal(self.output(model, name), before), f"the adapter changed although a {fault} tensor was refused"

    # ---- what the adapter computes ---------------------------------------------------------------------------------
    def test_identity_at_start(self, name: str) -> None:
        """A new adapter does not change the outputs; if the suite says that it may (`neutral_start`), the outputs are finite.

        Protects from training that starts with a damaged model.
        """
        expected = self.output(self.base(name), name)
        found = self.output(self.model(name, random=False), name)
        if self.starts_neutral:
            self.close(found, expected, "a new adapter changes the outputs")
        else:
            assert torch.isfinite(found).all(), "a new adapter gives infinite outputs"

    def test_has_an_effect(self, name: str) -> None:
        """An adapter with random weights changes the outputs, and so does a change of each single parameter of the adapter.

        Protects from parameters that cost memory and training time but have no effect.
        """
        model = self.model(name)
        base = self.output(self.base(name), name)
        found = self.output(model, name)
        assert found.shape != base.shape or not torch.equal(found, base), "the adapter has no effect"
        for key, parameter in parameters_of(model, "default").items():
            before = parameter.detach().clone()
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).to(parameter.dtype))
            assert not torch.equal(self.output(model, name), found), f"the parameter {key} has no effect"
            with torch.no_grad():
                parameter.copy_(before)

    def test_disable(self, name: str) -> None:
        """With the adapter disabled, the outputs are bitwise equal to the base model's; afterwards outputs and `requires_grad` are as before.

        Protects from a reference model (for DPO or evaluation) that differs from the base model, and from parameters frozen by an evaluation.
        """
        model = self.model(name)
        before, flags = self.output(model, name), trainability(model)
        with model.disable_adapter():
            assert torch.equal(self.output(model, name), self.output(self.base(name), name)), "disabled, the model differs from the base"
        assert torch.equal(self.output(model, name), before), "after disabling the adapter computes something else"
        assert trainability(model) == flags, "disabling changed what trains"

    def test_two_adapters(self, name: str) -> None:
        """Two adapters on one model do not affect each other; the active adapter is trainable, the other one is frozen.

        Protects from using or training the wrong adapter.
        """
        model = self.model(name, "one", "two")
        alone = {adapter: self.output(self.model(name, "x", seed=seed, second=adapter == "two"), name) for adapter, seed in (("one", 1), ("two", 2))}
        for adapter, other in (("two", "one"), ("one", "two")):
            model.set_adapter(adapter)
            self.close(self.output(model, name), alone[adapter], f"{adapter!r} computes something else beside {other!r}")
            assert all(p.requires_grad for p in parameters_of(model, adapter).values()), f"{adapter!r} is in use but does not train"
            assert not any(p.requires_grad for p in parameters_of(model, other).values()), f"{other!r} is not in use but trains"

    def test_delete(self, name: str) -> None:
        """Deleting an adapter removes its parameters and does not change other adapters; after the last, the outputs are the base model's.

        Protects from memory that is never freed, and from adapters that change when another adapter is deleted.
        """
        model = self.model(name, "one", "two")
        expected = self.output(model, name)
        count = sum(p.numel() for p in self.model(name, "one").parameters())
        model.delete_adapter("two")
        assert torch.equal(self.output(model, name), expected), "deleting an unused adapter changed the outputs"
        left = [key for key, _ in model.named_parameters() if has_part(key, "two")]
        assert not left, f"parameters of a deleted adapter remain: {left[:3]}"
        assert sum(p.numel() for p in model.parameters()) == count, "a deleted adapter left parameters behind"
        model.delete_adapter("one")
        assert torch.equal(self.output(model, name), self.output(self.base(name), name)), "without adapters the model differs from the base"

    def test_unload(self, name: str) -> None:
        """`unload` returns the original base model: the same object, with the same modules and the same outputs.

        Protects from a base model that stays wrapped or changed after the adapter is removed.
        """
        base = self.base(name)
        modules = {key: id(module) for key, module in base.named_modules()}
        model = self.model(name, base=base)
        restored = model.unload(restore_base=True)
        assert restored is base, "unload returned another object"
        if not model.task.heads:  # a saved head replaces the original
            assert {key: id(module) for key, module in base.named_modules()} == modules, "unload left other modules behind"
            assert torch.equal(self.output(base, name), self.output(self.base(name), name)), "after unload the base computes something else"


def _same_fields(found: PeftConfig, expected: PeftConfig, what: str) -> None:
    names = [field.name for field in dataclasses.fields(expected) if field.compare]
    differ = [f"{name}={getattr(found, name)!r}" for name in names if getattr(found, name) != getattr(expected, name)]
    assert not differ, f"{what}, the config says {', '.join(differ)}"
