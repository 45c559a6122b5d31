"""Scripts whose numbers differed from the peer's: which side is right, by the formula written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

import peft
from compat.tiny import IDS, SIZES, llama, outputs, randomise, worst

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})


# ---- Arrow -------------------------------------------------------------------------------------------------------------


def experts(folder: Path) -> list[str]:
    for place, name in enumerate("abc"):
        randomise(peft.get_peft_model(llama(), lora()), seed=place + 1, scale=0.2).save_pretrained(folder / name)
    return [str(folder / name) for name in "abc"]


def routed(paths: list[str], general: str | None, top_k: int, temperature: float) -> Any:
    """Return the base with the formula of Arrow in hooks: the first right singular vector of each delta, softmax over the k largest |t·p|."""
    base = llama()
    loaded = [peft.PeftModel.from_pretrained(llama(), path) for path in [*paths, *([general] if general else [])]]
    for path, module in base.named_modules():
        if not path.endswith(("q_proj", "v_proj")):
            continue
        deltas = [model.get_base_model().get_submodule(path).get_delta_weight("default").detach() for model in loaded]
        if general:
            *deltas, shared = deltas
            deltas = [delta - shared for delta in deltas]
        first = torch.stack([torch.linalg.svd(delta.double())[2][0].float() for delta in deltas])

        def hook(module: Any, args: Any, y: Tensor, deltas: Any = deltas, first: Tensor = first) -> Tensor:
            t = args[0]
            score, chosen = (t @ first.T).abs().topk(top_k, -1)
            weights = torch.zeros(*t.shape[:-1], len(deltas)).scatter(-1, chosen, torch.softmax(score / temperature, -1))
            return y + sum(weights[..., e, None] * (t @ delta.T) for e, delta in enumerate(deltas))

        module.register_forward_hook(hook)
    return base


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 1.0), (2, 0.5), (3, 1.0)])
def test_arrow_sends_tokens_by_the_first_singular_vector(top_k: int, temperature: float, tmp_path: Path) -> None:
    """The peer stops after 15 steps of power iteration from a random start: 3 % of the tokens go to another expert there."""
    paths = experts(tmp_path)
    model = peft.create_arrow_model(llama(), paths, peft.ArrowConfig(top_k=top_k, router_temperature=temperature))
    assert worst(outputs(model), outputs(routed(paths, None, top_k, temperature))) < 1e-5


def test_arrow_takes_general_knowledge_out_of_deltas(tmp_path: Path) -> None:
    """The peer subtracts the mean of A and of B instead, in place."""
    *paths, general = experts(tmp_path)
    model = peft.create_arrow_model(llama(), paths, peft.ArrowConfig(top_k=2, use_gks=True), general_adapter_paths=[general])
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert worst(outputs(model), outputs(routed(paths, general, 2, 1.0))) < 1e-5
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


# ---- EVA ---------------------------------------------------------------------------------------------------------------


def test_eva_starts_with_principal_components_of_the_inputs() -> None:
    data = [{"input_ids": IDS.repeat(2, 1).roll(1, 1), "attention_mask": torch.ones(4, IDS.shape[1], dtype=torch.long)}] * 2
    config = lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0), target_modules=["q_proj"])
    model = peft.get_peft_model(llama(), config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    seen: dict[str, Tensor] = {}
    base = llama()
    base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, y: seen.update(x=args[0].reshape(-1, 32)))
    outputs(base, data[0]["input_ids"])
    x = torch.cat([seen["x"]] * 2)
    exact = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)[2][:4].float()
    found = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight.detach()
    assert float((found * exact).sum(1).abs().min()) > 1 - 1e-5
    largest = found.abs().argmax(1)
    assert bool((found[torch.arange(4), largest] > 0).all())  # the sign is that of the peer


def test_eva_gives_ranks_to_layers_as_the_peer_does() -> None:
    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": torch.randint(3, 64, (4, 12), generator=generator), "attention_mask": torch.ones(4, 12, dtype=torch.long)} for _ in range(8)
    ]
    config = lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0), target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(llama(), config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    ranks = {
        key.split("model.layers.")[1].removesuffix(".lora_A.weight"): value.shape[0]
        for key, value in peft.get_peft_model_state_dict(model).items()
        if "lora_A" in key
    }
    assert ranks == {
        "0.self_attn.q_proj": 5,
        "0.self_attn.v_proj": 5,
        "0.mlp.down_proj": 3,
        "1.self_attn.q_proj": 4,
        "1.self_attn.v_proj": 4,
        "1.mlp.down_proj": 3,
    }


# ---- LoftQ -------------------------------------------------------------------------------------------------------------


def four_bits(folder: Path, spoil: Any = None) -> tuple[Any, Path]:
    """Return a base in NF4 and the folder of its weights; `spoil` changes these before they are written."""
    pytest.importorskip("bitsandbytes")
    model = llama(hidden_size=64, intermediate_size=64)
    model.save_pretrained(folder / "good")
    if spoil is not None:
        with torch.no_grad():
            spoil(model)
    model.save_pretrained(folder / "other")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "good", quantization_config=settings, device_map="cpu")
    return base, folder / "other"


def test_replacing_by_loftq_brings_a_quantised_model_nearer(tmp_path: Path) -> None:
    base, folder = four_bits(tmp_path)
    expected = outputs(transformers.AutoModelForCausalLM.from_pretrained(folder))
    model = peft.get_peft_model(
        base, lora(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], lora_alpha=4)
    )
    before = float((outputs(model) - expected).abs().mean())
    peft.replace_lora_weights_loftq(model, model_path=str(folder))
    assert float((outputs(model) - expected).abs().mean()) < 0.9 * before


def test_replacing_by_loftq_where_outputs_of_the_base_are_not_finite(tmp_path: Path) -> None:
    """A callback that compares errors sees NaN: nothing is better than before, so that nothing is kept."""
    base, folder = four_bits(tmp_path)
    with torch.no_grad():
        base.lm_head.weight[0, 0] = float("nan")
    model = peft.get_peft_model(base, lora())
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    peft.replace_lora_weights_loftq(model, model_path=str(folder), callback=lambda model, name: bool(outputs(model).pow(2).mean() < 1e9))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if "lora_" in name)


def test_replacing_by_loftq_from_weights_that_are_not_finite_names_the_layer(tmp_path: Path) -> None:
    base, folder = four_bits(tmp_path, lambda model: model.model.layers[0].self_attn.q_proj.weight[0, 0].fill_(float("nan")))
    model = peft.get_peft_model(base, lora())
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    with pytest.raises((ValueError, peft.PeftError), match=r"layers\.0\.self_attn\.q_proj"):
        peft.replace_lora_weights_loftq(model, model_path=str(folder))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if "lora_" in name)


# ---- dense layers of mixtures of experts --------------------------------------------------------------------------------


def qwen(kind: str) -> Any:
    """Return a mixture whose first layer is dense."""
    sizes = {**SIZES, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]}
    torch.manual_seed(0)
    if kind == "Qwen2Moe":
        sizes["shared_expert_intermediate_size"] = 24
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()


def deepseek(kind: str) -> Any:
    sizes = {**SIZES, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_shared_experts": 1}
    sizes |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1}
    sizes["num_key_value_heads"] = 4
    torch.manual_seed(0)
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes)).eval()


MIXTURES = {"Qwen2Moe": qwen, "Qwen3Moe": qwen, "DeepseekV3": deepseek}


@pytest.mark.parametrize("targets", [["gate_proj"], ["gate_proj", "up_proj", "down_proj"]], ids=["one", "all"])
@pytest.mark.parametrize("loader", ["peft", "transformers"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_dense_layer_of_a_mixture_that_is_named_in_full(kind: str, loader: str, targets: list[str], tmp_path: Path) -> None:
    """`gate_proj` of layer 0 is a linear layer; only those of experts became one parameter."""
    names = [f"model.layers.0.mlp.{name}" for name in targets]
    model = randomise(peft.get_peft_model(MIXTURES[kind](kind), lora(target_modules=names)))
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    assert len(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")) == 2 * len(names)
    if loader == "peft":
        again = peft.PeftModel.from_pretrained(MIXTURES[kind](kind), tmp_path)
    else:
        again = MIXTURES[kind](kind)
        again.load_adapter(str(tmp_path))
    assert worst(outputs(again), expected) < 1e-5


@pytest.mark.parametrize("loader", ["peft", "transformers"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_an_old_adapter_of_a_mixture_gives_the_outputs_it_gave(kind: str, loader: str, tmp_path: Path) -> None:
    """Experts were modules when the file was written."""
    base = MIXTURES[kind](kind)
    count = base.config.num_experts if hasattr(base.config, "num_experts") and kind != "DeepseekV3" else 4
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for expert in range(count):
            pieces = {}
            for name, (out, inp) in {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}.items():
                a, b = torch.randn(2, inp, generator=generator) * 0.3, torch.randn(out, 2, generator=generator) * 0.3
                stem = f"base_model.model.model.layers.1.mlp.experts.{expert}.{name}"
                found[f"{stem}.lora_A.weight"], found[f"{stem}.lora_B.weight"] = a, b
                pieces[name] = 1.5 * b @ a
            block = base.model.layers[1].mlp.experts
            block.gate_up_proj[expert] += torch.cat([pieces["gate_proj"], pieces["up_proj"]])
            block.down_proj[expert] += pieces["down_proj"]
    safetensors.torch.save_file(found, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [f"experts.{expert}.{name}" for expert in range(count) for name in ("gate_proj", "up_proj", "down_proj")]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if loader == "peft":
        model = peft.PeftModel.from_pretrained(MIXTURES[kind](kind), tmp_path)
    else:
        model = MIXTURES[kind](kind)
        model.load_adapter(str(tmp_path))
    assert worst(outputs(model), outputs(base)) < 1e-4
