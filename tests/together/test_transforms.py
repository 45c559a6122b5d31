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
from torch.nn.attention import SDPBackend, sdpa_kernel

from peft_core import ModelError, RoutingError, get_peft_model
from peft_core.testing import tiny
from peft_core.testing.changes import hidden_tensors
from peft_core.testing.helpers import in_one_precision, randomise
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
def test_export(model: Any, grad: bool) -> None:
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Only(model), (IDS,))
        found = program.module()(IDS)
    torch.testing.assert_close(found, logits(model), atol=1e-5, rtol=1e-4)


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
def test_checkpointing(model: Any, reentrant: bool) -> None:
    expected = gradients(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model)
    model.gradient_checkpointing_disable()
    model.eval()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_autocast_around_one_half(model: Any, where: str) -> None:
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "forward"):
        loss = model(input_ids=IDS, labels=IDS).loss
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "backward"):
        loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    model.zero_grad()
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.1


def test_saved_tensors_hooks(model: Any) -> None:
    expected = gradients(model)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def replicate_all(model: nn.Module) -> None:
    for module in model.modules():
        module._replicate_for_data_parallel()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ],
    ids=["rows of a tied embedding", "tied adapters"],
)
def test_replicas_of_layers_that_use_the_weights_of_others_are_refused(fields: dict[str, Any]) -> None:
    base: Any = tiny("gpt2") if "q_proj" not in fields["target_modules"] else tiny("llama")
    base.lm_head.weight = base.get_input_embeddings().weight
    if "embed_tokens" in fields["target_modules"]:
        fields = {**fields, "target_modules": ["wte", "lm_head"]}
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **fields))
    with pytest.raises(ModelError, match="replica"):
        replicate_all(model)


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


# ---- the same for virtual tokens: functions of an adapter's own parameters ------------------------------------------------------
TOKENS = ("prompt", "prefix")
tokens = pytest.mark.parametrize("name", TOKENS)


def of_parameters(name: str) -> tuple[Any, dict[str, Tensor], Callable[[dict[str, Tensor]], Tensor]]:
    """Return a model in float64, its trained parameters by name, and the logits as a function of them."""
    torch.manual_seed(0)
    made: Any = get_peft_model(in_one_precision(tiny("llama")), CONFIGS[name]()).double().eval()
    randomise(made, "default", 1)
    net = Only(made)
    values = {key: p.detach().clone() for key, p in net.named_parameters() if p.requires_grad}

    def function(given: dict[str, Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no forward mode, and no second derivative
            found: Tensor = torch.func.functional_call(net, given, (IDS,))
        return found

    return made, values, function


def differences(function: Callable[[dict[str, Tensor]], Tensor], values: dict[str, Tensor], tangents: dict[str, Tensor]) -> Tensor:
    """Return the derivative along `tangents` by central differences."""
    step = 1e-6
    ends = [function({key: value + sign * step * tangents[key] for key, value in values.items()}) for sign in (1, -1)]
    return (ends[0] - ends[1]).detach() / (2 * step)


@tokens
def test_transforms_of_virtual_tokens(name: str) -> None:
    made, values, function = of_parameters(name)
    tangents = {key: torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(2)) for key, value in values.items()}
    expected = differences(function, values, tangents)
    _, along = torch.func.jvp(function, (values,), (tangents,))
    torch.testing.assert_close(along, expected, atol=1e-6, rtol=1e-5)
    slopes = torch.func.grad(lambda given: function(given).sum())(values)
    torch.testing.assert_close(sum((slopes[key] * tangents[key]).sum() for key in values), expected.sum(), atol=1e-5, rtol=1e-5)
    jacobian = torch.func.jacrev(lambda given: function(given)[0, -1, :5])(values)
    row = sum((jacobian[key].flatten(1) * tangents[key].flatten()).sum(1) for key in values)
    torch.testing.assert_close(row, expected[0, -1, :5], atol=1e-6, rtol=1e-5)
    stacked = {key: torch.stack([value, value * 0.5]) for key, value in values.items()}
    mapped = torch.vmap(function)(stacked)
    torch.testing.assert_close(mapped[1], function({key: value * 0.5 for key, value in values.items()}))
    torch.testing.assert_close(mapped[0], Only(made)(IDS))


@tokens
def test_second_derivatives_of_virtual_tokens(name: str) -> None:
    _, values, function = of_parameters(name)
    tangents = {key: torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(3)) for key, value in values.items()}

    def slope(given: dict[str, Tensor]) -> Tensor:
        leaves = {key: value.clone().requires_grad_() for key, value in given.items()} if not next(iter(given.values())).requires_grad else given
        found = torch.autograd.grad(function(leaves).square().sum(), list(leaves.values()), create_graph=True)
        return sum((g * tangents[key]).sum() for g, key in zip(found, leaves, strict=True))  # type: ignore[return-value]

    leaves = {key: value.clone().requires_grad_() for key, value in values.items()}
    second = torch.autograd.grad(slope(leaves), list(leaves.values()))
    found = sum((g * tangents[key]).sum() for g, key in zip(second, leaves, strict=True))
    torch.testing.assert_close(found, differences(slope, values, tangents), atol=1e-4, rtol=1e-5)


@tokens
def test_graphs_of_virtual_tokens(name: str) -> None:
    made, _, _ = of_parameters(name)
    made.requires_grad_(False)

    def net(ids: Tensor) -> Tensor:  # transformers looks into masks and position_ids, unless they are fake
        found: Tensor = made(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return found

    expected = net(IDS)
    torch.testing.assert_close(make_fx(net, tracing_mode="fake", _allow_non_fake_inputs=True)(IDS)(IDS), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, IDS, check_trace=False)
    torch.testing.assert_close(traced(IDS), expected)
    torch.testing.assert_close(net(IDS), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_while_adapters_are_disabled(model: Any, reentrant: bool) -> None:
    """Layers run again in the backward pass, when the block that disabled the adapters has ended."""
    base = copy.deepcopy(tiny("llama"))
    embeddings = base.get_input_embeddings()(IDS).detach()  # type: ignore[operator]
    expected = embeddings.clone().requires_grad_()
    base(inputs_embeds=expected).logits.square().sum().backward()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = embeddings.clone().requires_grad_()
    with model.disable_adapter():
        total = model(inputs_embeds=found, use_cache=False).logits.square().sum()
    total.backward()
    model.gradient_checkpointing_disable()
    model.eval()
    torch.testing.assert_close(found.grad, expected.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_while_adapters_are_switched_before_the_backward_pass(model: Any, reentrant: bool) -> None:
    expected = gradients(model)
    model.add_adapter("other", model.peft_config["default"])
    randomise(model, "other", 7)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss = model(input_ids=IDS, labels=IDS).loss
    model.set_adapter("other")
    model.set_requires_grad("default", True)
    loss.backward()
    found = [p.grad.clone() for name, p in model.named_parameters() if p.grad is not None]
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model.set_adapter("default")
    model.delete_adapter("other")
    model.eval()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_checkpointing_with_layers_of_their_own_choice() -> None:
    """What single layers followed is not known any more after a switch: an error, and right without one."""
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny("llama"), CONFIGS["lora"]())
    model.add_adapter("other", CONFIGS["lora"]())
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    layer.set_adapter("other")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for switch in (lambda: model.set_adapter("other"), lambda: layer.set_adapter("default"), model.enable_adapter_layers):
        layer.set_adapter("other")
        loss = model(input_ids=IDS, labels=IDS).loss
        switch()
        with pytest.raises(RoutingError, match="switched"):
            loss.backward()
        model.set_adapter("default")
        layer.set_adapter("other")
    loss = model(input_ids=IDS, labels=IDS).loss
    with model.disable_adapter(), pytest.raises(RoutingError, match="switched"):
        loss.backward()
    model.set_adapter("default")
    loss = model(input_ids=IDS, labels=IDS).loss
    layer.set_adapter("other")  # in the forward pass all layers followed the model: what they computed is known
    loss.backward()
