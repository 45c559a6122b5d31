"""Loads adapters from files; the code that `PeftModel.load_adapter` and `from_pretrained` share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..checkpoint.files import WeightFile, find_weights
from ..checkpoint.load import LoadResult, Strict, TensorSource, translated, write_tensors
from ..config import PeftConfig
from ..errors import ConfigError
from ..layers.init_options import InitOptions
from ..operations.activate import set_trainable
from ..operations.add import add_adapter
from ..plugins import hooks
from ..tuners.index import AdapterIndex
from .configs import check_same_effect, default_key_mapping, read_config, set_ephemeral_offload


@dataclass(frozen=True)
class LoadOptions:
    """The options with which an adapter is loaded.

    Args:
        trainable: whether the adapter is trainable.
        device: the device to which the tensors are read before they are copied into the model.
        autocast: create the adapter's weights in float32 if they would be in half precision.
        offload: the value of `ephemeral_gpu_offload`, stored in the config's `runtime_config`, if the config has one.
        meta: do not allocate memory for initial values of the weights.
        key_mapping: regular expression → replacement for the file's keys; None: the base's `key_mapping`, if it has one.
        strict: True: missing and unexpected tensors are errors. ``"warn"``: they give one warning. False: they are only returned.
        ignore_mismatched_sizes: skip tensors whose shape differs from the model's, with a warning.
        hub: options of a download from the Hub.
    """

    trainable: bool = False
    device: str | None = None
    autocast: bool = True
    offload: bool = False
    meta: bool = False
    key_mapping: Mapping[str, str] | None = None
    strict: Strict = True
    ignore_mismatched_sizes: bool = False
    hub: Mapping[str, Any] = field(default_factory=dict)

    def config(self, model_id: str | os.PathLike[str], given: PeftConfig | None = None) -> PeftConfig:
        """Return the adapter's config: `given`, or, if that is None, the config read from the file.

        Raises:
            UnknownTunerError, ConfigFileError: as in `PeftConfig.from_pretrained`.
            ConfigError: `given` is not a `PeftConfig`.
        """
        if given is not None and not isinstance(given, PeftConfig):
            raise ConfigError(f"The input config must be a PeftConfig, got {type(given).__name__}", hint="use get_peft_config(dict)")
        config = read_config(model_id, self.hub) if given is None else given
        set_ephemeral_offload(config, self.offload)
        return config

    def source(self, model_id: str | os.PathLike[str], config: PeftConfig, base: nn.Module) -> tuple[WeightFile, TensorSource]:
        """Find the adapter's weight file, and return it with a `TensorSource` for its tensors, which are not read yet.

        Raises:
            AdapterFileError: there is no weight file.
        """
        mapping = self.key_mapping if self.key_mapping is not None else default_key_mapping(base, config)
        file = find_weights(model_id, **self.hub)
        return file, TensorSource.of_file(file, self.device, str(config.peft_type), config, mapping)


def add(
    index: AdapterIndex,
    name: str,
    config: PeftConfig,
    options: LoadOptions,
    source: TensorSource | None = None,
    *,
    heads: Sequence[str],
    mount_on: nn.Module,
) -> LoadResult | None:
    """Add an adapter to a model, with newly initialised weights or with the tensors of `source`.

    Args:
        index: the adapters of the model.
        name: the name of the new adapter.
        config: the config of the new adapter; this object is stored, not a copy.
        options: the options with which the adapter is loaded.
        source: the adapter's tensors; None: the weights are newly initialised.
        heads: names of heads that the model's task saves whole.
        mount_on: the module to which modules that do not wrap a module of the base are added.

    Returns:
        The missing and the unexpected keys of `source`; None if `source` is None.

    Raises:
        AdapterNameError, ConfigError, NoMatchingPeftModuleError, UnsupportedModuleError, CapabilityError, AdapterWeightsError: the model is
            unchanged.
    """
    if source is None:
        init_options = InitOptions(meta=options.meta, autocast=options.autocast)
        add_adapter(index, name, config, init_options=init_options, heads=heads, mount_on=mount_on)
        return None
    source = translated(index, config, source)
    entire = options.strict is True and not options.ignore_mismatched_sizes  # all initial values will be overwritten
    init_options = InitOptions(meta=options.meta and entire, autocast=options.autocast, initialise=not entire, from_file=True)
    result: list[LoadResult] = []

    def write() -> None:
        result.append(write_tensors(index, name, source, strict=options.strict, ignore_mismatched_sizes=options.ignore_mismatched_sizes))

    add_adapter(index, name, config, init_options=init_options, heads=heads, mount_on=mount_on, before_commit=write)
    return result[0]


def load(
    index: AdapterIndex, model_id: str | os.PathLike[str], name: str, options: LoadOptions, *, heads: Sequence[str], mount_on: nn.Module
) -> LoadResult:
    """Load an adapter from a folder or the Hub into a model that already has adapters; see `PeftModel.load_adapter`."""
    config = options.config(model_id)
    config.inference_mode = not options.trainable
    file, source = options.source(model_id, config, index.base)
    if name in index.configs:
        source = translated(index, config, source)
        _check_over(index, name, config)
        result = write_tensors(index, name, source, strict=options.strict, ignore_mismatched_sizes=options.ignore_mismatched_sizes)
    else:
        added = add(index, name, config, options, source, heads=heads, mount_on=mount_on)
        assert added is not None
        result = added
        set_trainable(index, name, options.trainable)
        if not options.trainable:
            mount_on.eval()  # not done above, where only the weights of an existing adapter are replaced: it may be in training
    hooks.adapter_loaded(index.base, name, file.path.parent, str(model_id))
    return result


def _check_over(index: AdapterIndex, name: str, config: PeftConfig) -> None:
    """Check that tensors saved with `config` can replace the weights of the existing adapter `name`.

    Raises:
        ConfigError: with the existing adapter's config, the tensors would compute something else, or they belong to a different base weight.
    """
    present = index.configs[name]
    kind = str(present.peft_type)
    tuner = index.tuners[kind]
    check_same_effect(present, config, name, allowed=tuner.start_fields)
    if any(getattr(present, field, None) != getattr(config, field, None) for field in tuner.start_fields):
        tuner.check_start(name, config, {path: module for (method, path), module in index.modules_of(name) if method == kind})
