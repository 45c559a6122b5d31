"""Initialisations that need no data, against slow float64 references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_core import ConfigError, MergeError, PeftModel, PeftWarning, get_peft_model
from peft_lora import LoftQConfig, LoraConfig
from peft_lora.initializers.loftq.decomposition import NF4, loftq_decomposition, rounded_to_int8, rounded_to_nf4
from peft_lora.initializers.matrices import svd
from support import Unchanged, bits


class Layers(nn.Module):
    """A Linear (8, 6), a Conv1D (6, 8), an Embedding (9, 6) and a convolution."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(9, 6)
        self.linear = nn.Linear(6, 8)
        self.transposed = Conv1D(6, 8)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape))
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.transposed(self.linear(self.conv(self.tokens(ids).transpose(1, 2)).transpose(1, 2)))


IDS = torch.tensor([[3, 1, 4], [1, 5, 8]])
EXACT = ["pissa", "pissa_niter_4", "olora", "orthogonal", "mica"]
MUTATING = ["pissa", "pissa_niter_4", "olora", "loftq"]


def config(init: Any, targets: Any = ("linear", "transposed"), **options: Any) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 6, **options}
    if init == "loftq":
        options.setdefault("loftq_config", LoftQConfig())
    return LoraConfig(target_modules=list(targets), init_lora_weights=init, **options)


def adapted(init: Any, targets: Any = ("linear", "transposed"), dtype: torch.dtype = torch.float32, how: Any = None, **options: Any) -> PeftModel:
    torch.manual_seed(5)
    return get_peft_model(Layers(dtype), config(init, targets, **options), **(how or {}))


def parts(model: PeftModel, name: str, original: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Return in float64: W of the untouched base, W of the base now, A, B as matrices, and s."""
    layer = getattr(model.get_base_model(), name)
    before = getattr(original or Layers(), name).weight.detach()
    now = layer.get_base_layer().weight.detach()
    a, b = layer.factors("default")
    matrix = layer.ops.matrix
    return matrix(before).double(), matrix(now).double(), a.detach().double(), b.detach().double(), layer.scaling["default"]


# ---- what A, B and the base become ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["linear", "transposed"])
def test_pissa_takes_the_principal_part(name: str) -> None:
    w, base, a, b, s = parts(adapted("pissa"), name)
    u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    principal = u[:, :4] * sigma[:4] @ vt[:4]
    torch.testing.assert_close(s * b @ a, principal, atol=3e-6, rtol=0)
    torch.testing.assert_close(base, w - principal, atol=3e-6, rtol=0)
    root = (sigma[:4] / s).sqrt()
    torch.testing.assert_close(a.abs(), (root[:, None] * vt[:4]).abs(), atol=3e-6, rtol=0)
    torch.testing.assert_close(b.abs(), (u[:, :4] * root).abs(), atol=3e-6, rtol=0)


def test_pissa_of_a_small_matrix_keeps_the_scaling_of_r() -> None:
    model = adapted("pissa", ["linear"], r=7, lora_alpha=14)
    w, base, a, b, s = parts(model, "linear")
    assert (a.shape, b.shape, s) == ((6, 6), (8, 6), 2.0)
    torch.testing.assert_close(s * b @ a, w, atol=1e-5, rtol=0)
    assert base.abs().max() < 1e-5


def test_randomised_pissa_is_as_good_as_the_exact_one_on_a_flat_spectrum() -> None:
    # methods.md 15.8: without oversampling the error is 0.17 here
    w = torch.randn(40, 60, generator=torch.Generator().manual_seed(3))
    exact = torch.linalg.svd(w, full_matrices=False)
    u, s, vt = svd(w, 4, 8)
    torch.testing.assert_close(s, exact[1][:4], atol=0, rtol=1e-2)
    best = exact[1][4:].square().sum().sqrt()
    assert torch.linalg.matrix_norm(w - u * s @ vt) < 1.001 * best


def test_randomised_pissa_moves_no_generator_and_depends_on_none() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(60, 40)

    found = []
    for seed, init in ((1, "pissa_niter_2"), (2, "pissa_niter_2"), (2, "pissa")):
        torch.manual_seed(0)
        base = Wide()
        torch.manual_seed(seed)
        model = get_peft_model(base, config(init, ["linear"]))
        found.append((model.base_model.model.linear.lora_A["default"].weight, torch.rand(3)))
    (one, _), (other, after), (exact, after_exact) = found
    assert torch.equal(one, other)
    assert not torch.equal(one, exact)
    assert torch.equal(after, after_exact)  # the exact decomposition draws nothing


@pytest.mark.parametrize("name", ["linear", "transposed"])
def test_olora_takes_a_part_of_qr(name: str) -> None:
    w, base, a, b, s = parts(adapted("olora"), name)
    q, r = torch.linalg.qr(w)
    torch.testing.assert_close(a, r[:4], atol=5e-6, rtol=0)
    torch.testing.assert_close(b, q[:, :4], atol=2e-6, rtol=0)
    torch.testing.assert_close(base, w - s * q[:, :4] @ r[:4], atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", ["linear", "transposed", "tokens"])
def test_mica_freezes_minor_directions(name: str) -> None:
    model = adapted("mica", [name], fan_in_fan_out=name == "transposed")
    w, base, a, b, _ = parts(model, name)
    u = torch.linalg.svd(w, full_matrices=False).U
    torch.testing.assert_close(b.abs(), u[:, -4:].abs(), atol=1e-5, rtol=0)
    assert torch.equal(base, w)
    assert a.abs().max() == 0
    trains = {key.split(".")[-3] if "embedding" not in key else key.split(".")[-2] for key, p in model.named_parameters() if p.requires_grad}
    assert trains == {"lora_embedding_A" if name == "tokens" else "lora_A"}
    assert model.get_nb_trainable_parameters()[0] == a.numel()


def test_mica_stays_frozen_when_it_comes_from_a_file(tmp_path: Any) -> None:
    model = adapted("mica", ["linear"])
    with torch.no_grad():
        model.base_model.model.linear.lora_A["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(Layers(), tmp_path, is_trainable=True)
    torch.testing.assert_close(other(IDS), model(IDS))
    assert [key for key, p in other.named_parameters() if p.requires_grad] == ["base_model.model.linear.lora_A.default.weight"]
    other.set_adapter("default")
    assert not other.base_model.model.linear.lora_B["default"].weight.requires_grad


def test_mica_needs_a_rank_that_there_is() -> None:
    with Unchanged(base := Layers()), pytest.raises(ConfigError, match=r"needs r ≤ 6 on 'linear'.*not 7"):
        get_peft_model(base, config("mica", ["linear"], r=7))


def test_orthogonal_is_random_and_changes_nothing() -> None:
    model = adapted("orthogonal", ["linear"], r=6)
    _, _, a, b, _ = parts(model, "linear")
    assert a.abs().max() > 0.01
    assert b.abs().max() > 0.01
    assert (b @ a).abs().max() < 1e-7
    stds = []
    for seed in range(200):
        base = Layers()
        torch.manual_seed(seed)
        other = get_peft_model(base, config("orthogonal", ["linear"], r=4)).base_model.model.linear
        stds.append(torch.cat([other.lora_A["default"].weight.flatten(), other.lora_B["default"].weight.flatten()]).detach().square().mean())
    assert float(torch.stack(stds).mean().sqrt()) == pytest.approx(math.sqrt(2) / (10 * math.sqrt(4)), rel=0.03)


def test_orthogonal_keeps_float32_on_a_half_precision_base() -> None:
    model = adapted("orthogonal", ["linear"], torch.bfloat16, r=6)
    a, b = (factor.detach() for factor in model.base_model.model.linear.factors("default"))
    assert a.dtype == torch.float32
    assert (b @ a).abs().max() < 1e-7  # the peer's factors, rounded to bfloat16, give 4e-4


def test_orthogonal_needs_an_even_rank() -> None:
    with pytest.raises(ConfigError, match=r"even r, not r=3 on 'linear'; r=4"):
        adapted("orthogonal", ["linear"], r=3)


# ---- what all have in common -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("init", EXACT)
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"linear": 2}, "alpha_pattern": {"transposed": 1}}, {"use_dora": True}]
)
def test_a_new_adapter_changes_nothing(init: str, options: dict[str, Any]) -> None:
    with torch.no_grad():
        expected = Layers()(IDS)
        found = adapted(init, **options)(IDS)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_factors_are_rounded_before_the_residual_is_formed(init: str, dtype: torch.dtype, autocast: bool) -> None:
    model = adapted(init, ["linear"], dtype, how={"autocast_adapter_dtype": autocast})
    w, base, a, b, s = parts(model, "linear", Layers(dtype))
    error = base + s * b @ a - w
    ulp = torch.finfo(dtype).eps * 2.0 ** base.abs().clamp_min(1e-30).log2().floor()
    # half a unit in the last place of the base that is stored, and what float32 loses
    assert bool((error.abs() <= 0.5 * ulp + 1e-6).all())


def test_float64_bases_are_decomposed_in_float64() -> None:
    for init in ("pissa", "olora"):
        w, base, a, b, s = parts(adapted(init, ["linear"], torch.float64), "linear", Layers(torch.float64))
        assert (base + s * b @ a - w).abs().max() < 1e-14
        if init == "pissa":
            u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
            assert (s * b @ a - u[:, :4] * sigma[:4] @ vt[:4]).abs().max() < 1e-13


@pytest.mark.parametrize("init", MUTATING)
def test_deleting_and_unloading_give_the_base_back_bit_for_bit(init: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = Layers(dtype)
        before = {name: bits(value).clone() for name, value in base.state_dict().items()}
        model = get_peft_model(base, config(init))
        assert not torch.equal(bits(model.base_model.model.linear.weight), before["linear.weight"])
        model.delete_adapter("default")
        assert torch.equal(bits(model.base_model.model.linear.weight), before["linear.weight"])
        model.add_adapter("other", config(init))
        found = model.unload(restore_base=True).state_dict()
        assert all(torch.equal(bits(found[name]), value) for name, value in before.items())


@pytest.mark.parametrize("init", MUTATING)
def test_merging_is_exact_and_has_a_way_back(init: str) -> None:
    model = adapted(init)
    shifted = bits(model.base_model.model.linear.get_base_layer().weight).clone()
    with torch.no_grad():
        model.base_model.model.linear.lora_B["default"].weight.add_(0.1)
        expected = model(IDS)
        model.merge_adapter()
        torch.testing.assert_close(model(IDS), expected, atol=3e-5, rtol=1e-5)
        model.unmerge_adapter()
    assert torch.equal(bits(model.base_model.model.linear.get_base_layer().weight), shifted)
    with torch.no_grad():
        torch.testing.assert_close(model.merge_and_unload()(IDS), expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("init", [*EXACT, "loftq"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_what_is_loaded_computes_what_was_saved(init: str, low_memory: bool, tmp_path: Any) -> None:
    model = adapted(init)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(tmp_path)
        torch.manual_seed(99)
        other = PeftModel.from_pretrained(Layers(), tmp_path, low_cpu_mem_usage=low_memory)
        torch.testing.assert_close(other(IDS), model.eval()(IDS), atol=1e-5, rtol=1e-5)
    # products with what lies askew in memory, as in a file, are rounded in another way
    assert all(parameter.data_ptr() % 64 == 0 for parameter in other.parameters())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_tied_weights_are_untied_for_as_long_as_the_adapter_exists(init: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.tokens = nn.Embedding(9, 6)
            self.head = nn.Linear(6, 9, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.tokens(ids))

    base = Tied()
    with torch.no_grad():
        expected, table = base(IDS), bits(base.tokens.weight).clone()
        model = get_peft_model(base, config(init, ["head"]))
        torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(bits(base.tokens.weight), table)
    assert model.unload(restore_base=True) is base
    assert base.head.weight is base.tokens.weight


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "pissa_niter_2", "olora", "loftq", "eva", "corda", "lora_ga"])
@pytest.mark.parametrize(("target", "kind"), [("tokens", "embedding"), ("conv", "convolution")])
@pytest.mark.filterwarnings("ignore:init_lora_weights is '(eva|corda|lora_ga)' but:UserWarning")
def test_kinds_of_layers_that_an_initialisation_does_not_know_are_refused(init: str, target: str, kind: str) -> None:
    with Unchanged(base := Layers()), pytest.raises(ConfigError, match=rf"'{init}' can't start '{target}', which is of the kind '{kind}'; it knows"):
        get_peft_model(base, config(init, ["linear", target]))


@pytest.mark.parametrize("word", ["pissa_niter_", "pissa_niter_x", "pisa", "olora2"])
def test_unknown_words(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"init_lora_weights='{word}' is unknown; did you mean"):
        config(word)


def test_quantised_bases_are_refused_by_what_decomposes_them() -> None:
    base = Layers()
    base.linear.weight = nn.Parameter(base.linear.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"needs the numbers of 'linear', whose dtype is torch.int8"):
        get_peft_model(base, config("pissa", ["linear"]))


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_scaling_of_zero_is_refused(init: str) -> None:
    with Unchanged(base := Layers()), pytest.raises(ConfigError, match=r"scaling of 'linear' is 0.*positive lora_alpha"):
        get_peft_model(base, config(init, ["linear"], lora_alpha=0))


def test_shifting_the_base_under_other_adapters_warns_once() -> None:
    model = adapted(True)
    with pytest.warns(PeftWarning, match=r"'pissa' changes the base weight of 'linear'.*'default' adapt") as caught:
        model.add_adapter("other", config("pissa"))
    assert len(caught) == 1


def test_merged_bases_are_not_shifted() -> None:
    model = adapted(True, ["linear"])
    model.merge_adapter()
    with pytest.warns(PeftWarning, match="changes the base"), pytest.raises(MergeError, match="unmerge_adapter"):
        model.add_adapter("other", config("pissa", ["linear"]))


# ---- LoftQ --------------------------------------------------------------------------------------------------------------
def test_nf4_has_the_quantiles_of_the_paper() -> None:
    """QLoRA, appendix E: 8 quantiles of N(0, 1) below zero, 9 from zero on, both with the same outermost one, over the largest."""

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(0.9677083, 0.5, count, dtype=torch.float64))

    values = torch.cat([-quantiles(8)[:-1], torch.zeros(1, dtype=torch.float64), quantiles(9)[:-1]]).sort().values
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), values / values.max(), atol=2e-7, rtol=0)


def test_rounding_to_nf4_takes_the_nearest_number_of_each_block() -> None:
    weight = torch.randn(7, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = rounded_to_nf4(weight, 64).flatten()
    flat, codes = weight.flatten(), torch.tensor(NF4, dtype=torch.float64)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        largest = max(abs(float(x)) for x in block)
        expected = [largest * min(codes.tolist(), key=lambda code, x=float(x): abs(code - x / largest)) for x in block]
        torch.testing.assert_close(found[start : start + 64], torch.tensor(expected, dtype=torch.float64))


def test_rounding_to_int8_takes_the_nearest_of_255_steps_of_each_row() -> None:
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = rounded_to_int8(weight)
    for row, got in zip(weight, found, strict=True):
        step = row.abs().max() / 127
        assert (got / step - (got / step).round()).abs().max() < 1e-9
        assert (got - row).abs().max() <= step / 2 + 1e-12
        assert got.abs().max() == row.abs().max()


@pytest.mark.parametrize("rounding", [rounded_to_nf4, rounded_to_int8])
def test_zeros_are_rounded_to_zeros(rounding: Any) -> None:
    assert torch.equal(rounding(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("settings", [LoftQConfig(4, 1), LoftQConfig(4, 5), LoftQConfig(8, 2)])
@pytest.mark.parametrize("name", ["linear", "transposed"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_loftq(settings: LoftQConfig, name: str, options: dict[str, Any]) -> None:
    w, base, a, b, s = parts(adapted("loftq", loftq_config=settings, **options), name)
    rest, rounding = w, {4: rounded_to_nf4, 8: rounded_to_int8}[settings.loftq_bits]
    for _ in range(settings.loftq_iter):
        q = rounding(rest)
        u, sigma, vt = torch.linalg.svd(w - q, full_matrices=False)
        correction = u[:, :4] * sigma[:4] @ vt[:4]
        rest = w - correction
    torch.testing.assert_close(base, q, atol=1e-5, rtol=0)
    # the peer does not divide by s: with alpha ≠ r its correction is too large
    torch.testing.assert_close(s * b @ a, correction, atol=1e-5, rtol=0)


def test_loftq_corrects_what_rounding_loses_whatever_alpha_is() -> None:
    w = torch.randn(32, 48, generator=torch.Generator().manual_seed(1))
    lost = torch.linalg.matrix_norm(w - rounded_to_nf4(w))
    errors = []
    for scaling in (0.25, 1.0, 4.0):
        q, a, b = loftq_decomposition(w, 8, scaling)
        errors.append(torch.linalg.matrix_norm(w - q - scaling * b @ a) / lost)
    assert max(errors) < 0.85
    assert max(errors) - min(errors) < 1e-5
    more = loftq_decomposition(w, 8, 2.0, iterations=5)
    assert torch.linalg.matrix_norm(w - more[0] - 2 * more[2] @ more[1]) / lost < errors[0]


def test_loftq_needs_its_config() -> None:
    with pytest.raises(ConfigError, match="`loftq_config` must be specified"):
        LoraConfig(init_lora_weights="loftq")


def test_our_names_may_be_in_capitals_and_those_of_others_stay() -> None:
    assert LoraConfig(init_lora_weights="GAUSSIAN").init_lora_weights == "gaussian"
    with pytest.raises(ConfigError, match="init_lora_weights='MyInit' is unknown"):
        LoraConfig(init_lora_weights="MyInit")
