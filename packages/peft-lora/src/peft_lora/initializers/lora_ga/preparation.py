"""LoRA-GA (arXiv 2407.05000): compute the gradients of the loss whose singular vectors initialise A and B."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import ConfigError, PeftWarning
from peft_core.errors import did_you_mean, listed

from ...config import LoraConfig
from ...planning.target_resolution import planned
from ..tensor_files import tensors_in, write_tensors
from .initializer import GRADIENT, LIKE

SCALINGS = ("paper", "peft")


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], Any] | None,
    cache_file: str | None = None,
    *,
    like: str = "paper",
) -> None:
    """Compute the mean gradient of each weight that `lora_config` targets; `get_peft_model(model, lora_config)` initialises A and B from it.

    Args:
        model: the base model, without adapters; each target module gets attributes, which are deleted when the adapter is added.
        lora_config: a config with `init_lora_weights="lora_ga"`.
        train_step: function that runs one or more forward and backward passes without an optimiser step; may be None if `cache_file` exists.
            While it runs, only the targeted weights get gradients; afterwards `requires_grad` and the gradients of all parameters and the training
            mode of all modules are restored.
        cache_file: file that stores the gradients; it is read if it exists, and written otherwise.
        like: ``"paper"``: scale A and B as the authors do; ``"peft"``: as Hugging Face's peft does (`peft_lora.initializers.lora_ga.initializer`).

    Raises:
        ConfigError: the config does not select LoRA-GA, `like` is unknown, there is neither `train_step` nor a file, a target is quantised, no target
            gets a gradient, or the file does not fit the model.
    """
    if lora_config.init_lora_weights != "lora_ga" or lora_config.lora_ga_config is None:
        raise ConfigError(
            f"init_lora_weights is {lora_config.init_lora_weights!r}", hint="LoraConfig(init_lora_weights='lora_ga', lora_ga_config=LoraGAConfig(…))"
        )
    if like not in SCALINGS:
        raise ConfigError(f"like={like!r} is unknown", hint=did_you_mean(like, SCALINGS) or f"write one of {SCALINGS}")
    modules = {name: module for name, (module, _) in planned(model, lora_config).items()}
    weights = {name: _weight_of(name, module) for name, module in modules.items()}
    gradients: Mapping[str, Tensor | None]
    if cache_file is not None and os.path.exists(cache_file) and os.path.getsize(cache_file):
        gradients = _cached(cache_file, weights)
    elif train_step is None:
        raise ConfigError("there is no train_step, and no cache_file that exists", hint="pass a function that runs forward and backward")
    else:
        gradients = mean_gradients(model, modules, weights, train_step)
        if cache_file is not None:
            write_tensors(cache_file, {f"{name}.{GRADIENT}": g for name, g in gradients.items() if g is not None})
    _report_missing(gradients)
    for name, module in modules.items():
        setattr(module, GRADIENT, gradients[name])
        setattr(module, LIKE, like)


def _weight_of(name: str, module: Any) -> nn.Parameter:
    """Return the weight of a targeted module; raise a ConfigError if it is quantised, so that it can't get a gradient."""
    weight = module.weight
    if not weight.is_floating_point() or type(weight) is not nn.Parameter:
        raise ConfigError(f"{name!r} is quantised: its weight can't get a gradient", hint="load the base in float32, float16 or bfloat16")
    return weight


def _report_missing(gradients: Mapping[str, Tensor | None]) -> None:
    """Warn about weights that got no gradient; raise a ConfigError if no weight got one."""
    without = [name for name, gradient in gradients.items() if gradient is None]
    if len(without) == len(gradients):
        raise ConfigError("no targeted weight has a gradient", hint="does train_step call backward on a loss of this model?")
    if without:
        warnings.warn(f"{listed(without, 4)} got no gradient and will start as with init_lora_weights=True", PeftWarning, stacklevel=3)


def mean_gradients(
    model: nn.Module, modules: Mapping[str, nn.Module], weights: Mapping[str, nn.Parameter], train_step: Callable[[], Any]
) -> dict[str, Tensor | None]:
    """Return a dict from name to the weight's gradient divided by the number of backward passes through its module; None if it got no gradient.

    Args:
        model: the model; it is in training mode while `train_step` runs.
        modules, weights: the targeted modules and their weights, by module name.
        train_step: function that runs forward and backward passes.
    """
    passes = dict.fromkeys(modules, 0)
    handles = []
    for name, module in modules.items():

        def count(_: Any, name: str = name) -> None:
            passes[name] += 1

        def watch(module: nn.Module, args: Any, output: Any, count: Callable[[Any], None] = count) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(count)  # type: ignore[no-untyped-call]

        handles.append(module.register_forward_hook(watch))
    try:
        with _only_these_train(model, weights.values()), torch.enable_grad():
            train_step()
            return {name: None if weight.grad is None else weight.grad / max(passes[name], 1) for name, weight in weights.items()}
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _only_these_train(model: nn.Module, weights: Any) -> Iterator[None]:
    wanted = set(map(id, weights))
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        yield
    finally:
        for parameter, trains, gradient in before:
            parameter.requires_grad_(trains)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode


def _cached(path: str, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor | None]:
    held = tensors_in(path)
    found = {name: held.get(f"{name}.{GRADIENT}") for name in weights}
    if all(gradient is None for gradient in found.values()):
        raise ConfigError(f"{path!r} has no gradient for any target", hint="it is another model's; delete it, or name another file")
    for name, gradient in found.items():
        if gradient is not None and gradient.shape != weights[name].shape:
            raise ConfigError(f"the gradient of {name!r} in {path!r} is {tuple(gradient.shape)}, its weight {tuple(weights[name].shape)}")
    return found
