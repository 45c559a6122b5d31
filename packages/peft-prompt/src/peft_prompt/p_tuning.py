"""P-tuning. Source: arXiv 2103.10385."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import BaseView, InitOptions, PeftWarning, Plan

from . import dimensions
from .config import PromptEncoderConfig, PromptEncoderReparameterizationType
from .encoders import INITIAL, TableEncoder
from .prompt_tuning import PromptTuner


class PromptEncoder(TableEncoder):
    """Virtual tokens (tokens, hidden), computed by a network from a table `embedding.weight` of that shape.

    MLP: `mlp_head`: Linear, ReLU, Linear, ReLU, Linear. LSTM: `lstm_head`, bidirectional along the tokens, then `mlp_head`: Linear, ReLU, Linear.
    Files: see `TableEncoder`.

    Args:
        config: type and sizes of the network.
        size: (num_transformer_submodules · num_virtual_tokens, hidden); a forward uses only the first num_virtual_tokens. None: read
            from the config.
        init_options: whether initial values are needed.
    """

    def __init__(self, config: PromptEncoderConfig, size: tuple[int, int] | None = None, init_options: InitOptions = INITIAL) -> None:
        size = dimensions.size(config, dimensions.of_config(config)) if size is None else size
        self.count = int(config.num_virtual_tokens or 0)
        hidden = int(config.encoder_hidden_size or size[1])
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            network = partial(_lstm, size[1], hidden, config.encoder_num_layers, config.encoder_dropout)
        else:
            network = partial(_mlp, size[1], hidden)
        super().__init__(size, network, size[1], config.inference_mode, init_options)

    def compute(self, weight: Tensor) -> Tensor:
        """Return the virtual tokens (tokens, hidden) from `weight`, the table that the network reads, of the same shape."""
        if "lstm_head" in self.parts:
            weight = self.get_submodule("lstm_head")(weight)
        found: Tensor = self.get_submodule("mlp_head")(weight)
        return found

    def tokens(self) -> Tensor:
        """Return the virtual tokens that a forward uses (num_virtual_tokens, hidden)."""
        table = self.table()
        return table if table.shape[0] == self.count else table[: self.count]

    def all_tokens(self) -> Tensor:
        """Return all virtual tokens, including those that no forward uses: (tokens of all submodules, hidden)."""
        return self.table()


class BidirectionalLSTM(nn.Module):
    """A bidirectional LSTM that works with `torch.compile`, which does not support `nn.LSTM`; parameters, initial values and results are the same.

    Args:
        width: width of the inputs.
        hidden: hidden width of each direction.
        layers: number of layers.
        dropout: dropout probability between the layers.
    """

    def __init__(self, width: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.hidden, self.layers, self.dropout = hidden, layers, dropout if layers > 1 else 0.0
        parameters = dict(nn.LSTM(width, hidden, num_layers=layers, bidirectional=True).named_parameters())
        self.names = tuple(parameters)
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return (time, 2·hidden) for one sequence (time, width)."""
        start = x.new_zeros(2 * self.layers, 1, self.hidden)
        weights = [getattr(self, name) for name in self.names]  # by name: sharding replaces the parameters by tensors during the forward
        # cuDNN's LSTM supports the backward pass only in training mode
        without_cudnn = x.is_cuda and not self.training and torch.is_grad_enabled()
        with torch.backends.cudnn.flags(enabled=False) if without_cudnn else contextlib.nullcontext(), _silence_contiguity_warning(x.is_cuda):
            found = torch.lstm(x.unsqueeze(0), (start, start), weights, True, self.layers, self.dropout, self.training, True, batch_first=True)
        return found[0].squeeze(0)


@contextlib.contextmanager
def _silence_contiguity_warning(cuda: bool) -> Iterator[None]:
    """Ignore cuDNN's warning that weights are not one contiguous chunk: compacting weights this small in each call is cheap."""
    if not cuda or torch.compiler.is_compiling():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        yield


def _mlp(width: int, hidden: int) -> dict[str, nn.Module]:
    return {"mlp_head": nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width))}


def _lstm(width: int, hidden: int, layers: int, dropout: float) -> dict[str, nn.Module]:
    lstm = BidirectionalLSTM(width, hidden, layers, dropout)
    head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
    return {"lstm_head": lstm, "mlp_head": head}


class PromptEncoderTuner(PromptTuner):
    """Prepends a prompt, computed by a network, to the rows that use the adapter."""

    def plan(self, base: BaseView, adapter: str, config: Any) -> Plan:
        """Plan a `PromptEncoder`, mounted beside the base.

        Raises:
            ConfigError, ModelError: the prompt's dimensions can't be read from the configs, or do not fit the base.
        """
        found = dimensions.resolve(base, config)
        mlp = config.encoder_reparameterization_type == PromptEncoderReparameterizationType.MLP
        if mlp and config.encoder_num_layers != 2 and not config.inference_mode:
            warnings.warn(
                f"encoder_num_layers={config.encoder_num_layers} has no effect: the MLP of p-tuning always has 2 hidden layers",
                PeftWarning,
                stacklevel=5,
            )
        resolved = {**found, "encoder_hidden_size": config.encoder_hidden_size or found["token_dim"]}
        return Plan(mounts={"prompt_encoder": partial(PromptEncoder, config, dimensions.size(config, found))}, resolved=resolved)
