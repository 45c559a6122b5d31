"""VeLoRA and MonteCLoRA, which act in training alone, against slow references in float64, written from the formulas."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.variants_net import base, close, inputs, layer_of, made
from peft_core import PeftModel, get_peft_model, get_peft_model_state_dict
from peft_lora import LoraConfig, MontecloraConfig, VeloraConfig, monteclora_loss


# ---- VeLoRA ------------------------------------------------------------------------------------------------------------
def compressed(x: Tensor, v: Tensor, groups: int, scale: float) -> Tensor:
    """Return x̂ token by token and group by group."""
    width, features = v.shape[0], x.shape[-1]
    tokens = x.reshape(-1, features)
    found = torch.zeros(tokens.shape[0], groups * width, dtype=x.dtype)
    for t, g in itertools.product(range(tokens.shape[0]), range(groups)):
        part = torch.zeros(width, dtype=x.dtype)
        own = tokens[t, g * width : (g + 1) * width]
        part[: own.shape[0]] = own
        found[t, g * width : (g + 1) * width] = scale * (part @ v) * v
    return found[:, :features]


@pytest.mark.parametrize("groups", [1, 5, 7, 12])
@pytest.mark.parametrize("kind", ["random", "batch_average", "batch_average_once"])
def test_velora_gradient_of_a_is_that_of_the_projected_inputs(kind: str, groups: int) -> None:
    model = made(velora_config=VeloraConfig(num_groups=groups, scale=0.5, init_type=kind), lora_dropout=0.0).train()
    plain = made().train()
    layer = layer_of(model)
    assert layer.lora_velora_embed["default"].shape == (math.ceil(12 / groups),)
    with torch.no_grad():
        for mine, theirs in zip(layer.factors("default"), layer_of(plain).factors("default"), strict=True):
            theirs.copy_(mine)
    x, other = inputs().requires_grad_(), inputs().requires_grad_()
    g = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y, expected = layer(x), layer_of(plain)(other)
    close(y, expected)
    y.backward(g)
    expected.backward(g)
    a, b = layer.factors("default")
    close(b.grad, layer_of(plain).factors("default")[1].grad)
    close(x.grad, other.grad)
    v = layer.lora_velora_embed["default"]
    assert math.isclose(float(v.norm()), 1.0, rel_tol=1e-6)
    if kind != "random":
        width = v.shape[0]
        padded = torch.zeros(10, groups * width, dtype=torch.float64)
        padded[:, :12] = inputs().reshape(10, 12)
        mean = padded.view(10 * groups, width).mean(0)
        close(v, mean / mean.norm(), 1e-6)
    close(a.grad, 3 / 4 * (g.reshape(10, 8) @ b.detach()).T @ compressed(inputs(), v, groups, 0.5), 1e-10)


def test_velora_keeps_one_number_for_each_token_and_group() -> None:
    def kept(**fields: Any) -> int:
        model = get_peft_model(nn.Sequential(nn.Linear(256, 16)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **fields)).train()
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(100, 256))
        return sum(seen.values())

    assert kept(velora_config=VeloraConfig(num_groups=4)) < 100 * (4 + 2) * 4 + 10_000 < kept() - 50_000


def test_velora_direction_is_renewed_or_kept() -> None:
    for kind, renewed in (("batch_average", True), ("batch_average_once", False), ("random", False)):
        model = made(velora_config=VeloraConfig(num_groups=3, init_type=kind))
        vector = layer_of(model).lora_velora_embed["default"]
        assert bool(vector.any()) == (kind == "random")
        model(inputs())
        assert bool(vector.any()) == (kind == "random"), "evaluation must not touch it"
        model.train()(inputs())
        first = vector.clone()
        model(inputs() * torch.arange(12))
        assert torch.equal(first, vector) != renewed


def test_velora_without_a_mean_looks_along_the_diagonal() -> None:
    model = made(velora_config=VeloraConfig(num_groups=3)).train()
    layer_of(model)(torch.zeros(2, 12, dtype=torch.float64))
    close(layer_of(model).lora_velora_embed["default"], torch.full((4,), 0.5, dtype=torch.float64), 1e-7)


def test_velora_projects_the_dropped_inputs() -> None:
    model = made(velora_config=VeloraConfig(num_groups=3, init_type="random"), lora_dropout=0.5).train()
    layer = layer_of(model)
    torch.manual_seed(5)
    y = layer(inputs())
    torch.manual_seed(5)
    dropped = torch.dropout(inputs(), 0.5, True)
    a, b = layer.factors("default")
    close(y, layer.get_base_layer()(inputs()) + 3 / 4 * dropped @ a.T @ b.T)
    y.sum().backward()
    close(a.grad, 3 / 4 * (torch.ones(10, 8).double() @ b.detach()).T @ compressed(dropped, layer.lora_velora_embed["default"], 3, 1.0))


def test_velora_direction_is_in_the_file(tmp_path: Any) -> None:
    model = made(torch.float32, velora_config=VeloraConfig(num_groups=5)).train()
    model(inputs(torch.float32))
    state = get_peft_model_state_dict(model)
    assert state["base_model.model.down.lora_velora_embed"].shape == (3,)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(torch.float32), tmp_path)
    assert torch.equal(layer_of(loaded).lora_velora_embed["default"], layer_of(model).lora_velora_embed["default"])
    loaded.delete_adapter("default")
    assert not dict(loaded.named_buffers())


# ---- MonteCLoRA --------------------------------------------------------------------------------------------------------
def sampler_of(model: nn.Module, which: str = "down") -> Any:
    return layer_of(model, which).lora_monteclora_sampler["default"]


def test_monteclora_weights_and_covariance_are_the_formulas() -> None:
    from peft_lora.variants.monteclora import covariance, mixture_weights

    pi, z = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    alpha = [max(math.exp(p), 1e-6) for p in pi.tolist()]
    logs = [math.log(number) for number in alpha]
    inverse = sum(1 / number for number in alpha)
    raised = [
        math.exp(logs[n] - sum(logs) / 5 + math.sqrt(max(1 / alpha[n] * (1 - 2 / 5) + inverse / 25, 1e-6) + 1e-6) * float(z[n])) for n in range(5)
    ]
    close(mixture_weights(pi, z), torch.tensor([value / sum(raised) for value in raised], dtype=torch.float64))
    rho, x = torch.randn(3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    d = torch.diag(rho.exp())
    expected = torch.diagonal(d @ (x.T @ x) @ d)
    close(covariance(rho, x.square().sum(0)), expected)
    assert float(covariance(torch.full((2,), -20.0), torch.ones(2)).min()) == pytest.approx(1e-3)
    assert torch.autograd.gradcheck(mixture_weights, (pi.requires_grad_(), z))
    assert torch.autograd.gradcheck(covariance, (rho.requires_grad_(), x.square().sum(0)))


def test_monteclora_samples_have_the_variance_of_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(monteclora_config=MontecloraConfig(num_samples=3, sample_scaler=0.5))
    layer = layer_of(model)
    variances, weights = torch.tensor([0.5, 1.0, 2.0, 4.0]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    monkeypatch.setattr(type(sampler_of(model)), "sample", lambda self: (variances, weights))
    torch.manual_seed(6)
    found = torch.stack([layer.variants["default"].noise() for _ in range(4000)])
    epsilon = 0.5 * torch.randn(4000, 3, 12, 4, dtype=torch.float64) * variances.sqrt()  # all N samples, as the formula has them
    slow = torch.einsum("n,tnkr->trk", weights, epsilon)
    torch.testing.assert_close(found.var(0), slow.var(0), rtol=0.15, atol=0)
    torch.testing.assert_close(found.var((0, 2)), 0.25 * (weights**2).sum() * variances, rtol=0.05, atol=0)
    assert found.mean((0, 2)).abs().max() < 0.02


def test_monteclora_draws_wishart_diagonals_and_keeps_the_last() -> None:
    sampler = sampler_of(made(monteclora_config={}))
    draws = []
    for _ in range(4000):
        sampler.sample()
        draws.append(sampler.draw[0])
    chi2 = torch.stack(draws)
    torch.testing.assert_close(chi2.mean(0), torch.full((4,), 4.0).double(), rtol=0.05, atol=0)
    torch.testing.assert_close(chi2.var(0), torch.full((4,), 8.0).double(), rtol=0.15, atol=0)
    variances, weights = sampler.last()
    close(sampler.gaussian_var_prior, torch.diag(variances.detach()))
    close(sampler.expert_weights, weights.detach())


def test_monteclora_acts_in_training_only() -> None:
    model = made(monteclora_config=MontecloraConfig(sample_scaler=0.1))
    layer, x = layer_of(model), inputs()
    close(layer(x), layer(x), 0)
    model.train()
    torch.manual_seed(7)
    found = layer(x)
    torch.manual_seed(7)
    a, b = layer.factors("default")
    noisy = a + layer.variants["default"].noise()
    close(found, layer.get_base_layer()(x) + 3 / 4 * x @ noisy.T @ b.T)
    assert not torch.equal(layer(x), found)
    found.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters_of("default").values())


def test_monteclora_divergences() -> None:
    from peft_lora.variants.monteclora import dirichlet_divergence, wishart_divergence

    for alpha in (torch.tensor([0.3, 1.0, 2.5]), torch.tensor([200.0, 0.001, 40.0])):
        alpha = alpha.double()
        prior = torch.full_like(alpha, 0.1)
        expected = torch.distributions.kl_divergence(torch.distributions.Dirichlet(alpha), torch.distributions.Dirichlet(prior))
        close(dirichlet_divergence(alpha, 0.1), expected, 1e-9)
        assert float(dirichlet_divergence(alpha, 0.1)) > 0
    close(dirichlet_divergence(torch.full((3,), 0.1).double(), 0.1), torch.tensor(0.0).double())
    rho = torch.tensor([0.2, -0.4, 1.0]).double()
    d2 = [math.exp(2 * value) for value in rho.tolist()]
    expected = (-3 * sum(math.log(value) for value in d2) + 3 * sum(d2) - 9) / 2
    assert math.isclose(float(wishart_divergence(rho)), expected, rel_tol=1e-12)
    assert float(wishart_divergence(torch.zeros(3))) == 0


@pytest.mark.parametrize("entropy", [False, True])
def test_monteclora_loss_is_the_mean_over_layers(entropy: bool) -> None:
    model = made(monteclora_config=MontecloraConfig(num_samples=3, use_entropy=entropy, dirichlet_prior=0.2, kl_loss_weight=0.5)).train()
    model(inputs())
    expected = []
    for which in ("down", "up"):
        sampler = sampler_of(model, which)
        alpha = sampler.expert_weights_prior.detach().exp()
        kl = torch.distributions.kl_divergence(torch.distributions.Dirichlet(alpha), torch.distributions.Dirichlet(torch.full_like(alpha, 0.2)))
        d2, sigma = (2 * sampler.std_prior.detach()).exp(), torch.diagonal(sampler.gaussian_var_prior)
        kl = kl + (-4 * d2.log().sum() + 4 * d2.sum() - 16) / 2 + 3 / 2 * (sigma.sum() - sigma.log().sum() - 4)
        expected.append(0.5 * float(kl) + (float((sampler.expert_weights**2).sum()) if entropy else 0.0))
    for found in (monteclora_loss(model), model.base_model._get_monteclora_loss("default")):
        assert math.isclose(float(found.detach()), sum(expected) / 2, rel_tol=1e-9)
    monteclora_loss(model).backward()
    assert sampler_of(model).std_prior.grad.any()
    assert sampler_of(model).expert_weights_prior.grad.any()
    assert float(monteclora_loss(made())) == 0


def test_monteclora_needs_no_buffer_of_draws() -> None:
    model = made(monteclora_config=MontecloraConfig(num_samples=8, buffer_size=1000))
    assert sum(buffer.numel() for buffer in model.buffers()) == 2 * (16 + 8)
