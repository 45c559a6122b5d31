"""CorDA: a decomposition of each weight that is led by the covariance of its inputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_lora
from lora.data_net import BATCHES, Net, config, corda, inputs_of, run
from peft_core import AdapterFileError, ConfigError, PeftModel, get_peft_model
from peft_lora import CordaConfig, LoraConfig
from peft_lora.initializers.corda.preparation import decompose
from support import Unchanged


def covariance(name: str) -> Tensor:
    """The mean of XᵀX over the batches, each divided by its largest magnitude, in float64."""
    parts = [x.double() / x.abs().max() for x in inputs_of(name).split(30)]
    return torch.stack([x.T @ x for x in parts]).mean(0)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("name", ["a", "c"])
def test_corda(method: str, name: str) -> None:
    base, original = Net(), Net()
    settings = corda(corda_method=method)
    peft_lora.preprocess_corda(base, settings, run(base))
    model = get_peft_model(base, settings)
    layer = getattr(model.base_model.model, name)
    w = layer.ops.matrix(getattr(original, name).weight.detach()).double()
    c = covariance(name)
    damped = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    u, sigma, vt = torch.linalg.svd(w @ damped, full_matrices=False)
    chosen = slice(0, 2) if method == "ipm" else slice(len(sigma) - 2, len(sigma))
    expected = u[:, chosen] * sigma[chosen] @ (torch.linalg.inv(damped) @ vt[chosen].T).T
    a, b = (factor.detach().double() for factor in layer.factors("default"))
    s = layer.scaling["default"]
    torch.testing.assert_close(s * b @ a, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(layer.ops.matrix(layer.get_base_layer().weight).detach().double(), w - expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(a.norm(dim=1) / (sigma[chosen] / s).sqrt(), (torch.linalg.inv(damped) @ vt[chosen].T).norm(dim=0), rtol=1e-4, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(BATCHES[0]), original(BATCHES[0]), atol=1e-5, rtol=1e-5)


def test_corda_of_all_ranks_is_the_weight() -> None:
    generator = torch.Generator().manual_seed(1)
    w, x = torch.randn(7, 5, generator=generator), torch.randn(3, 5, generator=generator)
    found = decompose(w, x.T @ x, 5)  # a covariance of rank 3
    torch.testing.assert_close(found.U_WC * found.S_WC @ found.V_WC.T, w)


def test_what_corda_leaves_on_modules_goes_when_it_is_used() -> None:
    base = Net()
    settings = corda()
    peft_lora.preprocess_corda(base, settings, run(base))
    assert base.a.eigens.S_WC.shape == (2,)
    assert not hasattr(base.a, "covariance_matrix")
    broken = copy.copy(settings)
    broken.rank_pattern = {"c": 3}
    with Unchanged(base), pytest.raises(ConfigError, match=r"decomposition of 'c'.*\(5, 2\).*r=3 needs"):
        get_peft_model(base, broken)
    get_peft_model(base, settings)
    assert not any(hasattr(module, "eigens") for module in base.modules())


def test_corda_keeps_covariances_if_asked() -> None:
    base = Net()
    peft_lora.preprocess_corda(base, corda(prune_temporary_fields=False), run(base))
    torch.testing.assert_close(base.a.covariance_matrix.double(), covariance("a"), atol=1e-5, rtol=1e-5)


def test_corda_takes_any_shape_of_batch_and_weighs_calls_alike() -> None:
    found = []
    for batch in (BATCHES[0], BATCHES[0].view(2, 3, 5, 6), 100 * BATCHES[0]):
        base = Net()
        peft_lora.preprocess_corda(base, config("corda", ["a"], corda_config=CordaConfig()), lambda base=base, batch=batch: base(batch))
        found.append(base.a.eigens)
    for other in found[1:]:
        torch.testing.assert_close(other.V_WC.abs(), found[0].V_WC.abs(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_corda_divides_by_the_largest_magnitude(sign: int) -> None:
    """The peer divides by |max X|, which is no bound where the largest number is negative, and may be 0."""
    base = Net()
    x = torch.cat([-BATCHES[0].abs(), torch.zeros(2, 6)]) * sign
    peft_lora.preprocess_corda(base, config("corda", ["a"], corda_config=CordaConfig(prune_temporary_fields=False)), lambda: base(x))
    y = x.double() / x.abs().max()
    torch.testing.assert_close(base.a.covariance_matrix.double(), y.T @ y, atol=1e-5, rtol=1e-5)


def test_corda_files(tmp_path: Path) -> None:
    cache, covariances = str(tmp_path / "deep" / "cache.pt"), str(tmp_path / "covariances.pt")
    base = Net()
    peft_lora.preprocess_corda(base, corda(cache_file=cache, covariance_file=covariances), run(base))
    found = [base.a.eigens]
    for settings in (corda(cache_file=cache), corda(covariance_file=covariances)):
        base = Net()
        peft_lora.preprocess_corda(base, settings)
        found.append(base.a.eigens)
    for other in found[1:]:
        torch.testing.assert_close(vars(other), vars(found[0]), atol=1e-5, rtol=1e-5)
    assert set(torch.load(covariances)) == {"a", "b", "c"}
    assert {key for key in torch.load(cache) if key.startswith("a.")} == {"a.eigens.S_WC", "a.eigens.U_WC", "a.eigens.V_WC"}


def test_corda_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the peer fails: makedirs("")
    base = Net()
    peft_lora.preprocess_corda(base, corda(cache_file="cache.pt"), run(base))
    assert Path("cache.pt").is_file()


def test_corda_looks_at_another_model_if_asked() -> None:
    base, other = Net(), Net()
    peft_lora.preprocess_corda(base, corda(), run(other), hooked_model=other)
    assert hasattr(base.a, "eigens")
    assert not hasattr(other.a, "eigens")
    assert not other.a._forward_pre_hooks


@pytest.mark.parametrize("strict", [True, False])
def test_corda_from_a_file_needs_its_decomposition(strict: bool, tmp_path: Path) -> None:
    base, settings = Net(), corda()
    peft_lora.preprocess_corda(base, settings, run(base))
    model = get_peft_model(base, settings)
    with torch.no_grad():
        model.base_model.model.a.lora_B["default"].weight.add_(0.1)
        expected = model(BATCHES[0])
    model.save_pretrained(tmp_path)
    with Unchanged(base := Net()), pytest.raises(ConfigError, match=r"'corda': 'a' has not been decomposed.*path_initial_model"):
        PeftModel.from_pretrained(base, tmp_path, strict=strict)
    peft_lora.preprocess_corda(base, settings, run(base))
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path, strict=strict)(BATCHES[0]), expected, atol=1e-5, rtol=1e-5)


def broken_file(tmp_path: Path) -> str:
    (tmp_path / "broken").write_text("no tensors")
    return str(tmp_path / "broken")


@pytest.mark.parametrize(
    ("settings", "how", "error", "message"),
    [
        (corda(), {}, ConfigError, "no run_model"),
        (corda(), {"run_model": lambda: None}, ConfigError, "did not run 'a'"),
        (config("gaussian"), {"run_model": lambda: None}, ConfigError, "needs init_lora_weights='corda'"),
        (corda(), {"run_model": lambda: None, "hooked_model": nn.Linear(2, 2)}, ConfigError, "hooked_model lacks 'a'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_corda_refuses(settings: LoraConfig, how: dict[str, Any], error: type[Exception], message: str) -> None:
    with Unchanged(base := Net()), pytest.raises(error, match=message):
        peft_lora.preprocess_corda(base, settings, **how)


def test_corda_refuses_inputs_and_files_that_are_no_good(tmp_path: Path) -> None:
    base = Net()
    for batch, message in ((BATCHES[0] / 0, "not finite"), (torch.zeros(4, 6), "'a' were all zero")):
        with pytest.raises(ConfigError, match=message):
            peft_lora.preprocess_corda(base, corda(), lambda batch=batch: base(batch))
    with pytest.raises(AdapterFileError, match="can't be read"):
        peft_lora.preprocess_corda(base, corda(cache_file=broken_file(tmp_path)))
    torch.save({"a": torch.eye(7), "b": torch.eye(6), "c": torch.eye(8)}, tmp_path / "wide")
    with pytest.raises(ConfigError, match=r"covariance of 'a' is \(7, 7\), and its inputs have 6"):
        peft_lora.preprocess_corda(base, corda(covariance_file=str(tmp_path / "wide")))
    torch.save({"x": torch.eye(7)}, tmp_path / "other")
    with pytest.raises(ConfigError, match="lacks 'a', 'b', 'c'"):
        peft_lora.preprocess_corda(base, corda(covariance_file=str(tmp_path / "other")))
