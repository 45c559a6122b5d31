"""Variants of LoRA beside the peer's: equal where it is right, and what is wrong with it where it is not."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interop.cases import base, ours, peer, save, shake, using

peers_config = importlib.import_module("peft.tuners.lora.config")
TARGETS = ["q_proj", "down_proj"]
#: field → (class of the settings, its arguments), or the value itself
VARIANTS: dict[str, dict[str, Any]] = {
    "bdlora": {"use_bdlora": ("BdLoraConfig", {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["down_proj"], "nblocks": 2})},
    "kasa": {"kasa_config": ("KasaConfig", {"beta": 0.1, "gamma": 0.2})},
    "velora": {"velora_config": ("VeloraConfig", {"num_groups": 5, "scale": 0.5})},
    "velora-random": {"velora_config": ("VeloraConfig", {"num_groups": 5, "init_type": "random"})},
    "velora-once": {"velora_config": ("VeloraConfig", {"num_groups": 4, "init_type": "batch_average_once"})},
    "monteclora": {"monteclora_config": ("MontecloraConfig", {"num_samples": 3, "buffer_size": 4})},
    "alora": {"alora_invocation_tokens": [5, 6]},
}
IDS = torch.tensor([[1, 5, 6, 2, 5, 6, 3], [4, 4, 4, 4, 4, 4, 4], [5, 6, 1, 1, 1, 1, 5]])


def config_of(library: Any, options: dict[str, Any]) -> Any:
    made = {}
    for name, value in options.items():
        if isinstance(value, tuple):
            kind, fields = value
            made[name] = getattr(library if library is ours else peers_config, kind)(**fields)
        else:
            made[name] = value
    return library.LoraConfig(**made)


def make(library: Any, variant: str, on: str = "llama", *, seed: int = 3, **options: Any) -> Any:
    """Return a base with a new adapter; the same seed for both libraries."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **VARIANTS.get(variant, {}), **options}
    model = base(on)
    with using(library):
        config = config_of(library, options)
        torch.manual_seed(seed)
        return library.get_peft_model(model, config)


def load(library: Any, folder: Path, **kwargs: Any) -> Any:
    model = base("llama")
    with using(library):
        return library.PeftModel.from_pretrained(model, str(folder), **kwargs).eval()


def logits(model: Any, library: Any = ours, **arguments: Any) -> Tensor:
    with torch.no_grad(), using(library):
        found: Tensor = model(input_ids=IDS, **arguments).logits
    return found


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


def layer_of(model: Any, end: str = "q_proj") -> Any:
    return next(module for name, module in model.named_modules() if name.endswith(end) and hasattr(module, "lora_A"))


# ---- equal ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["bdlora", "velora", "velora-once", "alora"])
def test_the_same_seed_gives_the_same_adapter(variant: str) -> None:
    found, expected = (dict(make(library, variant).named_parameters()) for library in (ours, peer))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_go_both_ways(variant: str, tmp_path: Path) -> None:
    for number, (writer, reader) in enumerate(((ours, peer), (peer, ours))):
        model = make(writer, variant, init_lora_weights=False)
        shake(model)
        model.eval()
        folder = save(writer, model, tmp_path / str(number))
        read = load(reader, folder)
        assert difference(logits(read, reader), logits(model, writer)) < 2e-6
        assert difference(logits(model, writer), base("llama")(input_ids=IDS).logits) > 1e-3


@pytest.mark.parametrize("variant", ["bdlora", "kasa", "velora", "velora-random", "velora-once", "alora"])
def test_gradients_are_the_same(variant: str, tmp_path: Path) -> None:
    model = make(peer, variant, init_lora_weights=False)
    shake(model)
    folder = save(peer, model, tmp_path)
    gradients = []
    for library in (ours, peer):
        trained = load(library, folder, is_trainable=True).train()
        with using(library):
            trained(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained.named_parameters() if parameter.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-6)


def test_kasa_truncates_the_same_base_and_has_the_same_loss(tmp_path: Path) -> None:
    model = make(peer, "kasa", init_lora_weights=False)
    folder = save(peer, model, tmp_path)
    read = load(ours, folder)
    for end in TARGETS:
        torch.testing.assert_close(layer_of(read, end).weight, layer_of(model, end).weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(read.base_model._get_kasa_loss("default"), model.base_model._get_kasa_loss("default"), rtol=1e-5, atol=1e-6)


def test_alora_generates_the_same(tmp_path: Path) -> None:
    model = make(ours, "alora", init_lora_weights=False).eval()
    read = load(peer, save(ours, model, tmp_path))
    options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    with using(peer):
        expected = read.generate(**options)
    assert torch.equal(model.generate(**options), expected)


def adapters(tmp_path: Path, count: int) -> list[str]:
    paths = []
    for i in range(count):
        model = base("llama")
        torch.manual_seed(i)
        model = ours.get_peft_model(model, ours.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"))
        with torch.no_grad():  # one direction much stronger than the other: the peer finds it in 15 power iterations
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter[0] *= 6
        paths.append(str(save(ours, model, tmp_path / str(i))))
    return paths


def both_arrows(paths: list[str], tasks: int, **settings: Any) -> tuple[Any, Any]:
    models = []
    for library in (ours, peer):
        model = base("llama")
        with using(library):
            torch.manual_seed(0)
            models.append(library.create_arrow_model(model, paths[:tasks], library.ArrowConfig(**settings), paths[tasks:] or None).eval())
    return models[0], models[1]


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (2, 0.5), (4, 1.0)])
def test_arrow_mixes_the_same(k: int, temperature: float, tmp_path: Path) -> None:
    found, expected = both_arrows(adapters(tmp_path, 4), 4, top_k=k, router_temperature=temperature)
    assert list(found.peft_config) == list(expected.peft_config)
    assert difference(logits(found), logits(expected, peer)) < 1e-4
    assert difference(logits(found), base("llama")(input_ids=IDS).logits) > 0.1


# ---- where the peer is wrong -----------------------------------------------------------------------------------------------
def test_peer_kasa_delta_lacks_the_diagonal() -> None:
    found, expected = (make(library, "kasa", init_lora_weights=False).eval() for library in (ours, peer))
    for library, model in ((ours, found), (peer, expected)):
        layer = layer_of(model)
        x = torch.randn(1, 16)
        with torch.no_grad():
            effect = layer(x) - layer.get_base_layer()(x)
            told = x @ layer.get_delta_weight("default").T
        assert (difference(effect, told) < 1e-5) == (library is ours)


@pytest.mark.parametrize("end", TARGETS)
def test_peer_block_diagonal_delta_is_wrong(end: str) -> None:
    found, expected = (make(library, "bdlora", init_lora_weights=False).eval() for library in (ours, peer))
    with torch.no_grad():
        layer = layer_of(found, end)
        x = torch.randn(1, layer.weight.shape[1])
        torch.testing.assert_close(layer(x) - layer.get_base_layer()(x), x @ layer.get_delta_weight("default").T, rtol=1e-4, atol=1e-5)
        theirs = layer_of(expected, end)
        try:
            shape = tuple(theirs.get_delta_weight("default").shape)
        except RuntimeError:
            shape = ()
    assert shape != tuple(theirs.weight.shape)


def test_peer_block_diagonal_dies_on_transposed_linears() -> None:
    class Net(nn.Sequential):
        pass

    for library in (peer, ours):
        model = Net(Conv1D(8, 12))
        options = {
            "target_modules": ["0"],
            "r": 4,
            "fan_in_fan_out": True,
            "use_bdlora": ("BdLoraConfig", {"target_modules_bd_a": ["0"], "nblocks": 2}),
        }
        with using(library):
            if library is peer:
                with pytest.raises((AttributeError, TypeError)):
                    library.get_peft_model(model, config_of(library, options))
            else:
                library.get_peft_model(model, config_of(library, options))(torch.randn(2, 12))


def test_peer_divergence_of_monteclora_is_negative(tmp_path: Path) -> None:
    settings = ("MontecloraConfig", {"num_samples": 3, "kl_loss_weight": 1.0, "buffer_size": 4})
    model = make(peer, "plain", monteclora_config=settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("std_prior"):
                parameter.zero_()  # the other two divergences are 0 then: D = I, and Σ is I before the first draw
            elif name.endswith("expert_weights_prior"):
                parameter.copy_(torch.tensor([0.1, 0.5, 0.9]))
    read = load(ours, save(peer, model, tmp_path))
    alpha = torch.tensor([0.1, 0.5, 0.9]).exp()
    expected = torch.distributions.kl_divergence(torch.distributions.Dirichlet(alpha), torch.distributions.Dirichlet(torch.full((3,), 0.1)))
    with torch.no_grad():
        torch.testing.assert_close(ours.monteclora_loss(read, "default"), expected, rtol=1e-4, atol=1e-4)
        assert float(model.base_model._get_monteclora_loss("default")) < 0


def test_peer_ignores_qalora_on_a_plain_linear(tmp_path: Path) -> None:
    found, expected = (make(library, "plain", use_qalora=True, qalora_group_size=4, init_lora_weights=False) for library in (ours, peer))
    assert layer_of(expected).lora_A["default"].weight.shape == (4, 16)
    assert layer_of(found).lora_A["default"].weight.shape == (4, 4)
    with pytest.raises(ours.AdapterWeightsError, match="size mismatch"):  # not ignored in its files either
        load(ours, save(peer, expected, tmp_path))


def test_peer_refuses_beams_with_alora(tmp_path: Path) -> None:
    model = make(ours, "alora", init_lora_weights=False).eval()
    read = load(peer, save(ours, model, tmp_path))
    options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 2, "do_sample": False, "num_beams": 2}
    assert model.generate(**options).shape == (3, 9)
    with using(peer), pytest.raises(ValueError, match=r"[Bb]eam"):
        read.generate(**options)


def test_peer_leaves_alora_off_in_other_tasks() -> None:
    for library in (ours, peer):
        model = base("bert")
        options = {
            "target_modules": ["query"],
            "r": 2,
            "init_lora_weights": False,
            "task_type": "FEATURE_EXTRACTION",
            "alora_invocation_tokens": [5, 6],
        }
        with using(library):
            model = library.get_peft_model(model, library.LoraConfig(**options)).eval()
            with torch.no_grad():
                found = model(input_ids=IDS).last_hidden_state
                with model.disable_adapter():
                    plain = model(input_ids=IDS).last_hidden_state
        assert torch.equal(found, plain) == (library is peer)


def test_peer_subtracts_general_knowledge_from_the_factors_and_in_place(tmp_path: Path) -> None:
    paths = adapters(tmp_path, 4)
    found, expected = both_arrows(paths, 3, top_k=2, use_gks=True)
    name = next(name for name, _ in found.named_parameters() if name.endswith("lora_A.task_0.weight"))
    for library, model in ((ours, found), (peer, expected)):
        before = dict(model.named_parameters())[name].clone()
        logits(model, library)
        assert torch.equal(dict(model.named_parameters())[name], before) == (library is ours)
    assert difference(logits(found), logits(expected, peer)) > 1e-3


def test_peer_takes_too_large_a_top_k_and_dies_in_the_call(tmp_path: Path) -> None:
    paths = adapters(tmp_path, 2)
    with pytest.raises(ours.ConfigError, match="top_k=3, but there are 2"):
        ours.create_arrow_model(base("llama"), paths, ours.ArrowConfig(top_k=3))
    with using(peer):
        model = peer.create_arrow_model(base("llama"), paths, peer.ArrowConfig(top_k=3))
        with pytest.raises(RuntimeError):
            model(input_ids=IDS)


def test_peer_conversion_of_blocks_is_wrong() -> None:
    found, expected = (make(library, "bdlora", init_lora_weights=False).eval() for library in (ours, peer))
    config, tensors = ours.convert_to_lora(found, rank=4)
    plain = ours.get_peft_model(base("llama"), config)
    ours.set_peft_model_state_dict(plain, tensors, strict=True)
    assert difference(logits(plain.eval()), logits(found)) < 1e-4

    def by_the_peer() -> float:
        config, tensors = peer.convert_to_lora(expected, rank=4)
        converted = peer.get_peft_model(base("llama"), config)
        peer.set_peft_model_state_dict(converted, tensors)
        return difference(logits(converted.eval(), peer), logits(expected, peer))

    with using(peer), pytest.raises(RuntimeError):
        by_the_peer()
