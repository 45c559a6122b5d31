"""Checks that the outputs of a call depend only on the current weights and modules, not on values computed in earlier calls."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import PeftError, PeftModel, RoutingError, cached
from ..base.ops import LAYER_TYPES
from ..plugins import Capability
from .base import SuiteBase
from .changes import CHANGES, MODULE_CHANGES, hidden_tensors
from .conditions import generates, merges, only, routes
from .helpers import parameters_of, quiet, randomise, tensor_of

#: modes in which a model is called: name → (in training mode, with gradients)
MODES = {"evaluation": (False, False), "evaluation with gradients": (False, True), "training": (True, True)}


class SoundnessChecks(SuiteBase):
    """Checks that no output is computed from outdated weights, inside or outside of a cache scope."""

    def test_outputs_follow_the_weights(self, name: str) -> None:
        """After a call and a change of a weight (each of `peft_core.testing.changes.CHANGES`), outputs equal those computed anew from the weights.

        Protects from values computed from weights that are stored beyond a call: merged weights, norms, transposed copies, virtual tokens.
        """
        model = self.model(name)
        for number, (mode, (training, grad)) in enumerate(MODES.items()):
            randomise(model, "default", 1 + number)
            model.train(training)
            fresh = self._fresh(model, name, training)
            found = self._called(model, name, grad)
            # the other modes can only use stored values that a call without gradients could store, too: for them every fifth change is enough
            for what in [*CHANGES][:: 1 + 4 * bool(number)]:
                for module, key, where in sampled(model, what):
                    before = found
                    CHANGES[what](module, key)
                    found = self._called(model, name, grad)
                    fresh.load_state_dict(model.state_dict())  # this model was called with other weights, so values that it stored would differ
                    expected = self._called(fresh, name, grad)
                    self.close(found, expected, f"{mode}, {where} changed: {what}", factor=3)
                    if what == "in place" and where.startswith("adapter"):
                        assert not torch.equal(found, before), f"{mode}, {where}: {what} had no effect"
        model.eval()

    def test_outputs_follow_the_modules(self, name: str) -> None:
        """After a call and a change of a module (each of `MODULE_CHANGES`) or of the dtype, outputs equal those of a fresh model changed equally.

        Protects from code that reads a module's weight instead of calling the module: hooks that don't run, replaced modules that have no effect.
        """
        model = self.model(name)
        done: list[tuple[str, str]] = []
        for number, what in enumerate(MODULE_CHANGES):
            for choices in called_modules(model):
                before = self._follow(model, name)
                changed = [path for path in choices if path not in {path for _, path in done}]
                if not changed:
                    continue
                done.append((what, changed[number % len(changed)]))
                _change_module(model, *done[-1])
                fresh = self.model(name)
                for each in done:
                    _change_module(fresh, *each)
                found = self._follow(model, name)
                self.close(found, self._follow(fresh, name), f"{done[-1][1]} changed: {what}", factor=3)
                if done[-1][1].endswith(".base_layer") and found.shape == before.shape:  # otherwise the model refuses such a module
                    assert not torch.allclose(found, before, rtol=1e-4, atol=1e-4), f"{done[-1][1]}: {what} had no effect"
        model, fresh = self.model(name), self.model(name)
        self.output(model, name)
        for dtype in (torch.float64, torch.float32):
            self.close(self.output(model.to(dtype), name), self.output(fresh.to(dtype), name), f"moved to {dtype}", factor=3)

    def _follow(self, model: PeftModel, name: str) -> Tensor:
        """Return the model's output; an empty tensor (0,) if a layer raises `PeftError` because it does not support the changed module."""
        try:
            return self.output(model, name)
        except PeftError:
            return torch.zeros(0)

    @only(generates)
    def test_generation_follows_the_weights(self, name: str) -> None:
        """After `generate` and a change of weights, the logits of `generate` equal those of a model that was never called.

        Protects from cached values that are still used after the cache scope that `generate` opens has ended.
        """
        model = self.model(name)
        self._generated(model, name)
        for what in [*CHANGES][::4]:
            for module, key, where in sampled(model, what):
                CHANGES[what](module, key)
                found = self._generated(model, name)
                self.close(found, self._generated(self._fresh(model, name, False), name), f"generate, {where} changed: {what}", factor=10)

    @only(routes)
    def test_rows_follow_the_weights(self, name: str) -> None:
        """After a per-sample routed batch and a change of weights, the outputs equal those of a model that was never called.

        Protects from stacked adapter weights that are stored beyond a call.
        """
        rows = ["default", "__base__", "other", "default"]

        def called(model: PeftModel) -> Tensor:
            try:
                return self.output(model, name, rows=len(rows), adapter_names=rows)
            except RoutingError:  # some wrappers always refuse per-sample routing
                return torch.zeros(0)

        def made() -> PeftModel:
            return self.model(name, "default", "other")

        model = made()
        called(model)
        for what in [*CHANGES][1::4]:
            for module, key, where in sampled(model, what):
                CHANGES[what](module, key)
                fresh = made()
                fresh.load_state_dict(model.state_dict())
                self.close(called(model), called(fresh), f"rows, {where} changed: {what}", factor=3)

    def test_copies_compute_their_own(self, name: str) -> None:
        """The outputs of a deep copy of a called model depend on the copy's weights, and changing the copy does not change the original's outputs.

        Protects from copies that share computed values with the original.
        """
        model = self.model(name)
        before = self.output(model, name)
        twin = copy.deepcopy(model)
        randomise(twin, "default", 7)
        self.close(self.output(twin, name), self.output(self._fresh(twin, name, False), name), "a copy computes something else")
        assert torch.equal(self.output(model, name), before), "changing a copy changed the original"

    def test_nothing_is_kept(self, name: str) -> None:
        """After calls in evaluation mode, a model stores no new tensors other than parameters, buffers and the records of merges.

        Protects from memory use that grows with each adapter, and from stale values.
        """
        model = self.model(name)
        had = set(hidden_tensors(model))
        for _ in range(2):
            self.output(model, name)
        with torch.no_grad(), cached(model):
            self.output(model, name)
        if Capability.PER_SAMPLE in self.spec.capabilities:
            with contextlib.suppress(RoutingError):  # some wrappers refuse per-sample routing; other checks test it
                self.output(model, name, adapter_names=["default", "__base__", "default"])
        left = [where for where in hidden_tensors(model) if where not in had]
        assert not left, f"tensors are left behind: {left[:5]}"

    def test_cache_scope(self, name: str) -> None:
        """Outputs inside ``cached(model)`` equal those outside, also after peft-core operations in the scope; an error leaves no cached values.

        Protects from cached values that are stale after an operation that is allowed inside the scope.
        """
        model = self.model(name)
        expected = self.output(model, name)
        other = {key: tensor.clone() for key, tensor in self.model(name, seed=5).state_dict().items()}
        with cached(model):
            for _ in range(2):
                self.close(self.output(model, name), expected, "in a cache scope", factor=3)
            for what, operation in self._operations(name, other).items():
                operation(model)
                inside = [self.output(model, name) for _ in range(2)]
                self.close(inside[1], self._called(self._fresh(model, name, False), name, False), f"in a cache scope after {what}", factor=3)
        try:
            with cached(model):
                self.output(model, name)
                raise KeyError("something went wrong")
        except KeyError:
            pass
        randomise(model, "default", 9)
        self.close(self.output(model, name), self.output(self._fresh(model, name, False), name), "after an error in a cache scope", factor=3)

    @only(merges)
    def test_merging_in_a_cache_scope(self, name: str) -> None:
        """After merging and after unmerging inside ``cached(model)``, the outputs are still correct: both operations empty the cache scope.

        Protects from a cache scope that returns values computed from the weight before the merge.
        """
        model = self.model(name)
        expected = self.output(model, name)
        with cached(model):
            self.output(model, name)
            model.merge_adapter()
            self.close(self.output(model, name), expected, "merged in a cache scope", factor=10)
            model.unmerge_adapter()
            self.close(self.output(model, name), expected, "unmerged in a cache scope", factor=3)

    # ---- helpers ---------------------------------------------------------------------------------------------------------
    def _operations(self, name: str, state: dict[str, Tensor]) -> dict[str, Callable[[PeftModel], Any]]:
        def add_and_delete(model: PeftModel) -> None:
            with quiet():
                model.add_adapter("passing", self.second_config(name))
            model.delete_adapter("passing")

        return {
            "load_state_dict": lambda model: model.load_state_dict(state),
            "adding and deleting another adapter": add_and_delete,
            "train() and eval()": _trained,
        }

    def _called(self, model: nn.Module, name: str, grad: bool) -> Tensor:
        torch.manual_seed(0)  # training mode uses random numbers (dropout)
        with torch.set_grad_enabled(grad):
            return tensor_of(model(**self.inputs_for(model, name))).detach().clone()

    def _generated(self, model: PeftModel, name: str) -> Tensor:
        with torch.no_grad(), quiet():
            settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
            arguments: dict[str, Any] = {**self.inputs_for(model, name), **settings}
            found = model.generate(**arguments)
        logits: Tensor = torch.stack(found.logits)
        return logits

    def _fresh(self, model: nn.Module, name: str, training: bool) -> PeftModel:
        """Return a model that was never called, with the weights of `model`."""
        twin = self.model(name, random=False)
        twin.load_state_dict(model.state_dict())
        twin.train(training)
        return twin


def _trained(model: PeftModel) -> None:
    with quiet():
        model.train()
    randomise(model, "default", 3)
    model.eval()


#: changes after which a shared tensor is no longer shared
UNTYING = ("another parameter in its place", "load_state_dict, assign=True")


def called_modules(model: PeftModel) -> tuple[list[str], list[str]]:
    """Return the paths of modules of a type in `LAYER_TYPES` with a ``weight``: (those of the base, wrapped ones first; those of ``default``)."""
    adapter_parameters = {id(parameter) for parameter in parameters_of(model, "default").values()}
    base: list[str] = []
    adapter: list[str] = []
    for path, module in model.named_modules():
        if type(module) in LAYER_TYPES and isinstance(module._parameters.get("weight"), nn.Parameter):
            (adapter if id(module._parameters["weight"]) in adapter_parameters else base).append(path)
    return sorted(base, key=lambda path: not path.endswith(".base_layer")), adapter


def _change_module(model: nn.Module, what: str, path: str) -> None:
    parent, _, name = path.rpartition(".")
    MODULE_CHANGES[what](model.get_submodule(parent), name)


def sampled(model: PeftModel, what: str) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield (module, name, description) of the parameters to change: one of the adapter and one of the base, different ones for each change `what`.

    Only one parameter is changed at a time: changing all at once would hide that the outputs do not depend on the current value of one of them.
    """
    number = list(CHANGES).index(what)
    adapter_parameters = {id(parameter): key for key, parameter in parameters_of(model, "default").items()}
    tensors = [(module, key, p) for module in model.modules() for key, p in module._parameters.items() if p is not None]
    if what in UNTYING:  # a tensor that two modules share would become two tensors, which a state dict can't restore
        times = Counter(id(p) for _, _, p in tensors)
        tensors = [entry for entry in tensors if times[id(entry[2])] == 1]
    adapter = [(module, key, f"adapter: {adapter_parameters[id(p)]}") for module, key, p in tensors if id(p) in adapter_parameters and p.dim()]
    base = [(module, key, f"base: {type(module).__name__}.{key}") for module, key, p in tensors if id(p) not in adapter_parameters and p.dim() > 1]
    for choices, step in ((adapter, number), (base, 5 * number)):
        if choices:
            yield choices[step % len(choices)]
