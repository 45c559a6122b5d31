"""What `PeftModel` and `PeftMixedModel` share beside calls: making one from files, and looking at it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..checkpoint.files import find_weights
from ..checkpoint.load import Strict, TensorSource
from ..checkpoint.stack import read_stack
from ..config import PeftConfig
from ..errors import ConfigError, ModelError
from ..inspection.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from ..plugins import hooks
from .adapted import AdaptedModel
from .configs import note_offload, read_config, take_hub_arguments

if TYPE_CHECKING:
    from typing_extensions import Self  # of Python 3.11


class LoadableModel(AdaptedModel):
    """A base model with adapters of any methods, which can be made from files."""

    @classmethod
    def class_for(cls, task: str) -> type[Any]:
        """Return the class of models for a `task`, as in `TaskType`."""
        return cls

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        torch_device: str | None = None,
        strict: Strict | None = None,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Wrap a base with an adapter from a folder or the Hub. Everything is compared before the base is touched.

        Args:
            model: the base.
            model_id: folder, or repository id.
            adapter_name: its name in this model; the files do not hold one.
            is_trainable: it goes on training; default frozen and in eval mode.
            config: use this config instead of the file's.
            autocast_adapter_dtype, ephemeral_gpu_offload, low_cpu_mem_usage, key_mapping, torch_device, strict, ignore_mismatched_sizes:
                as `load_adapter`.
            **kwargs: download options (`revision`, `subfolder`, `token`, ...).

        Raises:
            ConfigFileError, AdapterFileError: there is no adapter.
            AdapterWeightsError: its tensors do not fit; the base is as before.
            ConfigError: `config` is no config, or its values do not suit the base.
        """
        hub = take_hub_arguments(kwargs)
        if config is None:
            config = read_config(model_id, hub)
        elif not isinstance(config, PeftConfig):
            raise ConfigError(f"The input config must be a PeftConfig, got {type(config).__name__}", hint="use get_peft_config(dict)")
        note_offload(config, ephemeral_gpu_offload)
        before, config.inference_mode = config.inference_mode, not is_trainable
        task = str(config.task_type) if config.task_type is not None else None
        target = cls.class_for(task or "")
        try:
            mapping = key_mapping
            if mapping is None and not config.is_prompt_learning:
                mapping = getattr(model, "_checkpoint_conversion_mapping", None) or None
            file = find_weights(model_id, **hub)
            source = TensorSource.of_file(file, torch_device, str(config.peft_type), config, mapping)
            wrapped = target(
                model,
                config,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                source=source,
                strict=cls.strict_loading if strict is None else strict,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
            )
        except BaseException:
            config.inference_mode = before
            raise
        hooks.adapter_loaded(model, adapter_name, file.path.parent, str(model_id))
        found: Self = wrapped if is_trainable else wrapped.eval()
        return found

    @classmethod
    def from_stack(cls, model: nn.Module, directory: str | os.PathLike[str], is_trainable: bool = False, *, strict: Strict | None = None) -> Self:
        """Wrap a base with all adapters that `save_pretrained` of a model with several wrote, in their order, those in use in use again.

        Args:
            model: the base.
            directory: the folder with `peft_stack.json`.
            is_trainable: the adapters in use go on training; default frozen and in eval mode.
            strict: as `load_adapter`.

        Raises:
            AdapterFileError: there is no manifest, or it names what is not there.
            others: as `from_pretrained`; the base is as before.
        """
        stack = read_stack(directory)
        root = Path(directory)
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        was_training = model.training
        first, *others = stack.members
        wrapped = cls.from_pretrained(model, root / first.folder, first.name, is_trainable, strict=strict)
        try:
            for member in others:
                wrapped.load_adapter(root / member.folder, member.name, is_trainable, strict=strict)
            wrapped.set_adapter(stack.active, inference_mode=not is_trainable)
        except BaseException:
            wrapped.unload()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            model.train(was_training)
            raise
        return wrapped

    # ---- looking ---------------------------------------------------------------------------------------------------
    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Return the status of every module that holds adapter weights."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """Return the status of the adapters as a whole."""
        return get_model_status(self)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write or update `README.md` in the folder `output_dir`, which is created if missing. Doing it twice changes nothing."""
        from ..checkpoint import model_card
        from ..checkpoint.files import AtomicFolder

        target = Path(output_dir) / "README.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        with AtomicFolder() as folder:
            folder.text(target, model_card.render(self._peft_index, target))

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the adapter in use (of the first, if there are several).

        Raises:
            ModelError: none is in use.
        """
        index = self._peft_index
        if not index.active:
            raise ModelError("no adapter is active", hint="set_adapter one")
        return index.configs[index.active[0]]

    @property
    def peft_type(self) -> str | None:
        """The method of the first adapter."""
        first = next(iter(self._peft_index.configs.values()), None)
        return first.peft_type if first is not None else None
