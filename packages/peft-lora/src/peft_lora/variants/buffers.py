"""Buffers of a variant: tensors that are saved in adapter files but not trained."""

from __future__ import annotations

from torch import Tensor, nn


class BufferDict(nn.Module):
    """A dict adapter → buffer, as `nn.ParameterDict` is for parameters: `lora_velora_embed.<adapter>`."""

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._buffers

    def __getitem__(self, adapter: str) -> Tensor:
        found = self._buffers[adapter]
        assert found is not None
        return found

    def __setitem__(self, adapter: str, value: Tensor) -> None:
        self.register_buffer(adapter, value)

    def __delitem__(self, adapter: str) -> None:
        del self._buffers[adapter]


def holder_of(layer: nn.Module, name: str, kind: type[nn.Module]) -> nn.Module:
    """Return the submodule `name` of a layer, which stores a variant's tensors for each adapter; it is created as a `kind` at first use."""
    found = layer._modules.get(name)
    if found is None:
        found = kind()
        layer.add_module(name, found)
    return found
