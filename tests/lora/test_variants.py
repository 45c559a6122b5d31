"""BD-LoRA, KaSA, VeLoRA, MonteCLoRA and QALoRA against slow references in float64, written from the formulas."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_core import (
    ConfigError,
    ModelError,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft_lora import (
    BdLoraConfig,
    KasaConfig,
    LoraConfig,
    LoraLayer,
    MontecloraConfig,
    VeloraConfig,
    convert_to_lora,
    kasa_loss,
    merged_zero_points,
    monteclora_loss,
    qalora_from_peer,
)


class Two(nn.Module):
    """Two Linears; `down` has 12 inputs and 8 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(12, 8)
        self.up = nn.Linear(8, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.up(torch.tanh(self.down(x)))
        return found


def base(dtype: torch.dtype = torch.float64) -> Two:
    torch.manual_seed(0)
    return Two().to(dtype).eval()


def made(dtype: torch.dtype = torch.float64, *, seed: int = 1, name: str = "default", **fields: Any) -> PeftModel:
    """Return a model in eval mode whose adapter has random weights and a scaling of 3/4."""
    model = base(dtype)
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 3, "target_modules": ["down", "up"], "init_lora_weights": False, **fields}
    return get_peft_model(model, LoraConfig(**settings), name).eval()


def layer_of(model: nn.Module, which: str = "down") -> LoraLayer:
    found = next(module for name, module in model.named_modules() if name.endswith(which) and isinstance(module, LoraLayer))
    return found


def inputs(dtype: torch.dtype = torch.float64, rows: int = 5, features: int = 12) -> Tensor:
    return torch.randn(2, rows, features, dtype=dtype, generator=torch.Generator().manual_seed(2))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


BLOCKS = {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["up"], "nblocks": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "bdlora": {"use_bdlora": BLOCKS},
    "kasa": {"kasa_config": {}},
    "velora": {"velora_config": {"num_groups": 5}},
    "monteclora": {"monteclora_config": {"num_samples": 3}},
    "qalora": {"use_qalora": True, "qalora_group_size": 4},
    "alora": {"alora_invocation_tokens": [1]},
    "dora": {"use_dora": True},
    "arrow": {"arrow_config": {}},
}
PRODUCTS = ("bdlora", "kasa", "velora", "monteclora", "qalora")


def reference(layer: LoraLayer, kind: str) -> Tensor:
    """Return ΔW (out, in), entry by entry from what is stored."""
    out, inp = layer.matrix_shape
    a, b = (factor.detach() for factor in layer.factors("default"))
    r = layer.r["default"]
    delta = torch.zeros(out, inp, dtype=torch.float64)
    for o, i in itertools.product(range(out), range(inp)):
        for k in range(r):
            left, right = b[o], a[k]
            if kind == "bdlora" and a.shape[1] != inp:  # k belongs to the block of inputs of its rows
                block = k // (r // 2)
                value = right[i - block * inp // 2] if i // (inp // 2) == block else 0.0
                delta[o, i] += left[k] * value
            elif kind == "bdlora":  # o belongs to the block of ranks of its rows
                block = o // (out // 2)
                value = left[k - block * r // 2] if k // (r // 2) == block else 0.0
                delta[o, i] += value * right[i]
            elif kind == "qalora":
                delta[o, i] += left[k] * right[i // 4]
            elif kind == "kasa":
                delta[o, i] += left[k] * layer.lora_diag["default"].detach()[k] * right[i]
            else:
                delta[o, i] += left[k] * right[i]
    return 3 / 4 * delta


# ---- what holds for all that are products ------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_forward_is_the_formula(kind: str, bias: bool) -> None:
    model = made(lora_bias=bias, **VARIANTS[kind])
    for which, features in (("down", 12), ("up", 8)):
        layer = layer_of(model, which)
        x = inputs(features=features)
        expected = layer.get_base_layer()(x) + x @ reference(layer, kind).T
        if bias:
            expected = expected + 3 / 4 * layer.lora_B["default"].bias
        close(layer(x), expected)
        with torch.no_grad():
            close(layer(x), expected)
            close(layer(x[:1, :1]), expected[:1, :1])  # one token, as in decoding


@pytest.mark.parametrize("kind", PRODUCTS)
def test_delta_merge_and_conversion_are_those_of_the_forward(kind: str) -> None:
    model = made(**VARIANTS[kind])
    x = inputs()
    expected = model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for which in ("down", "up"):
        close(layer_of(model, which).get_delta_weight("default"), reference(layer_of(model, which), kind))
    model.merge_adapter(safe_merge=True)
    close(model(x), expected, 1e-11)
    model.unmerge_adapter()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    close(copy.deepcopy(model).merge_and_unload()(x), expected, 1e-11)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_conversion_to_lora_computes_the_same(kind: str) -> None:
    # KaSA's plain LoRA must take out of the whole base what KaSA had taken out of it: twice the rank
    model = made(torch.float32, **{"r": 2, **VARIANTS[kind]} if kind == "kasa" else VARIANTS[kind])
    config, tensors = convert_to_lora(model, rank=4)
    plain = get_peft_model(base(torch.float32), config)
    set_peft_model_state_dict(plain, tensors, strict=True)
    close(plain.eval()(inputs(torch.float32)), model(inputs(torch.float32)), 1e-5)


@pytest.mark.parametrize("kind", ["bdlora", "kasa", "qalora"])
def test_gradients_are_those_of_the_formula(kind: str) -> None:
    model = made(**VARIANTS[kind]).train()
    layer = layer_of(model)
    x = inputs().requires_grad_()
    (layer(x) ** 2).sum().backward()
    for value in (x, *layer.parameters_of("default").values()):
        gradient = value.grad
        assert gradient is not None
        flat, numbers = value.detach().view(-1), gradient.reshape(-1)
        for place in range(0, flat.numel(), 7):  # central differences
            with torch.no_grad():
                kept = flat[place].item()
                sides = []
                for step in (1e-5, -1e-5):
                    flat[place] = kept + step
                    sides.append(float((layer(x) ** 2).sum()))
                flat[place] = kept
            assert math.isclose((sides[0] - sides[1]) / 2e-5, float(numbers[place]), rel_tol=1e-5, abs_tol=1e-6)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_what_is_kept_without_gradients_follows_the_weights(kind: str) -> None:
    model = made(**VARIANTS[kind])
    layer = layer_of(model)
    x = inputs()
    with torch.no_grad():
        plain = layer.get_base_layer()(x)
        for parameter in layer.parameters_of("default").values():
            layer(x)
            parameter.mul_(1.5)
            changed = layer(x)
            close(changed - plain, x @ reference(layer, kind).T)
        layer.set_scale("default", 2.0)
        doubled = layer(x)
    close(doubled - plain, 2 * (changed - plain))


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(VARIANTS, 2)))
def test_an_adapter_has_one_variant(one: str, other: str) -> None:
    with pytest.raises(ConfigError, match="several variants"):
        made(**VARIANTS[one], **VARIANTS[other])


@pytest.mark.parametrize("kind", ["bdlora", "kasa", "qalora"])
def test_computed_starts_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="init_lora_weights='pissa' does not work with"):
        made(**{**VARIANTS[kind], "init_lora_weights": "pissa"})


def test_settings_may_be_dicts_and_typos_are_named() -> None:
    assert LoraConfig(kasa_config={"beta": 2.0}).kasa_config == KasaConfig(beta=2.0)
    with pytest.raises(ConfigError, match=r"kasa_config has no field 'bet'.*'beta'"):
        LoraConfig(kasa_config={"bet": 2.0})
    with pytest.raises(ConfigError, match=r"use_bdlora=True is a bool; give BdLoraConfig"):
        LoraConfig(use_bdlora=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="alora_invocation_tokens is empty"):
        LoraConfig(alora_invocation_tokens=[])


# ---- BD-LoRA -----------------------------------------------------------------------------------------------------------
def test_bdlora_stores_blocks_one_under_the_other() -> None:
    shapes = {key.removeprefix("base_model.model."): tuple(value.shape) for key, value in get_peft_model_state_dict(made(use_bdlora=BLOCKS)).items()}
    assert shapes == {"down.lora_A.weight": (4, 6), "down.lora_B.weight": (8, 4), "up.lora_A.weight": (4, 8), "up.lora_B.weight": (12, 2)}


def test_bdlora_blocks_of_a_are_uniform_and_b_is_zero() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(400, 4)), LoraConfig(r=8, target_modules=["0"], use_bdlora=BdLoraConfig(["0"], [], 4)))
    a, b = layer_of(model, "0").factors("default")
    bound = math.sqrt(6 * 4 / 400)
    assert a.abs().max() <= bound
    assert math.isclose(float(a.detach().std()), bound / math.sqrt(3), rel_tol=0.1)
    assert not b.any()


def test_bdlora_modules_in_both_or_neither_list() -> None:
    with pytest.raises(ConfigError, match=r"both lists of BD-LoRA name 'down'"):
        made(use_bdlora=BdLoraConfig(["down"], ["dow", "up"], 2))
    with pytest.raises(ConfigError, match=r"'up' is in neither list.*match_strict=False"):
        made(use_bdlora=BdLoraConfig(["down"], [], 2))
    model = made(use_bdlora=BdLoraConfig(["down"], None, 2, match_strict=False))
    assert [tuple(factor.shape) for factor in layer_of(model, "up").factors("default")] == [(4, 8), (12, 4)]


@pytest.mark.parametrize(("blocks", "size"), [(5, "in=12"), (3, "r=4")])
def test_bdlora_blocks_must_fit(blocks: int, size: str) -> None:
    model = base()
    with pytest.raises(ConfigError, match=f"{size} of 'down' is no multiple of nblocks={blocks}"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["down"], use_bdlora=BdLoraConfig(["down"], [], blocks)))
    assert type(model.down) is nn.Linear


def test_bdlora_works_on_transposed_linears() -> None:
    from transformers.pytorch_utils import Conv1D

    model = get_peft_model(
        nn.Sequential(Conv1D(8, 12)).double().eval(),
        LoraConfig(r=4, lora_alpha=3, target_modules=["0"], fan_in_fan_out=True, init_lora_weights=False, use_bdlora=BdLoraConfig(["0"], [], 2)),
    )
    layer, x = layer_of(model, "0"), inputs()
    close(layer(x), layer.get_base_layer()(x) + x @ reference(layer, "bdlora").T)
    close(layer.get_delta_weight("default"), reference(layer, "bdlora").T)


# ---- KaSA --------------------------------------------------------------------------------------------------------------
def truncated(weight: Tensor, r: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight)
    total = torch.zeros_like(weight)
    for i in range(min(weight.shape) - r):
        total += s[i] * torch.outer(u[:, i], vh[i])
    return total


def test_kasa_takes_out_the_smallest_components_while_the_adapter_exists() -> None:
    original = base()
    model = made(kasa_config=KasaConfig())
    for which in ("down", "up"):
        close(layer_of(model, which).weight, truncated(getattr(original, which).weight, 4))
    x = inputs()
    with model.disable_adapter():
        expected = copy.deepcopy(original)
        expected.down.weight.data, expected.up.weight.data = truncated(original.down.weight, 4), truncated(original.up.weight, 4)
        close(model(x), expected(x))
    unloaded = model.unload()
    assert all(torch.equal(value, original.state_dict()[key]) for key, value in unloaded.state_dict().items())


def test_kasa_adapters_share_the_truncated_base() -> None:
    original = base()
    weight = original.down.weight
    model = made(kasa_config={}, r=2, name="small")
    model.add_adapter("large", LoraConfig(r=4, target_modules=["down", "up"], kasa_config={}))
    layer = layer_of(model)
    close(layer.weight, truncated(weight, 4))
    before = layer.weight.clone()
    model.add_adapter("again", LoraConfig(r=4, target_modules=["down", "up"], kasa_config={}))
    assert torch.equal(layer.weight, before)
    model.merge_adapter("again")
    model.delete_adapter("large")  # its components stay out for the other one of this rank, even while that is merged
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before)
    model.delete_adapter("again")
    close(layer.weight, truncated(weight, 2))
    model.unload()
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("first", [True, False])
def test_kasa_the_first_of_two_ranks_can_go(first: bool) -> None:
    weight = base().down.weight
    model = made(kasa_config={}, r=4 if first else 2, name="one")
    model.add_adapter("two", LoraConfig(r=2 if first else 4, target_modules=["down", "up"], kasa_config={}))
    layer = layer_of(model)
    model.set_adapter("two")
    model.delete_adapter("one")
    close(layer.weight, truncated(weight, 2 if first else 4))
    model.unload()
    assert torch.equal(layer.weight, weight)


def test_kasa_does_not_mix_with_others() -> None:
    plain, kasa = LoraConfig(r=2, target_modules=["up"]), LoraConfig(r=2, target_modules=["down"], kasa_config={})
    for first, second in ((plain, kasa), (kasa, plain)):
        model = get_peft_model(base(), copy.deepcopy(first))
        with pytest.raises(ConfigError, match="KaSA truncates the base weights for all adapters"):
            model.add_adapter("second", copy.deepcopy(second))
        assert list(model.peft_config) == ["default"]


def test_kasa_needs_a_component_that_stays() -> None:
    with pytest.raises(ConfigError, match=r"smaller than the 8 singular components of 'down' \(8 × 12\), not 8"):
        made(kasa_config={}, r=8)


def test_kasa_loss_is_the_formula() -> None:
    model = made(kasa_config=KasaConfig(beta=0.3, gamma=0.7))
    expected = 0.0
    for which in ("down", "up"):
        layer = layer_of(model, which)
        a, b = (factor.detach() for factor in layer.factors("default"))
        one = torch.eye(4, dtype=torch.float64)
        expected += 0.3 * float((layer.lora_diag["default"].detach() ** 2).sum())
        expected += 0.7 * float(((b.T @ b - one) ** 2).sum().sqrt() + ((a @ a.T - one) ** 2).sum().sqrt())
    for found in (kasa_loss(model), model.base_model._get_kasa_loss(), kasa_loss(model, "default"), kasa_loss(model, ["default"])):
        assert math.isclose(float(found.detach()), expected, rel_tol=1e-5)
    kasa_loss(model).backward()
    assert all(parameter.grad is not None for parameter in layer_of(model).parameters_of("default").values())
    with pytest.raises(LookupError, match="'defualt' not found"):
        kasa_loss(model, "defualt")
    assert float(kasa_loss(made())) == 0


def test_kasa_loads_what_it_saved(tmp_path: Any) -> None:
    model = made(torch.float32, kasa_config={})
    model.save_pretrained(tmp_path)
    for low_cpu in (False, True):
        loaded = PeftModel.from_pretrained(base(torch.float32), tmp_path, low_cpu_mem_usage=low_cpu)
        assert torch.equal(loaded(inputs(torch.float32)), model(inputs(torch.float32)))


def test_kasa_on_a_base_without_weights_says_so_when_used() -> None:
    model = base(torch.float32)
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["down"], kasa_config={}), model.to("meta"))
    model = model.to_empty(device="cpu")
    with pytest.raises(ModelError, match="it is not truncated"):
        model(inputs(torch.float32))


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
    found = torch.stack([layer.variants["default"].noise(layer.factors("default")[0]) for _ in range(4000)])
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
    noisy = a + layer.variants["default"].noise(a)
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


# ---- QALoRA ------------------------------------------------------------------------------------------------------------
def test_qalora_start() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4000, 4)), LoraConfig(r=8, target_modules=["0"], use_qalora=True, qalora_group_size=40))
    a, b = layer_of(model, "0").factors("default")
    assert a.shape == (8, 100)
    assert a.abs().max() <= 0.1
    assert math.isclose(float(a.detach().std()), 0.1 / math.sqrt(3), rel_tol=0.1)
    assert not b.any()


def test_qalora_groups_must_fit() -> None:
    with pytest.raises(ConfigError, match="'down' has 12 inputs, which is no multiple of qalora_group_size=5"):
        made(use_qalora=True, qalora_group_size=5)


def test_qalora_files_of_the_peer_are_rescaled() -> None:
    model = made(use_qalora=True, qalora_group_size=4)
    layer, x = layer_of(model), inputs()
    a, b = (factor.detach().clone() for factor in layer.factors("default"))
    means = x.view(2, 5, 3, 4).mean(-1)
    peers = layer.get_base_layer()(x) + 3 / 4 * (means * (12 / 4)) @ a.T @ b.T
    state = qalora_from_peer(get_peft_model_state_dict(model), 4)
    set_peft_model_state_dict(model, state, strict=True)
    close(layer(x), peers)


@pytest.mark.parametrize("group", [2, 4])
def test_qalora_fits_into_zero_points(group: int) -> None:
    model = made(use_qalora=True, qalora_group_size=4)
    delta = layer_of(model).get_delta_weight("default").detach()
    codes = torch.randint(0, 16, (8, 12)).double()
    scales, zeros = torch.rand(8, 12 // group).double() + 0.1, torch.randint(0, 16, (8, 12 // group)).double()

    def dequantised(zeros: Tensor) -> Tensor:
        return scales.repeat_interleave(group, 1) * (codes - zeros.repeat_interleave(group, 1))

    close(dequantised(merged_zero_points(zeros, scales, delta)), dequantised(zeros) + delta)


def test_qalora_zero_points_of_other_groups_are_refused() -> None:
    delta = layer_of(made(use_qalora=True, qalora_group_size=4)).get_delta_weight("default").detach()
    with pytest.raises(ConfigError, match="differs within the 6 inputs"):
        merged_zero_points(torch.zeros(8, 2), torch.ones(8, 2), delta)
    with pytest.raises(ConfigError, match="are no groups of"):
        merged_zero_points(torch.zeros(8, 5), torch.ones(8, 5), delta)
