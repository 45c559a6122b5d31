"""Checks of training, moving, copying, compiling, and of failures."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import (
    Capability,
    get_peft_model,
)
from ..operations.add import add_adapter
from ..tuners.index import ATTRIBUTE, AdapterIndex
from .base import SuiteBase
from .conditions import generates, only
from .helpers import anatomy, in_one_precision, method_parameters, parameters_of, quiet, raises, trainability


class RobustnessChecks(SuiteBase):
    """Checks of training, moving, copying, compiling, and of failures."""

    # ---- training --------------------------------------------------------------------------------------------------
    def test_gradients(self, name: str) -> None:
        """In float64, the gradients of the adapter's parameters agree with finite differences, and no other parameter gets a gradient.

        Protects from training with wrong gradients, and from memory used for gradients of frozen weights.
        """
        model = self.model(name, base=in_one_precision(self.base(name))).double()
        torch.autograd.backward(self.loss(model, name))
        adapter_parameters = parameters_of(model, "default")
        stray = [key for key, p in model.named_parameters() if p.grad is not None and not any(p is q for q in adapter_parameters.values())]
        assert not stray, f"frozen parameters have gradients: {stray[:3]}"
        for key, parameter in adapter_parameters.items():
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
        """A few training steps reduce the loss, and only the adapter's parameters change.

        Protects from training that changes the base model, so that other adapters no longer fit it.
        """
        model = self.model(name).train()
        adapter_parameters = {id(p) for p in parameters_of(model, "default").values()}
        frozen = {key: p.detach().clone() for key, p in model.named_parameters() if id(p) not in adapter_parameters}
        trains = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for p in trains} == adapter_parameters, "what trains is not exactly the adapter's parameters"
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
            assert id(p) in adapter_parameters or torch.equal(p, frozen[key]), f"training changed {key}"

    # ---- moving, copying, compiling --------------------------------------------------------------------------------
    def test_dtypes(self, name: str) -> None:
        """On a half-precision base model the adapter's weights are float32 by default; outputs are finite and have the base model's dtype.

        Protects from updates that are rounded away in half precision, and from outputs whose dtype the next layer can't use.
        """
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
        """A deep copy gives bitwise equal outputs and shares neither parameters nor the active adapters with the original.

        Protects from an averaged or frozen copy that changes when the original is trained.
        """
        self._independent(name, copy.deepcopy)

    def test_pickle(self, name: str) -> None:
        """A pickled and unpickled model gives bitwise equal outputs and shares neither parameters nor the active adapters with the original.

        Protects from models that can't be sent to another process, or that differ there.
        """
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
        """The model compiles to one graph without graph breaks and gives the same outputs, also with per-sample routing if it is declared.

        Protects from a compiled model that is slow because of hidden graph breaks, or gives other outputs.
        """
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
        """If adding an adapter fails in the last step, modules, parameters, `requires_grad`, configs and outputs are as before.

        Protects from a model that is partly adapted after an error and has to be loaded again.
        """
        model = self.model(name, "one")
        index: AdapterIndex = model.__dict__[ATTRIBUTE]

        def fail() -> None:
            raise RuntimeError("on purpose")

        before = (anatomy(model), trainability(model), list(model.peft_config), self.output(model, name))
        with quiet():
            raises(RuntimeError, lambda: add_adapter(index, "two", self.config(name), mount_on=model, before_commit=fail), "the failure on purpose")
        assert anatomy(model) == before[0], "a failed add left modules or parameters behind"
        assert trainability(model) == before[1], "a failed add changed what trains"
        assert list(model.peft_config) == before[2], "a failed add left its config behind"
        assert torch.equal(self.output(model, name), before[3]), "a failed add changed the outputs"
        with quiet():
            model.add_adapter("two", self.config(name))
        bare = self.base(name)
        names, flags = anatomy(bare), trainability(bare)
        with quiet():
            raises(
                RuntimeError, lambda: add_adapter(AdapterIndex(bare), "x", self.config(name), mount_on=nn.Module(), before_commit=fail), "the failure"
            )
        assert anatomy(bare) == names, "a failed first add left the base wrapped"
        assert trainability(bare) == flags, "a failed first add left the base frozen"

    def test_threads(self, name: str) -> None:
        """Threads that use different adapters of one model at the same time do not affect each other's outputs.

        Protects from a server that answers one request with the adapter of another request.
        """
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

    @only(generates)
    def test_generate(self, name: str) -> None:
        """Greedy `generate` returns the prompt's ids followed by the same tokens as choosing the most likely token step by step without a cache.

        Protects from generation that differs from the trained model because the key-value cache does not include the adapter.
        """
        model = self.model(name)
        ids = self.inputs(name)["input_ids"]
        extra: dict[str, Any] = self.arguments(name, len(ids))
        with torch.no_grad():
            found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, **extra)
            expected = ids
            for _ in range(5):
                logits = model(input_ids=expected, attention_mask=torch.ones_like(expected), **extra).logits
                expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(found, expected), f"generate gives {found[0].tolist()}, step by step {expected[0].tolist()}"

    def test_status(self, name: str) -> None:
        """`get_model_status` lists the adapters, their methods, which of them are trainable, and a number of adapter layers above 0.

        Protects from tools that report no adapters or wrong adapters.
        """
        model = self.model(name, "one", "two")
        status = model.get_model_status()
        assert status.available_adapters == ["one", "two"], f"status lists {status.available_adapters}"
        assert status.peft_types == {"one": self.peft_type, "two": self.peft_type}, f"status says {status.peft_types}"
        assert status.requires_grad == {"one": True, "two": False}, f"status says that {status.requires_grad} train"
        assert status.num_adapter_layers > 0, "status lists no module"
