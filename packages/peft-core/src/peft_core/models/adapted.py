"""`AdaptedModel`, the base class of `PeftModel` and `PeftMixedModel`. Its methods call functions that take the `AdapterIndex`."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ..base.view import checkpointed
from ..base.wrappers import unwrapped
from ..calls import checkpointing, generation, run
from ..checkpoint import model_card, save
from ..checkpoint.load import LoadResult, Strict, TensorSource
from ..checkpoint.stack import read_stack
from ..config import PeftConfig
from ..errors import ConfigError, MissingMethodError, ModelError, PeftWarning
from ..inspection import parameters as counting
from ..inspection.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from ..operations.activate import activate_new, disabled
from ..operations.add import get_or_create_index
from ..plugins import hooks, registry
from ..tuners.adapter_names import check_name
from ..tuners.index import ATTRIBUTE, AdapterIndex
from ..tuners.tasks import NO_TASK, TaskSpec
from . import loading
from .adapter_operations import AdapterOperations, callable_base
from .configs import checked_hub_arguments
from .loading import LoadOptions
from .tuner_model import TunerModel
from .uploading import hub_options, upload_folder
from .write_through import WriteThrough

if TYPE_CHECKING:
    from typing_extensions import Self  # of Python 3.11

CHECKPOINTED = "is_gradient_checkpointing"


class AdaptedModel(WriteThrough, AdapterOperations):
    """A base model with adapters of any methods; see `PeftModel`."""

    task: ClassVar[TaskSpec] = NO_TASK
    #: the value of `strict` if a call does not pass it
    strict_loading: ClassVar[Strict] = True

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        source: TensorSource | None = None,
        strict: Strict = True,
        ignore_mismatched_sizes: bool = False,
    ) -> None:
        super().__init__()
        self._check_config(peft_config)
        self._check_task(model)
        index, new = get_or_create_index(model)
        if not new:
            warnings.warn(
                "the model already has adapters; the new one is added beside them (unload() first to start anew)", PeftWarning, stacklevel=4
            )
        self.__dict__[ATTRIBUTE] = index
        spec = registry.resolve(str(peft_config.peft_type))
        check_name(adapter_name, index.configs)
        called = callable_base(model)
        self.base_model: nn.Module = self._tuner_model(index, peft_config, called) if spec.base_prefix.endswith(".model.") else called
        self.training = model.training
        for path, mounted in index.mounts().items():  # those of another wrapper of the same base, which this one shares
            if index.base._modules.get(path) is not mounted:  # without a wrapper they are children of the base
                self.add_module(path, mounted)
        options = LoadOptions(autocast=autocast_adapter_dtype, meta=low_cpu_mem_usage, strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes)
        loading.add(index, adapter_name, peft_config, options, source, heads=self.task.heads, mount_on=self)
        index.attach(with_configs=isinstance(self.base_model, TunerModel))
        activate_new(index, adapter_name, [] if new else index.active, trainable=not peft_config.inference_mode)
        base = index.base
        if getattr(getattr(base, "config", None), "pretraining_tp", 1) != 1:
            base.config.pretraining_tp = 1  # type: ignore[union-attr]
        # without the attribute, assume checkpointing; look the attribute up in the class, since reading the property gives a warning
        if checkpointed(base) or not (hasattr(type(base), CHECKPOINTED) or CHECKPOINTED in base.__dict__):
            self.prepare_model_for_gradient_checkpointing(base)

    def _tuner_model(self, index: AdapterIndex, config: PeftConfig, called: nn.Module) -> TunerModel:
        """Return the `TunerModel` between this model and its base, for the first adapter's `config`; its forward calls `called`."""
        return TunerModel(index, called, self.restores_base)

    # ---- making one ------------------------------------------------------------------------------------------------
    @classmethod
    def class_for(cls, task: str) -> type[Any]:
        """Return the class to instantiate for a `task`, a value of `TaskType`."""
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
        """Wrap a base with an adapter from a folder or the Hub. All tensors are checked before the base is changed.

        Args:
            model: the base.
            model_id: the folder, or the repository id on the Hub, of the adapter.
            adapter_name: the adapter's name in this model; files do not contain a name.
            is_trainable: True: the adapter is trainable. False: it is frozen, and the model is in eval mode.
            config: the config to use instead of the config file.
            autocast_adapter_dtype, ephemeral_gpu_offload, low_cpu_mem_usage, key_mapping, torch_device, strict, ignore_mismatched_sizes:
                as in `load_adapter`.
            **kwargs: download options (`revision`, `subfolder`, `token`, ...).

        Raises:
            ConfigFileError, AdapterFileError: there is no adapter at `model_id`.
            AdapterWeightsError: the adapter's tensors do not match the base; the base is unchanged.
            ConfigError: `config` is not a `PeftConfig`, or its values do not suit the base.
        """
        options = LoadOptions(
            is_trainable,
            torch_device,
            autocast_adapter_dtype,
            ephemeral_gpu_offload,
            low_cpu_mem_usage,
            key_mapping,
            cls.strict_loading if strict is None else strict,
            ignore_mismatched_sizes,
            checked_hub_arguments(kwargs),
        )
        config = options.config(model_id, config)
        before, config.inference_mode = config.inference_mode, not is_trainable
        target = cls.class_for(str(config.task_type) if config.task_type is not None else "")
        try:
            file, source = options.source(model_id, config, unwrapped(model))
            wrapped = target(
                model,
                config,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                source=source,
                strict=options.strict,
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
        """Wrap a base with all adapters that `save_pretrained` of a model with several adapters wrote.

        The order of the adapters and the set of active adapters are restored.

        Args:
            model: the base.
            directory: the folder that contains the manifest, `peft_stack.json`.
            is_trainable: True: the active adapters are trainable. False: they are frozen, and the model is in eval mode.
            strict: as in `load_adapter`.

        Raises:
            AdapterFileError: there is no manifest, or it names files or folders that do not exist.
            others: as in `from_pretrained`; the base is unchanged.
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
            wrapped.unload(restore_base=True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            model.train(was_training)
            raise
        return wrapped

    # ---- adapters --------------------------------------------------------------------------------------------------
    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False, autocast_adapter_dtype: bool = True) -> None:
        """Add a newly initialised adapter of any method. It is neither active nor trainable until `set_adapter` is called.

        Args:
            adapter_name: the name of the new adapter, without dots. A name with slashes (``"a/b"``) is saved in nested folders.
            peft_config: the config of the new adapter; this object is stored, not a copy.
            low_cpu_mem_usage: create the weights on the meta device, to be loaded later.
            autocast_adapter_dtype: create the adapter's weights in float32 if they would be in half precision.

        Raises:
            AdapterNameError, ConfigError, NoMatchingPeftModuleError, UnsupportedModuleError, CapabilityError: the model is unchanged.
        """
        self._check_config(peft_config)
        options = LoadOptions(autocast=autocast_adapter_dtype, meta=low_cpu_mem_usage)
        loading.add(self._peft_index, adapter_name, peft_config, options, heads=self.task.heads, mount_on=self)

    def _check_config(self, config: PeftConfig) -> None:
        if not isinstance(config, PeftConfig):
            raise ConfigError(f"peft_config is a {type(config).__name__}, not a PeftConfig", hint="use get_peft_config(dict) to make one of a dict")

    def _check_task(self, model: nn.Module) -> None:
        if self.task.generates and not hasattr(unwrapped(model), "prepare_inputs_for_generation"):
            raise MissingMethodError(
                f"{type(model).__name__} has no prepare_inputs_for_generation, which task_type={self.task.name} needs",
                hint="use a model with a language-modelling head, or another task_type",
            )

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disable all adapters inside the block: the model computes what the base computes. Merged adapters are unmerged first and stay unmerged."""
        with disabled(self._peft_index):
            yield

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Make the outputs of the input embeddings require gradients, so that gradients flow through checkpointed layers of a frozen base.

        Args:
            model: the base; a quantised base is not changed.
        """
        checkpointing.prepare_inputs(model)
        return model

    # ---- calls -----------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, adapter_names: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        """Call the base with the active adapters.

        Args:
            *args, **kwargs: the arguments of the base's `forward`.
            adapter_names: for each sample of the batch the name of its adapter, a list of names, or ``"__base__"`` for no adapter.

        Raises:
            AdapterNotFoundError, CapabilityError, RoutingError: `adapter_names` can't be applied.
        """
        return run.forward(self._peft_index, self.base_model, self.task, args, kwargs, adapter_names)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the base with its adapters in place; the code that selects adapters stays uncompiled Python.

        With this method, other adapters for the samples of a batch (`adapter_names`) need no recompilation. With ``torch.compile(model)`` they do,
        because it compiles the names into the graph. With both, no new graph is needed to switch between frozen adapters
        (``set_adapter(name, inference_mode=True)``), to disable adapters, or for `use_adapters`; and a new graph is needed if `set_adapter` changes
        which adapters are trainable.

        Args:
            *args, **kwargs: the arguments of `torch.compile`.
        """
        self.get_base_model().compile(*args, **kwargs)

    def cached(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager in which values computed from weights are cached: ``with model.cached(): ...``. See `peft_core.cached`."""
        return self._peft_index.selection.cached()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict as `nn.Module.load_state_dict` does, and empty the cache of an open `cached` scope.

        Args:
            *args, **kwargs: the arguments of `nn.Module.load_state_dict`.
        """
        try:
            return super().load_state_dict(*args, **kwargs)
        finally:
            self._peft_index.selection.drop_cached()

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode. Training mode closes an open `cached` scope with a warning."""
        index = self.__dict__.get(ATTRIBUTE)
        if index is not None:
            if mode:
                index.selection.begin_training()
            index.selection.drop_cached()
        return super().train(mode)

    def generate(self, *args: Any, adapter_names: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        """Generate with the base and the active adapters. Virtual tokens never appear in the result.

        Args:
            *args, **kwargs: the arguments of the base's `generate`.
            adapter_names: as in `forward`; all beams of a sample use the adapter of that sample.

        Raises:
            AdapterNotFoundError, CapabilityError, RoutingError: `adapter_names` can't be applied.
            MissingMethodError: the base has no method `generate`.
        """
        return generation.generate(self._peft_index, self.task, args, kwargs, adapter_names)

    # ---- saving and loading ----------------------------------------------------------------------------------------
    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        strict: Strict | None = None,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> LoadResult:
        """Load an adapter from a folder or the Hub, without activating it. If the model has an adapter of this name, its weights are replaced.

        All tensors are read and checked before the model is changed.

        Args:
            model_id: the folder, or the repository id on the Hub, of the adapter.
            adapter_name: the adapter's name in this model.
            is_trainable: whether the adapter is trainable; by default it is frozen.
            torch_device: the device to which the tensors are read before they are copied into the model.
            autocast_adapter_dtype: create the adapter's weights in float32 if they would be in half precision.
            ephemeral_gpu_offload: stored in the config's `runtime_config`, if the config has one.
            low_cpu_mem_usage: do not allocate memory for initial values of the weights.
            key_mapping: regular expression → replacement for the part of the file's keys after `base_model.model.`.
            strict: True: missing and unexpected tensors are errors. ``"warn"``: they give one warning. False: they are only returned. None: the
                class attribute `strict_loading` decides, which is True unless a subclass overrides it.
            ignore_mismatched_sizes: skip tensors whose shape differs from the model's, with a warning.
            **kwargs: download options (`revision`, `subfolder`, `token`, ...).

        Returns:
            (missing_keys, unexpected_keys).

        Raises:
            ConfigFileError, AdapterFileError: there is no adapter at `model_id`.
            AdapterWeightsError: the adapter's tensors do not match the model.
            ConfigError: the model has an adapter of this name with a different config.
        """
        options = LoadOptions(
            is_trainable,
            torch_device,
            autocast_adapter_dtype,
            ephemeral_gpu_offload,
            low_cpu_mem_usage,
            key_mapping,
            self.strict_loading if strict is None else strict,
            ignore_mismatched_sizes,
            checked_hub_arguments(kwargs),
        )
        return loading.load(self._peft_index, model_id, adapter_name, options, heads=self.task.heads, mount_on=self)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        *,
        state_dict: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the adapters and a model card: ``default`` in the directory itself, every other adapter in a subfolder with its name.

        Either all files are written or none. The network is used only with `push_to_hub`.

        Args:
            save_directory: the folder to write to; created if missing.
            safe_serialization: True: save in the safetensors format. False: save a pickled dict of tensors.
            selected_adapters: the names of the adapters to save; None: all.
            save_embedding_layers: whether to save the base's embeddings, too: True, False, or ``"auto"`` (if they are targeted or resized).
            is_main_process: False: only create the folders.
            path_initial_model_for_weight_conversion: the folder where the adapter was saved directly after its creation. An adapter whose
                initialisation subtracted a matrix from the base (PiSSA, ...) is then saved as an adapter for the original base. This model does
                not change.
            state_dict: take the tensors from this dict (with the names of this model) instead of from the model.
            push_to_hub: upload the folder afterwards, to `repo_id` or to a repository with the folder's name.
            **kwargs: options of the upload (`repo_id`, `private`, `token`, `revision`, `commit_message`). Options that only apply to saving a
                whole model (`save_function`, `max_shard_size`, `variant`) have no effect.

        Raises:
            TypeError: `kwargs` has an unknown keyword.
            AdapterFileError: `save_directory` is a file.
            AdapterNotFoundError: `selected_adapters` has a name that the model has no adapter for.
            CapabilityError: adapters of this method can't be converted.
        """
        upload = hub_options(kwargs, push_to_hub, save_directory)
        save.save_adapters(
            self._peft_index,
            save_directory,
            model=self,
            safe_serialization=safe_serialization,
            selected_adapters=[selected_adapters] if isinstance(selected_adapters, str) else selected_adapters,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            state_dict=state_dict,
            initial=path_initial_model_for_weight_conversion,
        )
        if upload is not None and is_main_process:
            upload_folder(save_directory, **upload)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload adapter",
        **save_options: Any,
    ) -> Any:
        """Save the adapters (never the base) and upload the folder to the Hub.

        Args:
            repo_id: the repository; created if it does not exist.
            private, token, revision, commit_message: as in huggingface_hub.
            **save_options: further arguments of `save_pretrained`.

        Returns:
            What `huggingface_hub.HfApi.upload_folder` returns.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_options)
            return upload_folder(folder, repo_id, private=private, token=token, revision=revision, commit_message=commit_message)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write or update `README.md` in the folder `output_dir`, which is created if missing. A second call changes nothing."""
        model_card.write(self._peft_index, output_dir)

    # ---- looking ---------------------------------------------------------------------------------------------------
    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Return the status of every module that holds adapter weights."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """Return the status of the adapters as a whole."""
        return get_model_status(self)

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the active adapter (of the first one, if several are active).

        Raises:
            ModelError: no adapter is active.
        """
        index = self._peft_index
        if not index.active:
            raise ModelError("no adapter is active", hint="set_adapter one")
        return index.configs[index.active[0]]

    @property
    def peft_type(self) -> str | None:
        """The `peft_type` (the method) of the first adapter; None if there is no adapter."""
        first = next(iter(self._peft_index.configs.values()), None)
        return first.peft_type if first is not None else None

    def get_base_model(self) -> nn.Module:
        """Return the object that was wrapped, including wrappers of other libraries that it already had. Its layers still have their adapters."""
        base: nn.Module = self.base_model.model if isinstance(self.base_model, TunerModel) else self.base_model
        return base

    def _wrapped_base(self) -> nn.Module:
        return self.get_base_model()

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter → config, in load order."""
        return self._peft_index.configs

    @peft_config.setter
    def peft_config(self, configs: Mapping[str, PeftConfig]) -> None:
        """Replace the configs of the adapters. Values that were computed from the old configs do not change."""
        present = self._peft_index.configs
        if not isinstance(configs, Mapping) or set(configs) != set(present) or not all(isinstance(each, PeftConfig) for each in configs.values()):
            raise ConfigError(f"peft_config takes a dict with a PeftConfig for each of {list(present)}", hint="add_adapter and delete_adapter")
        present.update(configs)
        self._peft_index.refresh()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return (number of trainable elements, number of all elements) of this model's parameters; shared parameters count once."""
        return counting.count(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trainable. (Unlike transformers' `num_parameters`, this counts the parameters of adapters, too.)"""
        print(counting.summary(self))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or name == ATTRIBUTE:
                raise
            operation = self._operation(name)
            return getattr(self.base_model, name) if operation is None else operation
