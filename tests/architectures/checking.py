"""One method on one architecture: compared with the formula on the bare base, or refused with a typed error."""

from __future__ import annotations

import copy
import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from architectures.building import IDS, Architecture, inputs, output
from peft_core import BaseTunerLayer, PeftError, PeftModel, get_peft_model
from peft_loha import LoHaConfig
from peft_lora import LoraConfig
from peft_prompt import CPTConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from peft_tokens import TrainableTokensConfig

N = 3
LAYERS: dict[str, Callable[..., Any]] = {
    "LoRA": lambda **fields: LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", **fields),
    "DoRA": lambda **fields: LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", use_dora=True, **fields),
    "LoHa": lambda **fields: LoHaConfig(r=2, alpha=3, target_modules="all-linear", **fields),
    "tokens": lambda **fields: TrainableTokensConfig(token_indices=[3, 5, 33], **fields),
}
PROMPTS: dict[str, Callable[..., Any]] = {
    "prompt": lambda **fields: PromptTuningConfig(num_virtual_tokens=N, **fields),
    "p-tuning": lambda **fields: PromptEncoderConfig(num_virtual_tokens=N, encoder_hidden_size=8, **fields),
    "prefix": lambda **fields: PrefixTuningConfig(num_virtual_tokens=N, **fields),
    "CPT": lambda **fields: CPTConfig(cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3], **fields),
}
METHODS = (*LAYERS, *PROMPTS)


class Wrong(AssertionError):
    """A method gives something else than its formula, or an error that is not typed."""


def methods_for(architecture: Architecture) -> tuple[str, ...]:
    """Return the methods that are for an architecture's kind."""
    if architecture.kind in ("image", "audio"):
        return tuple(name for name in LAYERS if name != "tokens")
    return METHODS if architecture.kind == "causal" else tuple(name for name in METHODS if name != "CPT" and (architecture.task or name in LAYERS))


def check(architecture: Architecture, make: Callable[[], Any], method: str) -> str:
    """Return "right", or why the method is refused.

    Args:
        architecture: the class.
        make: makes a model of it.
        method: one of `METHODS`.

    Raises:
        Wrong: it is neither.
    """
    config = {**LAYERS, **PROMPTS}[method]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check(architecture, make, method, config)
    except PeftError as error:
        return f"refused: {' '.join(str(error).split())}"
    except Wrong:
        raise
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    return "right"


def _check(architecture: Architecture, make: Callable[[], Any], method: str, config: Callable[..., Any]) -> None:
    model = filled(get_peft_model(make(), config(task_type=architecture.task)))
    with torch.no_grad():
        found = output(model, architecture)
        expected = EXPECTED[method](architecture, make(), model)
    length = min(found.shape[1], expected.shape[1]) if found.ndim > 2 else found.shape[1]
    if found.ndim > 2 and architecture.kind in ("causal", "seq2seq"):
        found, expected = found[:, -length:], expected[:, -length:]
    _close(found, expected, "forward")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(make(), folder).eval()
        _close(output(again, architecture)[:, -length:] if found.ndim > 2 else output(again, architecture), found, "loaded")
        if architecture.kind == "causal" and hasattr(model.get_base_model(), "generate"):
            _check_generation(model, architecture)
    _check_step(model, architecture)
    if method in LAYERS:
        with torch.no_grad():
            merged = filled(get_peft_model(make(), config(task_type=architecture.task))).merge_and_unload()
            _close(output(merged, architecture), found, "merged")


def filled(model: Any) -> Any:
    """Fill what trains with numbers, the same ones each time, and return the model in evaluation."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad:
                strength = 0.1 if "magnitude" in name else 0.3
                noise = torch.randn(p.shape, generator=generator) * strength
                p.copy_(p + noise if "magnitude" in name else noise)
    return model.eval()


def _close(found: Tensor, expected: Tensor, what: str) -> None:
    if found.shape != expected.shape:
        raise Wrong(f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    error, size = float((found - expected).abs().max()), max(1.0, float(expected.abs().max()))
    if not error < 2e-3 * size:
        raise Wrong(f"{what}: off by {error:.2g} of {size:.2g}")


def _check_generation(model: Any, architecture: Architecture) -> None:
    ids, mask = IDS, torch.ones_like(IDS)
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=1)
    for _ in range(3):
        logits = output(model, architecture, input_ids=ids, attention_mask=torch.ones_like(ids))[:, -1]
        logits[:, _ends(model)] = -torch.inf  # min_new_tokens
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    if found.tolist() != ids.tolist():
        plain, by_hand = model.get_base_model(), IDS
        with model.disable_adapter():
            base = plain.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=1)
            for _ in range(3):
                logits = plain(input_ids=by_hand, attention_mask=torch.ones_like(by_hand)).logits[:, -1]
                logits[:, _ends(model)] = -torch.inf
                by_hand = torch.cat([by_hand, logits.argmax(-1, keepdim=True)], 1)
        if base.tolist() == by_hand.tolist():  # else the base itself writes something else step by step
            raise Wrong("generate: other tokens than step by step")


def _ends(model: Any) -> list[int]:
    found = model.get_base_model().generation_config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _check_step(model: Any, architecture: Architecture) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    output(model, architecture).float().square().mean().backward()
    if not any(p.grad is not None and bool(p.grad.any()) for p in model.parameters()):
        raise Wrong("training step: no gradient reaches the adapter")
    if any(p.grad is not None for name, p in model.get_base_model().named_parameters() if not p.requires_grad):
        raise Wrong("training step: the base gets gradients")
    model.eval()


# ---- the formulas ------------------------------------------------------------------------------------------------------
def _with_deltas(architecture: Architecture, base: Any, model: Any) -> Tensor:
    """The bare base with s·B·A added to its weights, from the tensors of the adapter."""
    for path, delta in _deltas(model):
        module, name = base.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        weight = getattr(module, name)
        setattr(module, name, nn.Parameter(weight + delta.reshape(weight.shape).to(weight.dtype)))  # of this module alone, where others have it, too
    return output(base, architecture)


def _deltas(model: Any) -> Iterator[tuple[str, Tensor]]:
    done = set()
    for path, layer in model.get_base_model().named_modules():
        clean = path.replace(".base_layer", "")
        if clean in done or not isinstance(layer, BaseTunerLayer):
            continue
        done.add(clean)
        around = [layer.weight_name] if not hasattr(layer, "around") else [each.weight_name for each in layer.around()]
        for name in around:
            more = {"parameter": name} if hasattr(layer, "around") else {}
            yield f"{clean}.{name}", layer.get_delta_weight("default", **more).detach()


def _merged_by_layers(architecture: Architecture, base: Any, model: Any) -> Tensor:
    """The bare base with the weights that `merge_adapter` makes."""
    model.merge_adapter()
    try:
        found = model.get_base_model().named_parameters(remove_duplicate=False)
        weights = {path.replace(".base_layer", ""): nn.Parameter(p.detach().clone()) for path, p in found}
    finally:
        model.unmerge_adapter()
    for path, _ in list(base.named_parameters(remove_duplicate=False)):
        if path in weights:
            setattr(base.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], weights[path])
    return output(base, architecture)


def _with_rows(architecture: Architecture, base: Any, model: Any) -> Tensor:
    rows = model.get_base_model().get_input_embeddings().trainable_tokens_delta["default"]
    base.get_input_embeddings().weight[[3, 5, 33]] = rows
    return output(base, architecture)


def _embedded(architecture: Architecture, base: Any, model: Any) -> Tensor:
    """The bare base on the prompt's embeddings, before those of the text."""
    count = IDS.shape[0]
    given = inputs(architecture, base)
    prompt = model.get_prompt(count)
    if architecture.kind == "seq2seq":
        prompt = prompt[:, :N]  # the encoder's; files of this format have as many again for the decoder, which no one reads
    ids = given.pop("input_ids")
    tokens = base.get_input_embeddings()(ids)
    inner = next((module for module in base.modules() if hasattr(module, "get_per_layer_inputs")), None)
    if inner is not None and base.config.get_text_config().hidden_size_per_layer_input:
        padded = torch.cat([ids.new_zeros(count, N), ids], 1)
        given["per_layer_inputs"] = inner.get_per_layer_inputs(padded)
    given["attention_mask"] = torch.cat([given["attention_mask"].new_ones(count, prompt.shape[1]), given["attention_mask"]], 1)
    given["inputs_embeds"] = torch.cat([prompt.to(tokens.dtype), tokens], 1)
    found: Tensor = base(**given).logits
    return found


def _cached(architecture: Architecture, base: Any, model: Any) -> Tensor:
    """The bare base with a cache that is filled by hand: layer by layer, keys before values, of each what the layer has room for."""
    from transformers import DynamicCache, EncoderDecoderCache

    count = IDS.shape[0]
    encoder = model.prompt_encoder["default"]
    given = inputs(architecture, base)
    text = base.config.get_text_config(decoder=True)
    measured = copy.deepcopy(base)  # some modules keep states of their own
    seen = getattr(measured(**given), "past_key_values", None)
    if seen is None and architecture.kind == "causal":  # it makes none, and may fill one
        seen = DynamicCache(config=text)
        measured(**given, past_key_values=seen)
    layers = getattr(getattr(seen, "self_attention_cache", seen), "layers", [])
    cache = DynamicCache() if architecture.kind == "seq2seq" else DynamicCache(config=text)
    table = encoder.embedding.weight.view(N, 2 * encoder.layers, encoder.heads, encoder.head_dim)
    for number in range(len(layers) or encoder.layers):
        layer = layers[number] if layers else None
        if layer is not None and getattr(layer, "keys", None) is None:
            continue
        part = encoder.order[number]
        keys, values = table[:, 2 * part], table[:, 2 * part + 1]
        if layer is not None:
            keys, values = (t[:, : of.shape[1], : of.shape[3]] for t, of in ((keys, layer.keys), (values, layer.values)))
        k, v = (t.transpose(0, 1).expand(count, -1, -1, -1) for t in (keys, values))
        cache.update(k.contiguous(), v.contiguous(), number)
    given["past_key_values"] = EncoderDecoderCache(cache, DynamicCache()) if architecture.kind == "seq2seq" else cache
    if architecture.kind == "seq2seq":
        given["decoder_attention_mask"] = IDS.new_ones(count, N + IDS.shape[1])
    else:
        given["attention_mask"] = IDS.new_ones(count, N + IDS.shape[1])
        hybrid = any(getattr(layer, "keys", None) is None for layer in layers)
        if hybrid and "position_ids" in inspect.signature(type(base).forward).parameters:  # else a layer without keys is asked for the length
            given["position_ids"] = N + torch.arange(IDS.shape[1]).expand(count, -1)
    found: Tensor = base(**given).logits
    return found


EXPECTED: dict[str, Callable[[Architecture, Any, Any], Tensor]] = {
    "LoRA": _with_deltas,
    "DoRA": _merged_by_layers,
    "LoHa": _merged_by_layers,
    "tokens": _with_rows,
    "prompt": _embedded,
    "p-tuning": _embedded,
    "prefix": _cached,
    "CPT": _embedded,
}
