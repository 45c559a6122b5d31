"""Checks of a tuner's capabilities: a declared capability works; using one that is not declared raises an error and changes nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import (
    AdapterLayer,
    Capability,
    CapabilityError,
    ConfigError,
    PeftConfig,
    PeftModel,
    UnsupportedModuleError,
    get_peft_config,
    get_peft_model,
    hotswap_adapter,
)
from ..plugins import hookimpl, registry
from .base import SuiteBase
from .conditions import Condition, only, refuses_quantised, wraps_layers
from .helpers import anatomy, changed_tensors, layer_inputs, layers_of, parameters_of, quiet, raises, randomise, retaken, tensors_of, trainability
from .models import OneLayer, seeded, unsettle


def _takes(capability: Capability, make: Callable[[], nn.Module]) -> Condition:
    """Return the condition of a check on the kind of layer that `make` creates, for which a tuner declares `capability`.

    The check applies to tuners that wrap layers. It does not apply to a config that refuses this kind of layer although the tuner declares the
    capability and accepts such a layer with a default config.
    """

    def condition(suite: SuiteBase, name: str) -> str | None:
        reason = wraps_layers(suite, name)
        if reason is not None or not suite.spec.can(capability):
            return reason
        refusal = _refusal(make(), suite.config_on(name, "target"))
        defaults = get_peft_config({"peft_type": suite.peft_type, "target_modules": ["target"]})
        return refusal if refusal is None or _refusal(make(), defaults) is None else None

    return condition


def _refusal(layer: nn.Module, config: PeftConfig) -> str | None:
    try:
        with quiet():
            get_peft_model(OneLayer(layer), config)
    except ConfigError as error:
        return f"the config refuses {type(layer).__name__}: {error}"
    return None


class CapabilityChecks(SuiteBase):
    """Checks that declared capabilities work and that capabilities which are not declared are refused."""

    # ---- merging ---------------------------------------------------------------------------------------------------
    def test_merge(self, name: str) -> None:
        """MERGE declared: the merged model gives the same outputs as the adapter. Not declared: merging raises an error and changes nothing.

        Protects from deploying a merged model whose outputs differ from those of the model that was evaluated.
        """
        model = self.model(name)
        expected = self.output(model, name)
        if not self.spec.can(Capability.MERGE):
            self._refuses_to_merge(model, name)
            return
        model.merge_adapter(safe_merge=True)
        assert any(module.merged for module in layers_of(model)), "nothing was merged"
        self.close(self.output(model, name), expected, "merged, the outputs differ", 5)
        merged = self.model(name).merge_and_unload()
        self.close(self.output(merged, name), expected, "after merge_and_unload the outputs differ", 5)
        wrapped = [key for key, module in merged.named_modules() if isinstance(module, AdapterLayer)]
        assert not wrapped, f"merge_and_unload left wrappers behind: {wrapped[:3]}"

    def test_unmerge_is_exact(self, name: str) -> None:
        """After repeated merging and unmerging in float32, bfloat16 and float16, the base's parameters and buffers are bitwise unchanged.

        Protects from base weights that drift a little each time an adapter is merged and unmerged.
        """
        if not self.spec.can(Capability.MERGE):
            self._refuses_to_merge(self.model(name), name)
            return
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            base = self.base(name).to(dtype)
            initial = tensors_of(base)
            model = self.model(name, base=base)
            before = retaken(initial)
            for cycle in range(5):
                model.merge_adapter()
                assert changed_tensors(before), f"{dtype}: merging changed no weight"
                randomise(model, "default", 50 + cycle)  # changes of the adapter while it is merged must not leak into the base
                model.unmerge_adapter()
                assert not changed_tensors(before), f"{dtype}: after {cycle + 1} cycles the base differs in {changed_tensors(before)[:3]}"

    def test_safe_merge_refuses_nan(self, name: str) -> None:
        """A safe merge of an adapter with NaN weights raises an error, and no tensor of the base model changes. MERGE not declared: all merges raise.

        Protects from a base model whose weights are NaN after a merge and can't be restored.
        """
        base = self.base(name)
        initial = tensors_of(base)
        model = self.model(name, base=base)
        before = retaken(initial)
        if not self.spec.can(Capability.MERGE):
            self._refuses_to_merge(model, name)
            return
        with torch.no_grad():
            for parameter in list(layers_of(model)[-1].parameters_of("default").values())[-1:]:
                parameter.fill_(float("nan"))
        raises(ValueError, lambda: model.merge_adapter(safe_merge=True), "a safe merge of NaN")
        assert not changed_tensors(before), f"a refused merge changed {changed_tensors(before)[:3]}"

    def _refuses_to_merge(self, model: PeftModel, name: str) -> None:
        expected, modules = self.output(model, name), anatomy(model)
        for what in (model.merge_adapter, model.merge_and_unload):
            for safe in (False, True):
                raises(CapabilityError, partial(what, safe_merge=safe), "merging without the capability MERGE")
        assert torch.equal(self.output(model, name), expected), "a refused merge changed the outputs"
        assert anatomy(model) == modules, "a refused merge changed the modules"

    # ---- several adapters ------------------------------------------------------------------------------------------
    def test_per_sample(self, name: str) -> None:
        """PER_SAMPLE declared: each row's output is the same as with its adapter active for the whole batch. Not declared: the call raises an error.

        Protects from a batch in which a user's row is computed with another user's adapter.
        """
        model = self.model(name, "one", "two")
        names: list[Any] = ["two", "__base__", "one"]
        if not self.spec.can(Capability.PER_SAMPLE):
            before = self.output(model, name)
            raises(CapabilityError, lambda: self.output(model, name, adapter_names=names), "rows with different adapters")
            assert torch.equal(self.output(model, name), before), "a refused call changed the outputs"
            return
        found = self.output(model, name, adapter_names=names)
        length = self.output(self.base(name), name).shape[1]
        for row, adapter in enumerate(names):
            with model.use_adapters(*([] if adapter == "__base__" else [adapter])):
                alone = self.output(model, name)[row]
            # virtual tokens (also padding for those of other rows) come first: only the outputs of the caller's own tokens are compared
            self.close(found[row][-length:], alone[-length:], f"row {row} ({adapter}) differs from what it computes alone")

    def test_two_at_once(self, name: str) -> None:
        """Two active adapters both have an effect: additive effects add up, merging both gives the same outputs, and unmerging is exact.

        Protects from an adapter that is silently ignored, or applied twice, when adapters are combined.
        """
        base = self.base(name)
        initial = tensors_of(base)
        model = self.model(name, "one", "two", base=base)
        before = retaken(initial)
        with model.use_adapters("one", "two"):
            both = self.output(model, name)
        for adapter in ("one", "two"):
            with model.use_adapters(adapter):
                alone = self.output(model, name)
            assert alone.shape != both.shape or not torch.equal(alone, both), f"with both in use, only {adapter!r} has an effect"
        for layer, x in layer_inputs(model, self.inputs_for(model, name)):
            self._sums(model, layer, x)
        if self.spec.can(Capability.PER_SAMPLE):
            routed = self.output(model, name, adapter_names=[["one", "two"]] * 3)
            self.close(routed, both, "named for each row, both adapters compute something else")
        model.set_adapter(["one", "two"])
        self.close(self.output(model, name), both, "set_adapter with both computes something else than use_adapters")
        if not self.spec.can(Capability.MERGE):
            self._refuses_to_merge(model, name)
            return
        model.merge_adapter()
        self.close(self.output(model, name), both, "merged, both adapters compute something else", 10)
        model.unmerge_adapter()
        assert not changed_tensors(before), f"after unmerging both the base differs in {changed_tensors(before)[:3]}"
        self.close(self.output(model, name), both, "after unmerging both the adapters compute something else")

    def _sums(self, model: PeftModel, layer: AdapterLayer, x: Tensor) -> None:
        if not all(layer.is_additive(adapter) for adapter in ("one", "two")):
            return
        with torch.no_grad():
            plain = layer.get_base_layer()(x)
            effects = []
            for names in (["one", "two"], ["one"], ["two"]):
                with model.use_adapters(*names):
                    effects.append(layer(x) - plain)
        # the effects are differences of values as large as the base's output, so the rounding error is relative to that output
        scale = plain.abs().max()
        error = (effects[0] - effects[1] - effects[2]).abs().max()
        assert error <= 10 * self.tolerance * max(scale, effects[0].abs().max()), f"the effects of two adapters do not add up: off by {error:.2e}"

    def test_hotswap(self, name: str) -> None:
        """HOTSWAP declared: another adapter's file is loaded into the existing parameters in place. Not declared: an error, and nothing changes.

        Protects from a server that recompiles, or answers with the old weights, when an adapter is replaced.
        """
        model, other = self.model(name), self.model(name, seed=7)
        before, expected = self.output(model, name), self.output(other, name)
        addresses = {key: (id(parameter), parameter.data_ptr()) for key, parameter in parameters_of(model, "default").items()}
        with tempfile.TemporaryDirectory() as folder, quiet():
            other.save_pretrained(folder)
            if not self.spec.can(Capability.HOTSWAP):
                raises(CapabilityError, partial(hotswap_adapter, model, folder, "default"), "replacing weights without the capability HOTSWAP")
                assert torch.equal(self.output(model, name), before), "a refused replacement changed the outputs"
                return
            hotswap_adapter(model, folder, "default")
        assert torch.equal(self.output(model, name), expected), "after the replacement the model computes something else than the new adapter"
        found = {key: (id(parameter), parameter.data_ptr()) for key, parameter in parameters_of(model, "default").items()}
        assert found == addresses, f"other parameters than before: {[key for key in addresses if found.get(key) != addresses[key]][:3]}"

    # ---- kinds of layers -------------------------------------------------------------------------------------------
    @only(_takes(Capability.EMBEDDING, partial(nn.Embedding, 4, 4)))
    def test_embedding(self, name: str) -> None:
        """EMBEDDING declared: an embedding can be adapted, and merged if MERGE is declared. Not declared: an error, and nothing changes.

        Protects from an adapter that computes with token ids as if they were features, and from an error that leaves a model partly adapted.
        """
        ids = torch.tensor([[0, 3, 10], [3, 7, 1]])
        with seeded(4):
            self._kind(name, Capability.EMBEDDING, nn.Embedding(11, 5), ids)

    @only(_takes(Capability.CONV, partial(nn.Conv1d, 4, 4, 1)))
    def test_convolution(self, name: str) -> None:
        """CONV declared: Conv1d and Conv2d can be adapted, and merged if MERGE is declared. Not declared: an error, and nothing changes.

        Protects from an adapter that ignores the stride, padding or dilation of a convolution.
        """
        with seeded(4):
            self._kind(name, Capability.CONV, nn.Conv1d(3, 5, 3, stride=2, padding=1), torch.randn(2, 3, 9))
            self._kind(name, Capability.CONV, nn.Conv1d(4, 6, 1), torch.randn(2, 4, 5))
            self._kind(name, Capability.CONV, nn.Conv2d(3, 4, (3, 2), padding=(1, 0), dilation=2), torch.randn(2, 3, 7, 8))
            self._kind(name, Capability.CONV, nn.Conv2d(2, 6, 1), torch.randn(2, 2, 3, 4))

    @only(refuses_quantised)
    def test_quantised(self, name: str) -> None:
        """QUANTISED not declared: a quantised layer raises an error, even if another plugin offers an adapter layer for it, and nothing changes.

        Protects from an adapter on packed weights that its method reads as if they were ordinary weights.
        """
        offer = _OffersLayers()
        registry.register_plugin(offer)
        try:
            self._refuses(name, OneLayer(PackedLinear(4, 4)), Capability.QUANTISED)
        finally:
            registry.unregister_plugin(offer)

    def _refuses(self, name: str, base: OneLayer, capability: Capability) -> None:
        kind = type(base.target).__name__
        before, modules, flags = tensors_of(base), anatomy(base), trainability(base)
        with quiet():
            action = partial(get_peft_model, base, self.config_on(name, "target"))
            raises(UnsupportedModuleError, action, f"an adapter on {kind} without the capability {capability.name}")
        assert anatomy(base) == modules, f"refusing {kind} changed the modules"
        assert trainability(base) == flags, f"refusing {kind} changed what trains"
        assert not changed_tensors(before), f"refusing {kind} changed its weights"

    def _kind(self, name: str, capability: Capability, layer: nn.Module, x: Tensor) -> None:
        kind = type(layer).__name__
        base = OneLayer(layer)
        unsettle(base).eval()
        if not self.spec.can(capability):
            self._refuses(name, base, capability)
            return
        initial = tensors_of(base)
        model = self.model_on(name, base)
        before = retaken(initial)
        with torch.no_grad():
            plain = layers_of(model)[0].get_base_layer()(x)
        found = model(x)
        assert found.shape == plain.shape, f"{kind}: the output has the shape {tuple(found.shape)}, the base's {tuple(plain.shape)}"
        assert found.dtype == plain.dtype, f"{kind}: the output is {found.dtype}, the base's {plain.dtype}"
        assert not torch.equal(found, plain), f"{kind}: the adapter has no effect"
        torch.autograd.backward(found.square().sum())
        for key, parameter in parameters_of(model, "default").items():
            assert parameter.grad is not None, f"{kind}: {key} has no gradient"
            assert torch.isfinite(parameter.grad).all(), f"{kind}: {key} has a gradient that is not finite"
        with torch.no_grad():
            with model.disable_adapter():
                assert torch.equal(model(x), plain), f"{kind}: disabled, the model differs from the base"
            if self.spec.can(Capability.MERGE):
                model.merge_adapter(safe_merge=True)
                self.close(model(x), found, f"{kind}: merged, the outputs differ", 5)
                model.unmerge_adapter()
                assert not changed_tensors(before), f"{kind}: after unmerging the base differs"


class PackedLinear(nn.Linear):
    """A Linear with a uint8 weight, like the packed weight of a quantised layer; it can't compute and is only used to be refused."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__(inp, out)
        del self.weight
        self.register_buffer("weight", torch.zeros(out, inp, dtype=torch.uint8))


class _OffersLayers:
    """A plugin that offers an adapter layer for every module."""

    @hookimpl
    def peft_make_layer(self, base_layer: nn.Module, selection: Any) -> Any:
        return AdapterLayer(base_layer, selection)
