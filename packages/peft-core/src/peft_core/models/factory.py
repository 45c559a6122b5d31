"""Functions that create adapted models, and functions that also take models with injected adapters."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

from torch import Tensor, nn

from ..base.wrappers import unwrapped, whole_parameters
from ..checkpoint import embeddings
from ..checkpoint import load as loading
from ..checkpoint.files import find_weights
from ..checkpoint.load import LoadResult, Strict, TensorSource
from ..checkpoint.state_dict import adapter_tensors
from ..config import PeftConfig
from ..errors import CapabilityError, ConfigError, PeftWarning
from ..layers.init_options import InitOptions
from ..operations.activate import follow_model, set_trainable
from ..operations.add import add_adapter, get_or_create_index
from ..plugins import hooks, registry
from ..tensor_names import key_renamer
from ..tuners.index import AdapterIndex, adapted_model, require_index
from ..tuners.review import InjectionReview
from .adapted import AdaptedModel
from .chosen_modules import view_for_state_dict
from .configs import checked_hub_arguments
from .mixed_model import PeftMixedModel
from .peft_model import PeftModel


@overload
def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: Literal[False] = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel: ...


@overload
def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    *,
    mixed: Literal[True],
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftMixedModel: ...


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel | PeftMixedModel:
    """Wrap a base model with a new adapter. `peft_config.task_type` determines the class of the returned model.

    Args:
        model: the base, modified in place.
        peft_config: the config of the new adapter; its `base_model_name_or_path` is set to the base's name.
        adapter_name: the adapter's name.
        mixed: return a `PeftMixedModel`, whatever the task.
        autocast_adapter_dtype: create the adapter's weights in float32 if they would be in half precision.
        revision: the revision of the base, stored in the config.
        low_cpu_mem_usage: create the adapter's weights on the meta device, to be loaded later.

    Raises:
        UnknownTunerError, PluginError: the method is not installed, or its plugin is broken.
        AdapterNameError, ConfigError, NoMatchingPeftModuleError, UnsupportedModuleError: the base is unchanged.

    Example:
        >>> model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    """
    kind = PeftMixedModel if mixed else PeftModel
    return wrap(kind, model, peft_config, adapter_name, autocast_adapter_dtype, revision, low_cpu_mem_usage)


def wrap(
    kind: type[PeftModel] | type[PeftMixedModel],
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str,
    autocast_adapter_dtype: bool,
    revision: str | None,
    low_cpu_mem_usage: bool,
) -> PeftModel | PeftMixedModel:
    """Implement `get_peft_model`; the class of the returned model is the one that `kind.class_for` returns for the task."""
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(f"peft_config is a {type(peft_config).__name__}, not a PeftConfig", hint="use get_peft_config(dict) to make one of a dict")
    task = str(peft_config.task_type) if peft_config.task_type is not None else ""
    before = {name: getattr(peft_config, name) for name in ("base_model_name_or_path", "revision")}
    name = getattr(unwrapped(model), "name_or_path", None)
    name = name if isinstance(name, str) and name else None
    if before["base_model_name_or_path"] not in (None, name):
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from {before['base_model_name_or_path']!r} to {name!r}",
            PeftWarning,
            stacklevel=3,
        )
    peft_config.base_model_name_or_path = name
    if revision is not None:
        if before["revision"] not in (None, revision):
            warnings.warn(
                f"peft config has already set base model revision to {before['revision']}, overwriting with revision {revision}",
                PeftWarning,
                stacklevel=3,
            )
        peft_config.revision = revision
    try:
        return kind.class_for(task)(
            model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage
        )
    except Exception:
        for field, value in before.items():
            setattr(peft_config, field, value)
        raise


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Add an adapter to a model without wrapping it: the model keeps its class and gets `model.peft_config`.

    The new adapter becomes the only active one. `requires_grad` of the other adapters does not change.

    Args:
        peft_config: the config of the new adapter.
        model: the model, changed in place.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the weights on the meta device, to be loaded later.
        state_dict: its keys (not the values) decide which modules are adapted, instead of the config.

    Returns:
        `model`.

    Raises:
        CapabilityError: the method must act in each forward call of the model (virtual tokens, context for its layers), which needs a wrapper.
        ConfigError: `peft_config` is not a `PeftConfig`.
        others: as in `get_peft_model`; the model is unchanged.
    """
    return inject(peft_config, model, adapter_name, low_cpu_mem_usage, state_dict)


def inject(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str,
    low_cpu_mem_usage: bool,
    state_dict: Mapping[str, Any] | None,
    review: Callable[[AdapterIndex], InjectionReview] | None = None,
) -> nn.Module:
    """Implement `inject_adapter_in_model`; the `InjectionReview` that `review` returns for the index checks the adapter."""
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(f"peft_config is a {type(peft_config).__name__}, not a PeftConfig")
    spec = registry.resolve(str(peft_config.peft_type))
    index, _ = get_or_create_index(model)
    if registry.tuner_class(spec.peft_type)(spec, index.selection).takes_part_in_calls:
        raise CapabilityError(
            f"{spec.peft_type} can't be injected: it takes part in calls, and a bare model does not ask it", hint="use get_peft_model"
        )
    view = None if state_dict is None else view_for_state_dict(index, peft_config, adapter_name, state_dict)
    # the dtype of the base: a model that is not wrapped is cast as a whole by whoever has it
    add_adapter(
        index,
        adapter_name,
        peft_config,
        init_options=InitOptions(meta=low_cpu_mem_usage, autocast=False, from_file=state_dict is not None),
        view=view,
        mount_on=index.base,
        adapt_config=True,
        review=None if review is None else review(index),
    )
    index.attach()
    follow_model(index)
    index.selection.select([adapter_name])
    set_trainable(index, adapter_name, not peft_config.inference_mode)
    hooks.adapter_activated(index.base, index.active)
    return model


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """Return the tensors of one adapter under the names that they have in its file.

    Args:
        model: a `PeftModel`, or a model with injected adapters (then the names have no prefix `base_model.model.`). It may be inside a
            wrapper of another library (compiled, parallel, sharded). Under FSDP1 the tensors come from the state dict of the FSDP model, so every
            process must call this function.
        state_dict: a state dict of `model` from which to take the tensors, instead of from the model.
        adapter_name: the name of the adapter.
        unwrap_compiled: accepted for compatibility; has no effect.
        save_embedding_layers: as in `PeftModel.save_pretrained`.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
    """
    index = require_index(model)
    index.require(adapter_name)
    wrapped = isinstance(adapted_model(model), AdaptedModel)
    embedded = embeddings.slots_to_save(index, adapter_name, save_embedding_layers, wrapped=wrapped)
    return adapter_tensors(index, adapter_name, wrapped=wrapped, state_dict=state_dict, model=model, further=embedded)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    strict: Strict = False,
) -> LoadResult:
    """Write tensors, named as in a file, into an adapter.

    Args:
        model: a `PeftModel`, or a model with injected adapters; the keys may have the prefix `base_model.model.` or not. The model may be
            inside a wrapper of another library (compiled, parallel, sharded). Under FSDP1 the parameters are gathered in every process, so every
            process must call this function.
        peft_model_state_dict: name → tensor.
        adapter_name: the name of the adapter.
        ignore_mismatched_sizes: skip tensors whose shape differs from the adapter's, with a warning.
        low_cpu_mem_usage: has no effect: parameters on the meta device are always replaced by the given tensors.
        strict: as in `PeftModel.load_adapter`.

    Returns:
        (missing_keys, unexpected_keys).

    Raises:
        AdapterNotFoundError: the model has no such adapter.
        AdapterWeightsError: the tensors do not match the adapter; nothing was written.
        ConfigError: `peft_model_state_dict` is not a mapping.
    """
    index = require_index(model)
    index.require(adapter_name)
    if not isinstance(peft_model_state_dict, Mapping):
        raise ConfigError(f"peft_model_state_dict is a {type(peft_model_state_dict).__name__}", hint="give a dict: name → tensor")
    with whole_parameters(model):
        return loading.write_tensors(
            index,
            adapter_name,
            loading.translated(index, copy.copy(index.configs[adapter_name]), TensorSource.of(peft_model_state_dict)),
            wrapped=isinstance(adapted_model(model), AdaptedModel),
            strict=strict,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )


def load_peft_weights(
    model_id: str | os.PathLike[str], device: str | None = None, key_mapping: Mapping[str, str] | None = None, **hub_kwargs: Any
) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file.

    Args:
        model_id: the folder, or the repository id on the Hub, of the adapter.
        device: the device of the returned tensors; None: the CPU.
        key_mapping: as in `PeftModel.load_adapter`.
        **hub_kwargs: download options, and `subfolder`.

    Raises:
        AdapterFileError: there is no such file.
    """
    rename = key_renamer(key_mapping)
    file = find_weights(model_id, **checked_hub_arguments(hub_kwargs))
    return {rename(name): tensor for name, tensor in file.tensors(device).items()}
