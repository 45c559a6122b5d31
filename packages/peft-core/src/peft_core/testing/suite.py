"""The conformance suite: each check names one behaviour that users rely on, and each capability is tested both ways."""

from __future__ import annotations

import copy
import pickle
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import (
    AdapterLayer,
    AdapterWeightsError,
    Capability,
    CapabilityError,
    PeftConfig,
    PeftModel,
    TunerSpec,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    get_tuner_spec,
    set_peft_model_state_dict,
)
from ..tuners.index import ATTRIBUTE, AdapterIndex
from .helpers import (
    anatomy,
    in_one_precision,
    layers_of,
    method_parameters,
    parameters_of,
    quiet,
    raises,
    randomise,
    tensor_of,
    trainability,
)
from .models import VOCABULARY, tiny


class TunerSuite:
    """Subclass it in a test file, name the tuner and a few configs; pytest collects the checks.

    Attributes:
        peft_type: the tuner; it must be installed or registered.
        configs: name → fields of its config. The extra key ``"base"`` chooses a model of `BASES`, default ``"llama"``.
        expected_failures: check → reason. Strict: a listed check that passes is a failure, so that the list can only shrink.
        neutral_start: a new adapter leaves the outputs as they are.
        tolerance: how far equal computations may be apart in float32, relative to the largest output.
    """

    peft_type: ClassVar[str] = ""
    configs: ClassVar[dict[str, dict[str, Any]]] = {}
    expected_failures: ClassVar[dict[str, str]] = {}
    neutral_start: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    # ---- plumbing --------------------------------------------------------------------------------------------------
    @classmethod
    def checks(cls) -> list[str]:
        """Return the names of all checks, in the order of this file."""
        return [name for name in dict.fromkeys([*vars(TunerSuite), *vars(cls)]) if name.startswith("test_")]

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Let pytest run each check on each config, expected failures strict."""
        if "name" not in metafunc.fixturenames:
            return
        import pytest

        reason = self.expected_failures.get(metafunc.function.__name__)
        marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
        metafunc.parametrize("name", [pytest.param(name, marks=marks) for name in self.configs])

    @property
    def spec(self) -> TunerSpec:
        """What the tuner declares."""
        return get_tuner_spec(self.peft_type)

    def base(self, name: str) -> nn.Module:
        """Return a fresh base model for a config, in eval mode; override for models of your own."""
        return tiny(self.configs[name].get("base", "llama"))

    def config(self, name: str, **changes: Any) -> PeftConfig:
        """Return the config called `name`, with changes."""
        fields = {key: copy.deepcopy(value) for key, value in self.configs[name].items() if key != "base"}
        task = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert-seq-cls": "SEQ_CLS"}.get(self.configs[name].get("base", "llama"))
        return get_peft_config({"peft_type": self.peft_type, "task_type": task, **fields, **changes})

    def model(self, name: str, *adapters: str, seed: int = 1, random: bool = True, base: nn.Module | None = None) -> PeftModel:
        """Return a model in eval mode with adapters (default one called ``default``), their weights random so that they have an effect."""
        names = adapters or ("default",)
        with quiet():
            wrapped = get_peft_model(self.base(name) if base is None else base, self.config(name), names[0])
            for other in names[1:]:
                wrapped.add_adapter(other, self.config(name))
        if random:
            for offset, adapter in enumerate(names):
                randomise(wrapped, adapter, seed + offset)
        return wrapped.eval()

    def inputs(self, name: str, rows: int = 3) -> dict[str, Tensor]:
        """Return inputs of the base, the same each time; override for models of your own."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, VOCABULARY, (rows, 6), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def output(self, model: nn.Module, name: str, rows: int = 3, **kwargs: Any) -> Tensor:
        """Return what the model computes, as one tensor (rows, …)."""
        with torch.no_grad():
            return tensor_of(model(**self.inputs(name, rows), **kwargs)).clone()

    def loss(self, model: nn.Module, name: str) -> Tensor:
        """Return a scalar that depends on every output."""
        output = tensor_of(model(**self.inputs(name)))
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        total: Tensor = (output * weights).sum() / output.numel() ** 0.5
        return total

    def close(self, found: Tensor, expected: Tensor, what: str, factor: float = 1.0) -> None:
        """Fail unless two outputs agree within the tolerance."""
        assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        scale = float(expected.abs().max().clamp(min=1e-3))
        error = float((found - expected).abs().max())
        assert error <= self.tolerance * factor * scale, f"{what}: off by {error:.2e}, the largest output is {scale:.2e}"

    # ---- config and files ------------------------------------------------------------------------------------------
    def test_config_survives_json(self, name: str) -> None:
        """A config written to `adapter_config.json` and read again says the same."""
        config = self.config(name)
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            again = PeftConfig.from_pretrained(folder)
        assert type(again) is type(config), f"read back as {type(again).__name__}"
        assert again.to_json() == config.to_json(), "the config changes when it is written and read"

    def test_save_and_load(self, name: str) -> None:
        """A saved adapter gives bit-equal outputs on a fresh base; nothing stays on the meta device."""
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
        """The tensors of a file determine the adapter, and their names do not contain the adapter's."""
        first, second = self.model(name, "zebra", seed=1), self.model(name, "zebra", seed=7)
        with quiet():
            state = get_peft_model_state_dict(first, adapter_name="zebra")
        assert state, "the file is empty"
        named = [key for key in state if "zebra" in key]
        assert not named, f"file keys contain the adapter's name: {named[:3]}"
        set_peft_model_state_dict(second, {key: value.clone() for key, value in state.items()}, "zebra", strict=True)
        assert torch.equal(self.output(second, name), self.output(first, name)), "the file does not determine what the adapter computes"

    def test_strict_keys(self, name: str) -> None:
        """Missing, surplus and misshapen tensors are errors that change nothing."""
        model = self.model(name)
        before = self.output(model, name)
        with quiet():
            state = {key: value + 1 for key, value in get_peft_model_state_dict(model).items()}
        first = next(iter(state))
        wrong = {
            "missing": {key: value for key, value in state.items() if key != first},
            "surplus": {**state, "base_model.model.nowhere.weight": torch.zeros(1)},
            "misshapen": {**state, first: torch.zeros(*state[first].shape, 2)},
        }
        for fault, tensors in wrong.items():
            raises(AdapterWeightsError, partial(set_peft_model_state_dict, model, tensors, strict=True), f"a {fault} tensor")
            assert torch.equal(self.output(model, name), before), f"the adapter changed although a {fault} tensor was refused"

    # ---- what the adapter computes ---------------------------------------------------------------------------------
    def test_identity_at_start(self, name: str) -> None:
        """A new adapter leaves the outputs as they are (unless the suite says otherwise)."""
        expected = self.output(self.base(name), name)
        found = self.output(self.model(name, random=False), name)
        if self.neutral_start:
            self.close(found, expected, "a new adapter changes the outputs")
        else:
            assert torch.isfinite(found).all(), "a new adapter gives infinite outputs"

    def test_has_an_effect(self, name: str) -> None:
        """Weights that are not zero change the outputs, and none of the adapter's parameters is without effect."""
        model = self.model(name)
        base = self.output(self.base(name), name)
        found = self.output(model, name)
        assert found.shape != base.shape or not torch.equal(found, base), "the adapter has no effect"
        for key, parameter in parameters_of(model, "default").items():
            kept = parameter.detach().clone()
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).to(parameter.dtype))
            assert not torch.equal(self.output(model, name), found), f"the parameter {key} has no effect"
            with torch.no_grad():
                parameter.copy_(kept)

    def test_disable(self, name: str) -> None:
        """Disabled, the model computes bit for bit what the base computes; afterwards it is as before, trainability included."""
        model = self.model(name)
        before, flags = self.output(model, name), trainability(model)
        with model.disable_adapter():
            assert torch.equal(self.output(model, name), self.output(self.base(name), name)), "disabled, the model differs from the base"
        assert torch.equal(self.output(model, name), before), "after disabling the adapter computes something else"
        assert trainability(model) == flags, "disabling changed what trains"

    def test_two_adapters(self, name: str) -> None:
        """Adapters of one model do not see one another; the one in use trains, the other does not."""
        model = self.model(name, "one", "two")
        alone = {adapter: self.output(self.model(name, "x", seed=seed), name) for adapter, seed in (("one", 1), ("two", 2))}
        for adapter, other in (("two", "one"), ("one", "two")):
            model.set_adapter(adapter)
            self.close(self.output(model, name), alone[adapter], f"{adapter!r} computes something else beside {other!r}")
            assert all(p.requires_grad for p in parameters_of(model, adapter).values()), f"{adapter!r} is in use but does not train"
            assert not any(p.requires_grad for p in parameters_of(model, other).values()), f"{other!r} is not in use but trains"

    def test_delete(self, name: str) -> None:
        """Deleting an adapter removes its parameters and leaves the others; without any, the base is left."""
        model = self.model(name, "one", "two")
        expected = self.output(model, name)
        count = sum(p.numel() for p in self.model(name, "one").parameters())
        model.delete_adapter("two")
        assert torch.equal(self.output(model, name), expected), "deleting an unused adapter changed the outputs"
        left = [key for key, _ in model.named_parameters() if ".two" in key]
        assert not left, f"parameters of a deleted adapter remain: {left[:3]}"
        assert sum(p.numel() for p in model.parameters()) == count, "a deleted adapter left parameters behind"
        model.delete_adapter("one")
        assert torch.equal(self.output(model, name), self.output(self.base(name), name)), "without adapters the model differs from the base"

    def test_unload(self, name: str) -> None:
        """`unload` gives the base back: the same object, the same modules, the same outputs."""
        base = self.base(name)
        modules = {key: id(module) for key, module in base.named_modules()}
        model = self.model(name, base=base)
        restored = model.unload()
        assert restored is base, "unload returned another object"
        if not model.task.heads:  # a saved head stays in the place of the original
            assert {key: id(module) for key, module in base.named_modules()} == modules, "unload left other modules behind"
            assert torch.equal(self.output(base, name), self.output(self.base(name), name)), "after unload the base computes something else"

    # ---- capabilities, both ways -----------------------------------------------------------------------------------
    def test_merge(self, name: str) -> None:
        """Declared MERGE: the merged base computes what the adapter computed. Not declared: refused, and nothing changes."""
        model = self.model(name)
        expected = self.output(model, name)
        if not self.spec.can(Capability.MERGE):
            raises(CapabilityError, model.merge_adapter, "merging without the capability MERGE")
            assert torch.equal(self.output(model, name), expected), "a refused merge changed the outputs"
            return
        model.merge_adapter(safe_merge=True)
        assert any(module.merges for module in layers_of(model)), "nothing was merged"
        self.close(self.output(model, name), expected, "merged, the outputs differ", 5)
        again = self.model(name)
        merged = again.merge_and_unload()
        self.close(self.output(merged, name), expected, "after merge_and_unload the outputs differ", 5)
        wrapped = [key for key, module in merged.named_modules() if isinstance(module, AdapterLayer)]
        assert not wrapped, f"merge_and_unload left wrappers behind: {wrapped[:3]}"

    def test_unmerge_is_exact(self, name: str) -> None:
        """Merging and taking out again, many times, in every dtype, leaves every bit of the base weights as it was."""
        if not self.spec.can(Capability.MERGE):
            raises(CapabilityError, self.model(name).merge_adapter, "merging without the capability MERGE")
            return
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model = self.model(name, base=self.base(name).to(dtype))
            before = {id(layer): layer.weight.detach().clone() for layer in layers_of(model)}
            for cycle in range(5):
                model.merge_adapter()
                changed = any(not torch.equal(layer.weight, before[id(layer)]) for layer in layers_of(model))
                assert changed, f"{dtype}: merging changed no weight"
                randomise(model, "default", 50 + cycle)  # what trains meanwhile must not leak into the base
                model.unmerge_adapter()
                for layer in layers_of(model):
                    assert torch.equal(layer.weight, before[id(layer)]), f"{dtype}: the base weight differs after {cycle + 1} cycles"

    def test_safe_merge_refuses_nan(self, name: str) -> None:
        """A safe merge of a broken adapter is refused, and no weight of the model changes."""
        if not self.spec.can(Capability.MERGE):
            return
        model = self.model(name)
        before = {id(layer): layer.weight.detach().clone() for layer in layers_of(model)}
        with torch.no_grad():
            for parameter in list(layers_of(model)[-1].parameters_of("default").values())[-1:]:
                parameter.fill_(float("nan"))
        raises(ValueError, lambda: model.merge_adapter(safe_merge=True), "a safe merge of NaN")
        assert all(torch.equal(layer.weight, before[id(layer)]) for layer in layers_of(model)), "a refused merge changed base weights"

    def test_per_sample(self, name: str) -> None:
        """Declared PER_SAMPLE: each row computes what it would alone. Not declared: refused."""
        model = self.model(name, "one", "two")
        names: list[Any] = ["two", "__base__", "one"]
        if not self.spec.can(Capability.PER_SAMPLE):
            raises(CapabilityError, lambda: self.output(model, name, adapter_names=names), "rows with different adapters")
            return
        found = self.output(model, name, adapter_names=names)
        length = self.output(self.base(name), name).shape[1]
        for row, adapter in enumerate(names):
            with model.use_adapters(*([] if adapter == "__base__" else [adapter])):
                alone = self.output(model, name)[row]
            # virtual tokens, of other rows too, come first: what is compared are the caller's own tokens
            self.close(found[row][-length:], alone[-length:], f"row {row} ({adapter}) differs from what it computes alone")

    # ---- training --------------------------------------------------------------------------------------------------
    def test_gradients(self, name: str) -> None:
        """In float64, gradients of the adapter agree with finite differences, and nothing else gets any."""
        model = self.model(name, base=in_one_precision(self.base(name))).double()
        torch.autograd.backward(self.loss(model, name))
        own = parameters_of(model, "default")
        stray = [key for key, p in model.named_parameters() if p.grad is not None and not any(p is q for q in own.values())]
        assert not stray, f"frozen parameters have gradients: {stray[:3]}"
        for key, parameter in own.items():
            assert parameter.grad is not None, f"{key} has no gradient"
            direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)).double()
            step = 1e-6
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                above = float(self.loss(model, name))
                parameter.add_(direction, alpha=-2 * step)
                below = float(self.loss(model, name))
                parameter.add_(direction, alpha=step)
            numeric, analytic = (above - below) / (2 * step), float((parameter.grad * direction).sum())
            assert abs(numeric - analytic) <= 1e-5 * max(abs(numeric), abs(analytic), 1e-3), (
                f"{key}: gradient {analytic:.8g}, finite differences {numeric:.8g}"
            )

    def test_training_changes_the_adapter_alone(self, name: str) -> None:
        """A few steps lower the loss; of the model's parameters only the adapter's change."""
        model = self.model(name).train()
        own = {id(p) for p in parameters_of(model, "default").values()}
        frozen = {key: p.detach().clone() for key, p in model.named_parameters() if id(p) not in own}
        trains = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for p in trains} == own, "what trains is not exactly the adapter's parameters"
        optimiser = torch.optim.Adam(trains, lr=1e-2)
        losses = []
        for _ in range(6):
            loss = self.loss(model.eval(), name)
            losses.append(float(loss.detach()))
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
        assert losses[-1] < losses[0], f"the loss does not go down: {losses}"
        for key, p in model.named_parameters():
            assert id(p) in own or torch.equal(p, frozen[key]), f"training changed {key}"

    # ---- moving, copying, compiling --------------------------------------------------------------------------------
    def test_dtypes(self, name: str) -> None:
        """On a half-precision base the adapter's weights are float32 unless asked otherwise; outputs have the base's dtype."""
        for dtype in (torch.bfloat16, torch.float16):
            base = self.base(name).to(dtype)
            expected = self.output(base, name).dtype
            with quiet():
                model = get_peft_model(base, self.config(name)).eval()
                plain = get_peft_model(self.base(name).to(dtype), self.config(name), autocast_adapter_dtype=False).eval()
            kinds = {p.dtype for p in method_parameters(model, "default")}
            assert kinds == {torch.float32}, f"on a {dtype} base the adapter's weights are {kinds}"
            for wrapped in (model, plain):
                found = self.output(wrapped, name)
                assert found.dtype == expected, f"the output is {found.dtype}, the base's {expected}"
                assert torch.isfinite(found).all(), f"{dtype}: outputs are not finite"
        moved = self.model(name).double()
        self.close(self.output(moved, name).float(), self.output(self.model(name), name), "moved to float64, the model computes something else", 10)

    def test_deepcopy(self, name: str) -> None:
        """A deep copy computes the same and shares nothing."""
        self._independent(name, copy.deepcopy)

    def test_pickle(self, name: str) -> None:
        """A pickled model computes the same and shares nothing."""
        self._independent(name, lambda model: pickle.loads(pickle.dumps(model)))

    def _independent(self, name: str, duplicate: Callable[[Any], Any]) -> None:
        model = self.model(name, "one", "two")
        expected = self.output(model, name)
        twin = duplicate(model)
        assert torch.equal(self.output(twin, name), expected), "the copy computes something else"
        twin.set_adapter("two")
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(self.output(model, name), expected), "changing the copy changed the original"
        assert model.active_adapters == ["one"], "switching the copy switched the original"

    def test_compile(self, name: str) -> None:
        """The model compiles to one graph without breaks and computes the same, with per-sample routes too."""
        import torch._dynamo

        model = self.model(name, "one", "two")
        routes: list[dict[str, Any]] = [{}]
        if self.spec.can(Capability.PER_SAMPLE):
            routes.append({"adapter_names": ["two", "__base__", "one"]})
        for route in routes:
            torch._dynamo.reset()
            compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
            with quiet():
                self.close(self.output(compiled, name, **route), self.output(model, name, **route), f"compiled {route or ''}, the outputs differ")

    # ---- robustness ------------------------------------------------------------------------------------------------
    def test_failed_add_leaves_no_trace(self, name: str) -> None:
        """If adding fails at the very end, modules, parameters, flags, configs and outputs are as before."""
        model = self.model(name, "one")
        index: AdapterIndex = model.__dict__[ATTRIBUTE]

        def fail() -> None:
            raise RuntimeError("on purpose")

        before = (anatomy(model), trainability(model), list(model.peft_config), self.output(model, name))
        with quiet():
            raises(RuntimeError, lambda: index.add("two", self.config(name), mount_on=model, before_commit=fail), "the failure on purpose")
        assert anatomy(model) == before[0], "a failed add left modules or parameters behind"
        assert trainability(model) == before[1], "a failed add changed what trains"
        assert list(model.peft_config) == before[2], "a failed add left its config behind"
        assert torch.equal(self.output(model, name), before[3]), "a failed add changed the outputs"
        with quiet():
            model.add_adapter("two", self.config(name))
        bare = self.base(name)
        names, flags = anatomy(bare), trainability(bare)
        with quiet():
            raises(RuntimeError, lambda: AdapterIndex(bare).add("x", self.config(name), mount_on=nn.Module(), before_commit=fail), "the failure")
        assert anatomy(bare) == names, "a failed first add left the base wrapped"
        assert trainability(bare) == flags, "a failed first add left the base frozen"

    def test_threads(self, name: str) -> None:
        """Threads that use different adapters at the same time do not disturb one another."""
        model = self.model(name, "one", "two")
        expected: dict[str, Tensor] = {}
        for adapter in ("one", "two"):
            with model.use_adapters(adapter):
                expected[adapter] = self.output(model, name)
        wrong: list[str] = []
        start = threading.Barrier(2)

        def work(adapter: str) -> None:
            try:
                with model.use_adapters(adapter):
                    start.wait()
                    for _ in range(10):
                        if not torch.equal(self.output(model, name), expected[adapter]):
                            wrong.append(adapter)
            except Exception as error:
                wrong.append(f"{adapter}: {error}")

        threads = [threading.Thread(target=work, args=(adapter,)) for adapter in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, f"in a thread of its own an adapter computes something else: {wrong[:3]}"

    def test_generate(self, name: str) -> None:
        """Greedy generation equals taking the most likely token step by step; the prompt's own ids come back unchanged."""
        model = self.model(name)
        if not model.task.generates:
            return
        ids = self.inputs(name)["input_ids"]
        with torch.no_grad():
            found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
            expected = ids
            for _ in range(5):
                logits = model(input_ids=expected, attention_mask=torch.ones_like(expected)).logits
                expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(found, expected), f"generate gives {found[0].tolist()}, step by step {expected[0].tolist()}"

    def test_status(self, name: str) -> None:
        """The status lists the adapter with its modules, what trains, and where it is."""
        model = self.model(name, "one", "two")
        status = model.get_model_status()
        assert status.available_adapters == ["one", "two"], f"status lists {status.available_adapters}"
        assert status.peft_types == {"one": self.peft_type, "two": self.peft_type}, f"status says {status.peft_types}"
        assert status.requires_grad == {"one": True, "two": False}, f"status says that {status.requires_grad} train"
        assert status.num_adapter_layers > 0, "status lists no module"
