"""What diffusers needs of the module `peft` (integrations.md §6): its model mixin, its LoRA files, hotswap, a pipeline, a DiT.

Run `python accept_diffusers.py` where diffusers 0.42 and a module `peft` are installed; see `_common.py` for what is printed.
"""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

from _common import check, close, differ, folder, no_meta, raises, randomise, run, same  # first: it sets the environment
from _diffusers import ATTENTION, adapted, drawn, flux, inputs, layers, listed, named_layers, pipeline, sampled, seen, unet, warnings_of, written

# isort: split

import torch
from diffusers.hooks import apply_layerwise_casting
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import USE_PEFT_BACKEND, is_peft_version
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import peft
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer, factorization
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

WEIGHTS = "pytorch_lora_weights.safetensors"


def versions() -> None:
    installed = importlib.metadata.version("peft")
    check("diffusers finds the module and the distribution named peft", USE_PEFT_BACKEND)
    check("the module and the distribution tell one version", peft.__version__ == installed, f"{peft.__version__} and {installed}")
    parsed = Version(installed)
    check("the version is a plain release", not (parsed.is_prerelease or parsed.local or parsed.epoch), installed)
    check("the version passes diffusers' gate", is_peft_version(">=", "0.17.0"))


def names_of_lokr() -> None:
    check("LoKrConfig is a PeftConfig", isinstance(LoKrConfig, type) and issubclass(LoKrConfig, PeftConfig))
    expected = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
    kind: Any = LoKrLayer
    named = set(kind.adapter_layer_names)
    check("LoKrLayer is a BaseTunerLayer that names its weights", issubclass(kind, BaseTunerLayer) and named == expected, named)
    cases = {(24, 8): (8, 3), (24, -1): (4, 6), (100, 3): (2, 50), (7, -1): (1, 7)}
    check("factorization splits a dimension", all(factorization(*given) == wanted for given, wanted in cases.items()))
    of_classes = isinstance(LoraLayer.adapter_layer_names, tuple) and isinstance(LoHaLayer.adapter_layer_names, tuple)
    check("LoraLayer and LoHaLayer name their weights on the class", of_classes and "lora_A" in LoraLayer.adapter_layer_names)


def mixin() -> None:
    model = unet()
    base, classes = sampled(model), {name: type(module) for name, module in model.named_modules()}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION)
    raises("a config that is none is refused", ValueError, lambda: unet().add_adapter({"r": 4}), "PeftConfig")
    raises("a prompt method is refused", ValueError, lambda: unet().add_adapter(PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")))
    model.add_adapter(config)
    check("a new adapter changes nothing", torch.equal(sampled(model), base))
    check("the model holds the config by name", model.peft_config["default"] is config)
    check("diffusers' None as the base's name is kept", config.base_model_name_or_path is None)
    check("active_adapters is the list that was set", model.active_adapters() == ["default"], model.active_adapters())
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    wanted = {name for name in classes if name.endswith(tuple(ATTENTION)) and "attn" in name}
    check("exactly the targets are wrapped", wrapped == wanted)
    check("r and lora_alpha are dicts by adapter", all(layer.r == {"default": 4} and layer.lora_alpha == {"default": 8} for layer in layers(model)))
    having = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    check("nothing but adapter layers has a base_layer", having == wrapped, having ^ wrapped)
    randomise(model)
    first = sampled(model)
    check("adapter weights act", differ(first, base))
    raises("an existing name is refused", ValueError, lambda: model.add_adapter(LoraConfig(target_modules=ATTENTION)), "already exists")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"]), "other")
    check("a second adapter becomes the active one", model.active_adapters() == ["other"] and torch.equal(sampled(model), base))
    randomise(model, "other", seed=9)
    second = sampled(model)
    check("a convolution takes an adapter", any(isinstance(layer.get_base_layer(), nn.Conv2d) for layer in layers(model)) and differ(second, base))
    model.set_adapter("default")
    check("set_adapter goes back to the first", close(sampled(model), first))
    model.set_adapter(["default", "other"])
    both = sampled(model)
    check("two active adapters both act", differ(both, first) and differ(both, second))
    check("every layer lists the active ones", all(list(layer.active_adapters) == ["default", "other"] for layer in layers(model)))
    raises("an unknown name is refused", ValueError, lambda: model.set_adapter("no"), "could not be found")
    for off, on in ((model.disable_adapters, model.enable_adapters), (model.disable_lora, model.enable_lora)):
        off()
        check(f"{off.__name__} leaves the base", torch.equal(sampled(model), base))
        on()
        check(f"{on.__name__} brings the adapters back", torch.equal(sampled(model), both))
    model.delete_adapters("no")
    check("deleting an adapter that is not there changes nothing", torch.equal(sampled(model), both))
    model.delete_adapters("other")
    model.set_adapter("default")
    gone = not [name for name, _ in model.named_parameters() if "other" in name.split(".")] and "other" not in model.peft_config
    check("delete_adapters removes one adapter alone", gone and close(sampled(model), first))
    model.unload_lora()
    unwrapped = {name: type(module) for name, module in model.named_modules()} == classes and not hasattr(model, "peft_config")
    check("unload_lora leaves the plain model", unwrapped and torch.equal(sampled(model), base))


def training() -> None:
    model = unet()
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=[*ATTENTION, "conv1"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    named = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    check("only the adapter trains", trained and all(".lora_A.default." in name or ".lora_B.default." in name for name in named))
    model.enable_gradient_checkpointing()
    model.train()
    optimizer, losses = torch.optim.Adam(trained, lr=0.02), []
    for _ in range(6):
        loss: Any = model(*inputs()).sample.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    check("training with gradient checkpointing lowers the loss", losses[-1] < 0.9 * losses[0], losses)
    now = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters() if ".lora_" not in name}
    check("training leaves the base as it was", same(now, frozen))


def weights() -> None:
    model = adapted("a", "b")
    model.set_adapters(["a"], 0.0)
    check("weight 0 is the base", close(sampled(model), sampled(unet()), 1e-6))
    model.set_adapters("a")
    plain = sampled(model)
    model.set_adapter("a")
    check("no weight is weight 1", torch.equal(plain, sampled(model)))
    model.set_adapters(["a"], [0.5])
    check("weight 1/2 is half of alpha", all(layer.scaling["a"] == 1.0 for layer in layers(model)))
    halved, twin = sampled(model), adapted("a", alpha=4)
    check("weight 1/2 acts as half of alpha", close(halved, sampled(twin)) and differ(halved, plain))
    model.set_adapters(["a", "b"], [0.7, 0.4])
    scales = {(round(layer.scaling["a"], 6), round(layer.scaling["b"], 6)) for layer in layers(model)}
    check("each adapter has its own weight", scales == {(1.4, 0.8)} and model.active_adapters() == ["a", "b"], scales)
    model.set_adapters("a", {"down": 0.25, "mid": 0.5, "up": 1.0})
    by_block = {name.split("_")[0]: layer.scaling["a"] for name, layer in named_layers(model).items()}
    check("weights per block", by_block == {"down": 0.5, "mid": 1.0, "up": 2.0}, by_block)
    model.add_adapter(LoraConfig(r=2, target_modules=["conv1"]), "c")
    model.set_adapters(["a", "c"], [1.0, 0.5])
    some = [layer for layer in layers(model) if "c" not in layer.r]
    check("a layer without the adapter ignores its weight", some and all("c" not in layer.scaling for layer in some))
    check("a layer without the adapter lists it all the same", all(list(layer.active_adapters) == ["a", "c"] for layer in some))
    raises("as many weights as adapters", ValueError, lambda: model.set_adapters(["a", "b"], [1.0]))


def scale_of_a_call() -> None:
    model = adapted("a")
    plain, before = sampled(model), [layer.scaling["a"] for layer in layers(model)]
    halved = sampled(model, cross_attention_kwargs={"scale": 0.5})
    check("cross_attention_kwargs scale acts for one call", close(halved, sampled(adapted("a", alpha=4))) and differ(halved, plain))
    check("the scale is back after the call", [layer.scaling["a"] for layer in layers(model)] == before and close(sampled(model), plain))
    check("scale 0 is the base", close(sampled(model, cross_attention_kwargs={"scale": 0.0}), sampled(unet()), 1e-6))
    check("after scale 0 the adapter acts again", close(sampled(model), plain))


def fusing() -> None:
    model = adapted("a", "b")
    model.set_adapters(["a", "b"], [0.7, 0.4])
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    loose = sampled(model)
    model.unfuse_lora()
    check("unfuse_lora of what is not fused does nothing", torch.equal(sampled(model), loose))
    model.fuse_lora()
    moved = all(differ(parameter, kept[name], 1e-6) for name, parameter in model.named_parameters() if name.endswith("base_layer.weight"))
    check("fused as loose, in the base's weights", moved and close(sampled(model), loose))
    check("layers list what is merged", all(set(layer.merged_adapters) == {"a", "b"} and layer.merged for layer in layers(model)))
    model.unfuse_lora()
    back = all(close(parameter, kept[name], 1e-6) for name, parameter in model.named_parameters())
    check("unfuse_lora brings the weights back", back and close(sampled(model), loose) and not any(layer.merged for layer in layers(model)))
    model.fuse_lora(adapter_names=["a"], safe_fusing=True)
    only = all(list(layer.merged_adapters) == ["a"] for layer in layers(model))
    model.unfuse_lora()
    check("fuse_lora of one adapter", only)
    single = adapted("a")
    single.fuse_lora(lora_scale=0.5)
    check("fuse_lora at a scale", close(sampled(single), sampled(adapted("a", alpha=4))))
    single.unload_lora()
    check("unload_lora after fusing keeps the fused weights", close(sampled(single), sampled(adapted("a", alpha=4))) and not layers(single))
    broken = adapted("a")
    next(parameter for name, parameter in broken.named_parameters() if "lora_B.a" in name).data.fill_(float("nan"))
    raises("safe_fusing refuses weights that are not finite", ValueError, lambda: broken.fuse_lora(safe_fusing=True))


def files() -> None:
    for what, settings in {"LoRA": {}, "DoRA": {"use_dora": True}, "LoRA with bias": {"lora_bias": True}}.items():
        model, place = adapted("default", targets=[*ATTENTION, "conv1", "proj_in"], **settings), folder()
        model.save_lora_adapter(place)
        written = load_file(place / WEIGHTS)
        plain = all("default" not in key.split(".") and "base_model" not in key for key in written)
        check(f"{what}: the file has neither prefix nor adapter name", plain and same(written, get_peft_model_state_dict(model)))
        other = unet()
        with warnings_of("diffusers.utils.peft_utils") as said:
            other.load_lora_adapter(place, prefix=None, use_safetensors=True)
        check(f"{what}: a file comes back as it was", close(sampled(other), sampled(model), 1e-6) and not said, said)
    with safe_open(place / WEIGHTS, framework="pt") as opened:
        header = json.loads(opened.metadata()[LORA_ADAPTER_METADATA_KEY])
    check("the header holds the config", header["r"] == 4 and header["lora_bias"] is True and header["peft_type"] == "LORA")
    check("the header has no runtime config", "runtime_config" not in header)
    wanted = listed(model.peft_config["default"])
    check("LoraConfig takes every key of to_dict", listed(LoraConfig(**header)) == wanted)
    raises("LoraConfig refuses an unknown key", TypeError, lambda: LoraConfig(**{**header, "of_the_future": 1}))
    check("a name is made up where none is given", list(other.peft_config) == ["default_0"])
    other.load_lora_adapter(place, prefix=None, use_safetensors=True)
    check("the next made-up name counts the adapters", list(other.peft_config) == ["default_0", "default_1"])
    plain_lora = adapted("default")
    light = unet()
    light.load_lora_adapter(get_peft_model_state_dict(plain_lora), prefix=None, adapter_name="x", low_cpu_mem_usage=True)
    check("nothing stays on meta with low_cpu_mem_usage", no_meta(light))


def ranks_from_weights() -> None:
    """Files of other writers have no header: diffusers infers a config with patterns like `^down_blocks.0.….to_q`."""
    patterned = {"rank_pattern": {"to_q": 2, "conv1": 6}, "alpha_pattern": {}}
    source = adapted("default", r=4, alpha=4, targets=[*ATTENTION, "conv1"], **patterned)
    source.set_adapter("default")
    for layer in layers(source):
        layer.scaling["default"] = 1.0  # without alphas in the file, diffusers takes alpha = the most frequent rank
    bare, model = get_peft_model_state_dict(source), unet()
    model.load_lora_adapter(dict(bare), prefix=None, adapter_name="x")
    ranks = {name: layer.r["x"] for name, layer in named_layers(model).items()}
    wanted = {key.split(".lora_B")[0]: value.shape[1] for key, value in bare.items() if "lora_B" in key}
    check("each layer gets the rank of its weights", ranks == wanted)
    check("diffusers' patterns stand in the config", all(key.startswith("^") for key in model.peft_config["x"].rank_pattern))
    check("the weights are those of the file", same(get_peft_model_state_dict(model, adapter_name="x"), bare))
    prefixed, again = {f"unet.{key}": value for key, value in bare.items()}, unet()
    alphas = {f"unet.{key.split('.lora_A')[0]}.alpha": float(3 if "to_k" in key else 5) for key in bare if "lora_A" in key}
    again.load_lora_adapter(dict(prefixed), prefix="unet", adapter_name="x", network_alphas=alphas)
    found = {name: layer.lora_alpha["x"] for name, layer in named_layers(again).items()}
    check("each layer gets its own alpha", found == {name: 3 if name.endswith("to_k") else 5 for name in found})
    methods: dict[str, dict[str, Any]] = {"DoRA": {"use_dora": True}, "bias": {"lora_bias": True}}
    for what, settings in methods.items():
        special, target = adapted("default", r=4, alpha=4, **settings), unet()
        with warnings_of("diffusers.utils.peft_utils") as said:
            target.load_lora_adapter(get_peft_model_state_dict(special), prefix=None, adapter_name="x")
        config = target.peft_config["x"]
        equal = close(sampled(target), sampled(special), 1e-6)
        check(f"{what} is seen from the weights", equal and (config.use_dora or config.lora_bias) and not said)
    surplus, target = {**bare, "mid_block.no_such.lora_A.weight": torch.zeros(4, 8)}, unet()
    with warnings_of("diffusers.utils.peft_utils") as said:
        target.load_lora_adapter(surplus, prefix=None, adapter_name="x")
    check("a key without a module is named in a warning", any("unexpected" in line and "no_such" in line for line in said), said)


def failing_loads() -> None:
    model = adapted("a")
    before, bare = sampled(model), get_peft_model_state_dict(model, adapter_name="a")
    broken = {key: torch.zeros(4, 7) if key.endswith("attn1.to_q.lora_A.weight") else value for key, value in bare.items()}
    raises("weights of a wrong shape are refused", (RuntimeError, ValueError), lambda: model.load_lora_adapter(broken, prefix=None, adapter_name="b"))
    check("a failed load leaves the other adapter alone", list(model.peft_config) == ["a"] and torch.equal(sampled(model), before))
    good = dict(bare)
    raises("an adapter's name is not taken twice", ValueError, lambda: model.load_lora_adapter(good, prefix=None, adapter_name="a"), "already in use")
    model.load_lora_adapter(good, prefix=None, adapter_name="b")
    check("the name is free after a failed load", list(model.peft_config) == ["a", "b"])
    fresh, stray = unet(), {"no_such.lora_A.weight": torch.zeros(4, 8), "no_such.lora_B.weight": torch.zeros(8, 4)}
    given = {"prefix": None, "adapter_name": "x"}
    raises("a file without a matching module is refused", ValueError, lambda: fresh.load_lora_adapter(stray, **given), "no_such")
    check("after that, no adapter has this name", "x" not in getattr(fresh, "peft_config", {}))
    fresh.load_lora_adapter(dict(bare), prefix=None, adapter_name="x")
    check("the model takes an adapter after that", list(fresh.peft_config) == ["x"] and differ(sampled(fresh), sampled(unet())))


def hotswap() -> None:
    sources = {"equal": adapted("s", alpha=3), "larger": adapted("s", r=8, alpha=4), "smaller": adapted("s", r=2, alpha=6)}
    bare = {name: get_peft_model_state_dict(source, adapter_name="s") for name, source in sources.items()}
    metadata = {name: source.peft_config["s"].to_dict() for name, source in sources.items()}
    model = unet()
    model.load_lora_adapter(get_peft_model_state_dict(adapted("s"), adapter_name="s"), prefix=None, adapter_name="x")
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    model.load_lora_adapter(dict(bare["equal"]), prefix=None, adapter_name="x", hotswap=True, metadata=metadata["equal"])
    check("hotswap writes into the same memory", {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers)
    check("hotswap takes weights and scaling", close(sampled(model), sampled(sources["equal"]), 1e-6))
    absent = {"prefix": None, "adapter_name": "no", "hotswap": True}
    raises("hotswap of an unknown adapter", ValueError, lambda: model.load_lora_adapter(dict(bare["equal"]), **absent), "no existing adapter")
    raises("hotswap is prepared before the first load", RuntimeError, model.enable_lora_hotswap, "before loading")
    dora = get_peft_model_state_dict(adapted("s", use_dora=True), adapter_name="s")
    given = {"prefix": None, "adapter_name": "x", "hotswap": True}
    raises("hotswap from LoRA to DoRA is refused", ValueError, lambda: model.load_lora_adapter(dora, **given))
    wide = unet()
    wide.enable_lora_hotswap(target_rank=8)
    wide.load_lora_adapter(dict(bare["equal"]), prefix=None, adapter_name="x", metadata=metadata["equal"])
    padded = {layer.lora_A["x"].weight.shape[0] for layer in layers(wide)}
    check("a prepared model is padded to the rank", padded == {8} and close(sampled(wide), sampled(sources["equal"]), 1e-6), padded)
    pointers = {name: parameter.data_ptr() for name, parameter in wide.named_parameters()}
    for name in ("larger", "smaller", "equal"):
        wide.load_lora_adapter(dict(bare[name]), prefix=None, adapter_name="x", hotswap=True, metadata=metadata[name])
        check(f"hotswap to the adapter of {name} rank", close(sampled(wide), sampled(sources[name])))
    check("padded hotswap stays in place", {name: parameter.data_ptr() for name, parameter in wide.named_parameters()} == pointers)


def loha() -> None:
    model = unet()
    base = sampled(model)
    model.add_adapter(LoHaConfig(r=4, alpha=4, target_modules=["to_q", "conv1"]))
    check("a new LoHa changes nothing", torch.equal(sampled(model), base))
    randomise(model, scale=0.5)
    acting = sampled(model)
    model.set_adapters("default", 0.5)
    check("LoHa has a weight", differ(acting, base) and differ(sampled(model), acting))
    model.set_adapters("default", 1.0)
    check("r of LoHa is a dict by adapter", all(layer.r == {"default": 4} for layer in layers(model)))
    model.fuse_lora()
    fused, merged = sampled(model), all(layer.merged for layer in layers(model))
    model.unfuse_lora()
    check("LoHa fuses and unfuses", merged and close(fused, acting) and close(sampled(model), acting))
    model.unload_lora()
    check("LoHa unloads", close(sampled(model), base) and not layers(model))


def layerwise_casting() -> None:
    def rounded(model: Any) -> Tensor:
        """What the adapted model says when its weights, and nothing else, went through the storage dtypes of `model`."""
        twin, stored = adapted("a"), dict(model.named_parameters())
        for name, parameter in twin.named_parameters():
            parameter.data.copy_(stored[name].data.float())
        return sampled(twin)

    plain = unet()
    plain.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    check("a model without adapters takes layerwise casting", bool(sampled(plain).isfinite().all()))
    model = adapted("a")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if ".lora_" in name}
    stored = {layer.get_base_layer().weight.dtype for layer in layers(model)}
    check("adapter weights are not cast, base weights are", dtypes == {torch.float32} and torch.float8_e4m3fn in stored, (dtypes, stored))
    check("the model runs on, with the adapter", close(sampled(model), rounded(model)) and differ(sampled(model), sampled(plain)))
    apply_layerwise_casting(whole := adapted("a"), torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("norm",))
    dtypes = {parameter.dtype for name, parameter in whole.named_parameters() if ".lora_" in name}
    check("adapter weights are cast where asked, inputs are not", dtypes == {torch.float8_e4m3fn} and close(sampled(whole), rounded(whole)), dtypes)


def stable_diffusion() -> None:
    def trained() -> bool:
        """What diffusers' training scripts do to go on from a file: weights into a text encoder that has the adapter."""
        source, target = pipeline().text_encoder, pipeline().text_encoder
        for model in (source, target):
            model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
        randomise(source)
        state = get_peft_model_state_dict(source)
        result = set_peft_model_state_dict(target, state, adapter_name="default")
        return not result.unexpected_keys and same(get_peft_model_state_dict(target), state)

    check("a text encoder's training goes on from a state dict", trained())
    (first, image), (second, _) = written(3), written(4)
    pipe = pipeline()
    base = drawn(pipe)
    pipe.load_lora_weights(first, adapter_name="a")
    check("a pipeline's file comes back as it was", close(drawn(pipe), image) and differ(image, base))
    check("both parts have the adapter", pipe.get_list_adapters() == {"unet": ["a"], "text_encoder": ["a"]}, pipe.get_list_adapters())
    check("nothing of the pipeline stays on meta", no_meta(pipe.unet) and no_meta(pipe.text_encoder))
    pipe.load_lora_weights(second, adapter_name="b", low_cpu_mem_usage=False)
    pipe.set_adapters(["a", "b"], adapter_weights=[0.5, {"unet": 0.25, "text_encoder": 0.75}])
    scales = {part: {layer.scaling["b"] for layer in layers(getattr(pipe, part))} for part in ("unet", "text_encoder")}
    both = drawn(pipe)
    check("a pipeline's weights per part", scales == {"unet": {0.375}, "text_encoder": {1.125}} and differ(both, image), scales)
    check("a pipeline tells its active adapters", pipe.get_active_adapters() == ["a", "b"], pipe.get_active_adapters())
    pipe.set_lora_device(["a", "b"], "cpu")
    pipe.fuse_lora(components=["unet", "text_encoder"])
    check("a pipeline fuses both parts", close(drawn(pipe), both) and pipe.num_fused_loras == 2 and pipe.fused_loras == {"a", "b"})
    pipe.unfuse_lora(components=["unet", "text_encoder"])
    check("a pipeline unfuses", close(drawn(pipe), both) and pipe.num_fused_loras == 0)
    pipe.disable_lora()
    check("a pipeline disables", close(drawn(pipe), base))
    pipe.enable_lora()
    pipe.set_adapters("a")
    check("a pipeline enables", close(drawn(pipe), image))
    pipe.delete_adapters("b")
    check("a pipeline deletes one adapter", pipe.get_list_adapters() == {"unet": ["a"], "text_encoder": ["a"]} and close(drawn(pipe), image))
    pipe.unload_lora_weights()
    check("a pipeline unloads", close(drawn(pipe), base) and not layers(pipe.unet) and not layers(pipe.text_encoder))


def transformer() -> None:
    model = flux()
    base = seen(model)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "proj_mlp", "proj_out"]))
    randomise(model, scale=0.3)
    acting, place = seen(model), folder()
    check("a diffusion transformer takes an adapter", differ(acting, base))
    check("joint_attention_kwargs scale 0 is the base", close(seen(model, joint_attention_kwargs={"scale": 0.0}), base, 1e-6))
    check("the adapter acts after that", close(seen(model), acting, 1e-6))
    model.save_lora_adapter(place, weight_name="dit.safetensors")
    other = flux()
    other.load_lora_adapter(place, weight_name="dit.safetensors", prefix=None, use_safetensors=True, adapter_name="x")
    check("its file comes back as it was", close(seen(other), acting, 1e-6))
    model.fuse_lora(safe_fusing=True)
    check("it fuses", close(seen(model), acting) and all(layer.merged for layer in layers(model)))


if __name__ == "__main__":
    themes = [versions, names_of_lokr, mixin, training, weights, scale_of_a_call, fusing, files, ranks_from_weights, failing_loads, hotswap, loha]
    run("accept_diffusers", [*themes, layerwise_casting, stable_diffusion, transformer])
