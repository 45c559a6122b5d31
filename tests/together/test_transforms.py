"""What looks into the operations of a call: right, and the model is as before afterwards."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from peft_core import get_peft_model
from peft_core.testing import tiny
from peft_core.testing.changes import hidden_tensors
from peft_core.testing.helpers import randomise
from peft_loha import LoHaConfig
from peft_lora import LoraConfig
from peft_prompt import PrefixTuningConfig, PromptTuningConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning"),  # of torch's own jvp and jacfwd
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning"),  # newer transformers call it otherwise
]
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])
TARGETS = ["q_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "dora": lambda: LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM", use_dora=True),
    "loha": lambda: LoHaConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
LAYERS = ("lora", "dora", "loha")


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A model that has been called; whatever a test does, it computes the same afterwards, with gradients and without."""
    yield from checked(request.param)


@pytest.fixture(params=LAYERS)
def layered(request: pytest.FixtureRequest) -> Iterator[Any]:
    """As `model`, of the methods that wrap layers."""
    yield from checked(request.param)


def checked(name: str) -> Iterator[Any]:
    torch.manual_seed(0)
    made: Any = get_peft_model(tiny("llama"), CONFIGS[name]())
    randomise(made, "default", 1)
    made.eval()
    expected, grads = logits(made), gradients(made)
    yield made
    assert not hidden_tensors(made)
    torch.testing.assert_close(logits(made), expected)
    for found, before in zip(gradients(made), grads, strict=True):
        torch.testing.assert_close(found, before, atol=1e-5, rtol=1e-4)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    assert not isinstance(found, FakeTensor)
    return found


def gradients(model: Any) -> list[Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert found
    model.zero_grad()
    return found


class Only(nn.Module):
    """Gives ids to a model and returns its logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.inner(input_ids=ids, use_cache=False).logits
        return found


class Block(nn.Module):
    """Two adapted linear layers with something bent between: what transforms of torch.func are tried on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x)))
        return found


def block(name: str) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Return a small adapted net that has been called, and the same function without adapters: W' written into plain layers."""
    torch.manual_seed(0)
    config = {"lora": LoraConfig(r=2), "dora": LoraConfig(r=2, use_dora=True), "loha": LoHaConfig(r=2)}[name]
    config.target_modules = {"first", "second"}
    net: Any = get_peft_model(Block(), config).double().eval()
    randomise(net, "default", 1)
    with torch.no_grad():
        net(torch.randn(2, 4, dtype=torch.float64))
    merged = copy.deepcopy(net).merge_and_unload()
    return net, merged


blocks = pytest.mark.parametrize("name", LAYERS)
V = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("grad", [False, True])
def test_export(layered: Any, grad: bool) -> None:
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Only(layered), (IDS,))
        found = program.module()(IDS)
    torch.testing.assert_close(found, logits(layered), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("grad", [False, True])
def test_compile(model: Any, backend: str, grad: bool) -> None:
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        found = torch.compile(Only(model), backend=backend)(IDS)
    torch.testing.assert_close(found, logits(model), atol=1e-5, rtol=1e-4)


@blocks
def test_trace(name: str) -> None:
    net, _ = block(name)
    net.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, V, check_trace=False)
    torch.testing.assert_close(traced(V), net(V))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    if name != "dora":  # its norm is computed where the trace can't follow, in rows that cancel
        torch.testing.assert_close(traced(V), net(V))


def test_fake_tensors(model: Any) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), mode:
        found = model(input_ids=mode.from_tensor(IDS)).logits
    assert isinstance(found, FakeTensor)
    assert found.shape[0] == 2


@blocks
def test_make_fx(name: str) -> None:
    net, _ = block(name)
    net.requires_grad_(False)
    graph = make_fx(net)(V)
    torch.testing.assert_close(graph(V), net(V))


@blocks
def test_vmap(name: str) -> None:
    net, merged = block(name)
    torch.testing.assert_close(torch.vmap(net)(V), merged(V))
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(net)(V), merged(V))


@blocks
def test_vmap_over_parameters(name: str) -> None:
    net, _ = block(name)
    parameters = {key: p.detach() for key, p in net.named_parameters()}
    stacked = {key: torch.stack([p, p * 0.5]) for key, p in parameters.items()}
    found = torch.vmap(lambda values: torch.func.functional_call(net, values, (V,)))(stacked)
    torch.testing.assert_close(found[0], net(V))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(found[1], net(V))


@blocks
def test_forward_mode(name: str) -> None:
    net, merged = block(name)
    tangent = torch.randn(V.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for function in (torch.func.jvp, torch.autograd.functional.jvp):
        for found, expected in zip(function(net, (V,), (tangent,)), function(merged, (V,), (tangent,)), strict=True):
            torch.testing.assert_close(found, expected)


@blocks
def test_jacobians(name: str) -> None:
    net, merged = block(name)
    for function in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(function(net)(V[0]), function(merged)(V[0]))
    torch.testing.assert_close(torch.func.grad(lambda x: net(x).sum())(V), torch.func.grad(lambda x: merged(x).sum())(V))


@blocks
def test_double_backward(name: str) -> None:
    net, merged = block(name)
    found = []
    for function in (net, merged):
        x = V.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found)


# not DoRA: its norm is a constant in the first derivative, so that differences of it see more than the second one does
@pytest.mark.parametrize("name", ["lora", "loha"])
def test_second_derivatives_of_parameters(name: str) -> None:
    net, _ = block(name)
    parameters = [p for p in net.parameters() if p.requires_grad]
    values = [p.detach().clone() for p in parameters]
    directions = [torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(6)) for p in parameters]

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad(net(V).square().sum(), parameters, create_graph=True))

    product = torch.autograd.grad(sum((g * d).sum() for g, d in zip(gradient(), directions, strict=True)), parameters, allow_unused=True)
    step, differences = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, value, direction in zip(parameters, values, directions, strict=True):
                p.copy_(value + sign * step * direction)
        differences.append([g.detach() for g in gradient()])
    for found, plus, minus in zip(product, *differences, strict=True):
        torch.testing.assert_close(found, (plus - minus) / (2 * step), atol=1e-5, rtol=1e-4)


def test_the_output_is_linear_in_the_magnitude_of_dora() -> None:
    torch.manual_seed(0)
    net: Any = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, use_dora=True, target_modules=["0"])).double()
    randomise(net, "default", 1)
    m = net.get_base_model()[0].lora_magnitude_vector["default"].weight
    (first,) = torch.autograd.grad(net(V).sum(), m, create_graph=True)
    second = torch.autograd.grad(first.sum(), m, allow_unused=True)[0] if first.requires_grad else None
    assert second is None or float(second.abs().max()) < 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(layered: Any, reentrant: bool) -> None:
    expected = gradients(layered)
    layered.train()
    layered.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layered.enable_input_require_grads()
    found = gradients(layered)
    layered.gradient_checkpointing_disable()
    layered.eval()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_autocast_around_one_half(layered: Any, where: str) -> None:
    expected = gradients(layered)
    layered.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "forward"):
        loss = layered(input_ids=IDS, labels=IDS).loss
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "backward"):
        loss.backward()
    found = [p.grad.clone() for p in layered.parameters() if p.requires_grad and p.grad is not None]
    layered.zero_grad()
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.1


def test_saved_tensors_hooks(layered: Any) -> None:
    expected = gradients(layered)
    layered.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        loss = layered(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = [p.grad.clone() for p in layered.parameters() if p.requires_grad and p.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@blocks
def test_replicas(name: str) -> None:
    """What `nn.DataParallel` computes with: modules whose parameters are plain tensors of their own."""
    net, _ = block(name)
    twin = copy.copy(net)

    def replica(module: nn.Module) -> Any:
        copied = module._replicate_for_data_parallel()  # type: ignore[operator]
        for key, child in module._modules.items():
            copied._modules[key] = None if child is None else replica(child)
        for key, parameter in module._parameters.items():
            if parameter is None:
                copied._parameters[key] = None
            else:
                tensor = parameter * 0.5
                if isinstance(module, nn.ParameterDict):
                    copied._parameters[key] = tensor
                else:
                    setattr(copied, key, tensor)
        return copied

    other = replica(net)
    found = other(V)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(found, net(V))
