"""The weights of named adapters in one layer: created, found, named for files, taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..selection.selection import AdapterSelection
from ..selection.switching import SelectionMixin
from .init_options import InitOptions, filler
from .slots import Slot

_HALF = (torch.float16, torch.bfloat16)


class AdapterWeights(SelectionMixin):
    """What `AdapterLayer` knows of the parameters of its adapters."""

    #: attributes that hold per-adapter weights: `nn.ParameterDict` or `nn.ModuleDict`, keyed by adapter
    containers: ClassVar[tuple[str, ...]] = ()
    #: plain dicts keyed by adapter that `drop` clears
    per_adapter: ClassVar[tuple[str, ...]] = ("scaling",)
    #: names of the base's own parameters, where those are adapted and not the module as a whole
    targeted_parameters: tuple[str, ...] = ()
    selection: AdapterSelection
    scaling: dict[str, float]
    weight_name: str
    _init_options: InitOptions

    if TYPE_CHECKING:

        @property
        def weight(self) -> Tensor: ...

        def get_base_layer(self) -> nn.Module: ...

    def add(self, adapter: str, config: Any) -> None:
        """Create the weights of a new adapter with `new`, and set its `scaling` (1.0 otherwise). `config`: what the tuner's `settings` say."""
        raise NotImplementedError(f"{type(self).__name__} must define add(adapter, config)")

    def adapters(self) -> tuple[str, ...]:
        """Return the adapters that have weights here, in the order in which they came."""
        return tuple(self.scaling)

    def attach(self, adapter: str, config: Any, init_options: InitOptions) -> None:
        """Add an adapter's weights as `init_options` says. A failure leaves no trace of it."""
        self._init_options = init_options
        try:
            self.scaling[adapter] = 1.0
            self.selection.register_adapter(adapter, self._base_dtype_and_device()[1])
            self.add(adapter, config)
        except BaseException:
            self.drop(adapter)
            raise
        finally:
            self._init_options = InitOptions()

    def new(
        self,
        container: str,
        adapter: str,
        shape: Sequence[int],
        *,
        std: float | None = None,
        bound: float | None = None,
        init: Callable[[Tensor], Any] | None = None,
    ) -> nn.Parameter:
        """Create a parameter in the `nn.ParameterDict` called `container`, frozen until the adapter is activated.

        Args:
            container: one of `containers`.
            adapter: name of the adapter.
            shape: shape of the parameter.
            std: normal with this standard deviation (0: zeros).
            bound: uniform on ±bound.
            init: a function that fills the tensor in place. Without any of the three: zeros.
        """
        holder = self._modules.get(container)
        if holder is None:
            holder = nn.ParameterDict()
            self.add_module(container, holder)
        parameter = self.make_parameter(shape, filler(std, bound, init))
        holder[adapter] = parameter  # type: ignore[operator]
        return parameter

    @property
    def init_options(self) -> InitOptions:
        """How the adapter that is being added is to be made; for `add`."""
        return self._init_options

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The dtype of the parameters of the adapter that is being added: float32, or the base's where autocasting is off."""
        return self._kept(self._base_dtype_and_device()[0])

    def _kept(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if dtype == torch.float64 or (dtype in _HALF and not self._init_options.autocast) else torch.float32

    def make_parameter(self, shape: Sequence[int], fill: Callable[[Tensor], Any]) -> nn.Parameter:
        """Return a frozen parameter on the base's device: filled in float32, rounded to the base's dtype, then as autocast wants it."""
        dtype, device = self._base_dtype_and_device()
        kept = self._kept(dtype)
        if self._init_options.meta:
            return nn.Parameter(torch.empty(tuple(shape), dtype=kept, device="meta"), requires_grad=False)
        tensor = torch.empty(tuple(shape), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
        if self._init_options.initialise:
            with torch.no_grad():
                fill(tensor)
        tensor = tensor.to(dtype).to(kept) if dtype in _HALF else tensor
        return nn.Parameter(tensor, requires_grad=False)

    def keep_parameter(self, value: Tensor) -> nn.Parameter:
        """Return a frozen parameter with a computed value, with as many of its bits as `parameter_dtype` has."""
        if self._init_options.meta:
            return nn.Parameter(torch.empty(value.shape, dtype=self.parameter_dtype, device="meta"), requires_grad=False)
        device = self._base_dtype_and_device()[1]
        # strides of its own: a column cut out of a matrix counts as contiguous, but is multiplied, and rounded, in another way
        tensor = torch.empty(value.shape, dtype=self.parameter_dtype, device=device).copy_(value.detach())
        return nn.Parameter(tensor, requires_grad=False)

    def _base_dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        base = self.get_base_layer()
        weight: Tensor = getattr(base, self.weight_name)
        hook = getattr(base, "_hf_hook", None)  # accelerate: an offloaded weight is on meta, its hook knows better
        device = getattr(hook, "execution_device", None) if weight.is_meta and hook is not None else weight.device
        return (weight.dtype if weight.is_floating_point() else torch.float32), torch.device(device if device is not None else weight.device)

    def holders(self, adapter: str) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield (end of the file key, module, attribute) for each tensor of an adapter."""
        for container in self.containers:
            holder = self._modules.get(container)
            if isinstance(holder, nn.ParameterDict):
                if adapter in holder._parameters or adapter in holder._buffers:
                    yield container, holder, adapter
            elif holder is not None and adapter in holder._modules:
                part = holder._modules[adapter]
                assert part is not None
                for name, parameter in part._parameters.items():
                    if parameter is not None:
                        yield f"{container}.{name}", part, name

    def parameters_of(self, adapter: str) -> Mapping[str, nn.Parameter]:
        """Return the adapter's parameters by the end of their file key."""
        return {key: parameter for key, module, name in self.holders(adapter) if (parameter := module._parameters.get(name)) is not None}

    def slots(self, adapter: str) -> Mapping[str, Slot]:
        """Return what a file holds of the adapter, by the end of its key."""
        return {key: Slot.of(module, name) for key, module, name in self.holders(adapter)}

    def drop(self, adapter: str) -> None:
        """Take the adapter's weights out; a name that is not here is ignored."""
        for container in self.containers:
            holder: Any = self._modules.get(container)
            if holder is not None and adapter in holder:
                del holder[adapter]
        for name in self.per_adapter:
            getattr(self, name).pop(adapter, None)
