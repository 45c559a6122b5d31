"""The wrapped model: what `PeftModel` and `PeftMixedModel` share. A view of an index, with forward, generate, save and load."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..base.view import checkpointed
from ..calls import checkpointing, generation
from ..calls import run as runner
from ..calls.routing import route_for
from ..checkpoint import load as loading
from ..checkpoint.files import find_weights
from ..checkpoint.load import LoadResult, Strict, TensorSource
from ..config import PeftConfig
from ..errors import ConfigError, MissingMethodError, PeftWarning
from ..inspection import parameters as counting
from ..layers.init_options import InitOptions
from ..operations.activate import activate, disabled, set_trainable
from ..operations.add import add_adapter, check_name, get_or_create_index
from ..plugins import hooks, registry
from ..tuners.index import ATTRIBUTE
from ..tuners.tasks import NO_TASK, TaskSpec
from .configs import check_same_effect, default_key_mapping, note_offload, read_config, take_hub_arguments
from .saving import Saving
from .tuner_model import TunerModel

CHECKPOINTED = "is_gradient_checkpointing"


class AdaptedModel(nn.Module, Saving):
    """A base model with adapters of any methods; see `PeftModel`."""

    task: ClassVar[TaskSpec] = NO_TASK
    #: what `strict` is where a call does not say
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
        check_name(index, adapter_name, spec)
        self.base_model: nn.Module = TunerModel(index) if spec.base_prefix.endswith(".model.") else model
        self.training = model.training
        self._add(adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage, source, strict, ignore_mismatched_sizes)
        model.__dict__[ATTRIBUTE] = index
        activate(index, [*index.active, adapter_name] if not new else [adapter_name], trainable=not peft_config.inference_mode)
        if getattr(getattr(model, "config", None), "pretraining_tp", 1) != 1:
            model.config.pretraining_tp = 1  # type: ignore[union-attr]
        # one that can't say counts as checkpointed; the class is asked, since transformers warns whoever asks the model
        if checkpointed(model) or not (hasattr(type(model), CHECKPOINTED) or CHECKPOINTED in model.__dict__):
            self.prepare_model_for_gradient_checkpointing(model)

    # ---- adapters --------------------------------------------------------------------------------------------------
    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False, autocast_adapter_dtype: bool = True) -> None:
        """Add a freshly initialised adapter, of the same method or another. It is neither in use nor trainable until `set_adapter`.

        Args:
            adapter_name: its name; no dots, not part of a parameter prefix.
            peft_config: its config; kept, not copied.
            low_cpu_mem_usage: weights on the meta device, to be loaded later.
            autocast_adapter_dtype: half-precision weights are kept in float32.

        Raises:
            AdapterNameError, ConfigError, NoMatchingPeftModuleError, UnsupportedModuleError, CapabilityError: the model is as before.
        """
        self._check_config(peft_config)
        self._add(adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage)

    def _add(
        self,
        name: str,
        config: PeftConfig,
        autocast: bool,
        meta: bool,
        source: TensorSource | None = None,
        strict: Strict = True,
        ignore: bool = False,
    ) -> LoadResult | None:
        index = self._peft_index
        if source is not None:
            source = loading.translated(index, config, source)
        whole = strict is True and not ignore
        init_options = InitOptions(meta=meta and (source is None or whole), autocast=autocast, initialise=source is None or not whole)
        result: list[LoadResult] = []
        add_adapter(
            index,
            name,
            config,
            init_options=init_options,
            heads=self.task.heads,
            mount_on=self,
            before_commit=None
            if source is None
            else lambda: result.append(loading.write_tensors(index, name, source, strict=strict, ignore_mismatched_sizes=ignore)),
        )
        return result[0] if result else None

    def _check_config(self, config: PeftConfig) -> None:
        if not isinstance(config, PeftConfig):
            raise ConfigError(f"peft_config is a {type(config).__name__}, not a PeftConfig", hint="use get_peft_config(dict) to make one of a dict")

    def _check_task(self, model: nn.Module) -> None:
        if self.task.generates and not hasattr(model, "prepare_inputs_for_generation"):
            raise MissingMethodError(
                f"{type(model).__name__} has no prepare_inputs_for_generation, which task_type={self.task.name} needs",
                hint="use a model with a language-modelling head, or another task_type",
            )

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model computes exactly what the base computes. Merged adapters are taken out first and stay out."""
        index = self._peft_index
        if any(config.shared_options().bias != "none" for config in index.configs.values()):
            warnings.warn(
                "Careful, disabling adapter layers with bias configured to be trained does not produce the same output as the base "
                "model would without adaption: the biases were trained in place.",
                PeftWarning,
                stacklevel=3,
            )
        with disabled(index):
            yield

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Make the outputs of the input embeddings require gradients, so that checkpointed layers of a frozen base get any.

        Args:
            model: the base; left alone if it is quantised.
        """
        if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_quantized", False):
            return model
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # type: ignore[operator]
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(checkpointing.require_output_grad)  # type: ignore[operator]
        return model

    # ---- calls -----------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, adapter_names: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        """Call the base with the adapters in use.

        Args:
            *args, **kwargs: as the base's forward takes them.
            adapter_names: for each sample the name of the adapter that it uses, a list of names, or ``"__base__"``.

        Raises:
            AdapterNotFoundError, CapabilityError, RoutingError: `adapter_names` can't be followed.
        """
        index = self._peft_index
        chosen = index.selection.task_route()
        if chosen is not None:
            with index.selection.use(chosen):
                return runner.run(index, self.base_model, self.task, args, kwargs, adapter_names)
        if adapter_names is None and not index.call_tuners:
            if index.base.training and not torch.compiler.is_compiling():
                checkpointing.prepare(index)  # adapters may be switched before the backward pass
            if index.call_arguments:
                kwargs = {name: value for name, value in kwargs.items() if name not in index.call_arguments}
            return self.base_model(*args, **kwargs)
        return runner.run(index, self.base_model, self.task, args, kwargs, adapter_names)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the base with its adapters in place, and leave to Python what chooses among them.

        Choosing adapters for the rows of a batch then compiles nothing again, as it would in ``torch.compile(model)``, which compiles the names
        into the graph. Switching between frozen adapters (``set_adapter(name, inference_mode=True)``), disabling them and `use_adapters` need no
        new graph either way; where `set_adapter` lets others train than before, one is needed.

        Args:
            *args, **kwargs: as for `torch.compile`.
        """
        self.get_base_model().compile(*args, **kwargs)

    def cached(self) -> contextlib.AbstractContextManager[None]:
        """Return a cache scope: ``with model.cached(): ...``. See `peft_core.cached`."""
        return self._peft_index.selection.cached()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load tensors; an open cache scope is emptied.

        Args:
            *args, **kwargs: as `nn.Module.load_state_dict` takes them.
        """
        try:
            return super().load_state_dict(*args, **kwargs)
        finally:
            self._peft_index.selection.drop_cached()

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation; training closes an open cache scope with a warning."""
        index = self.__dict__.get(ATTRIBUTE)
        if index is not None:
            if mode:
                index.selection.begin_training()
            index.selection.drop_cached()
        return super().train(mode)

    def generate(self, *args: Any, adapter_names: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        """Generate with the base and the adapters in use. Virtual tokens never appear in the result.

        Args:
            *args, **kwargs: as the base's generate takes them.
            adapter_names: as in `forward`; beams of a sample follow its adapter.

        Raises:
            AdapterNotFoundError, CapabilityError, RoutingError: `adapter_names` can't be followed.
            MissingMethodError: the base can't generate.
        """
        index = self._peft_index
        base = self.get_base_model()
        chosen = index.selection.task_route()
        if chosen is not None and chosen is not getattr(index.selection.local, "route", None):
            with index.selection.use(chosen):
                return self.generate(*args, adapter_names=adapter_names, **kwargs)
        if not hasattr(base, "generate"):
            raise MissingMethodError(f"{type(base).__name__} can't generate", hint="use a model with a language-modelling head")
        arguments = {name: kwargs.pop(name) for name in index.call_arguments if name in kwargs}
        if adapter_names is None and not index.call_tuners:
            with index.selection.cached(thread=True):
                return base.generate(*args, **kwargs)  # type: ignore[operator]
        if adapter_names is not None:
            some = (
                args[0]
                if args
                else next((v for v in (kwargs.get("inputs"), kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if v is not None), None)
            )
            if isinstance(some, Tensor):
                route_for(index, adapter_names, some.shape[0])  # checks the length
        with index.selection.cached(thread=True), runner.generating(index, self.task, adapter_names, arguments):
            generation.check_assisted(index, self.task, arguments, kwargs)
            if index.forward.encoder_decoder:
                args, kwargs = generation.encoder_arguments(index, self.task, arguments, args, kwargs)
            try:
                return base.generate(*args, **kwargs)  # type: ignore[operator]
            finally:
                base.__dict__.pop("_cache", None)  # older versions keep a cache of fixed size, which virtual tokens made larger

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
        """Read an adapter from a folder or the Hub. It is not put in use; an existing one of this name gets the file's weights.

        Everything is read and compared before the model is touched.

        Args:
            model_id: folder, or repository id.
            adapter_name: its name in this model.
            is_trainable: it may train; default frozen.
            torch_device: where tensors are read to before they are copied.
            autocast_adapter_dtype: half-precision weights are kept in float32.
            ephemeral_gpu_offload: noted in the config's `runtime_config`, where it has one.
            low_cpu_mem_usage: no memory for initial values.
            key_mapping: regular expression → replacement for the file's keys, behind `base_model.model.`.
            strict: True: missing and surplus tensors are errors; ``"warn"``: one warning; False: only returned. None: `strict_loading`, True
                unless a subclass says otherwise.
            ignore_mismatched_sizes: leave out tensors of other shapes with a warning.
            **kwargs: download options (`revision`, `subfolder`, `token`, ...).

        Returns:
            (missing_keys, unexpected_keys).

        Raises:
            ConfigFileError, AdapterFileError: there is no adapter.
            AdapterWeightsError: its tensors do not fit.
            ConfigError: an adapter of this name has another config.
        """
        hub = take_hub_arguments(kwargs)
        strict = self.strict_loading if strict is None else strict
        config = read_config(model_id, hub)
        config.inference_mode = not is_trainable
        note_offload(config, ephemeral_gpu_offload)
        index = self._peft_index
        mapping = key_mapping if key_mapping is not None else default_key_mapping(index, config)
        file = find_weights(model_id, **hub)
        source = TensorSource.of_file(file, torch_device, str(config.peft_type), config, mapping)
        if adapter_name in index.configs:
            source = loading.translated(index, config, source)
            check_same_effect(index.configs[adapter_name], config, adapter_name)
            result = loading.write_tensors(index, adapter_name, source, strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes)
        else:
            added = self._add(adapter_name, config, autocast_adapter_dtype, low_cpu_mem_usage, source, strict, ignore_mismatched_sizes)
            assert added is not None
            result = added
            set_trainable(index, adapter_name, is_trainable)
            if not is_trainable:
                self.eval()  # but not where only the weights of an adapter in training are replaced
        hooks.adapter_loaded(index.base, adapter_name, file.path.parent, str(model_id))
        return result

    # ---- looking ---------------------------------------------------------------------------------------------------
    def get_base_model(self) -> nn.Module:
        """Return the object that was wrapped; its layers still are."""
        base: nn.Module = self.base_model.model if isinstance(self.base_model, TunerModel) else self.base_model
        return base

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter → config, in load order."""
        return self._peft_index.configs

    @peft_config.setter
    def peft_config(self, configs: Mapping[str, PeftConfig]) -> None:
        """Exchange the configs of the adapters; what they have computed from the old ones stays."""
        present = self._peft_index.configs
        if not isinstance(configs, Mapping) or set(configs) != set(present) or not all(isinstance(each, PeftConfig) for each in configs.values()):
            raise ConfigError(f"peft_config takes a dict with a PeftConfig for each of {list(present)}", hint="add_adapter and delete_adapter")
        present.update(configs)
        self._peft_index.refresh()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return (numbers that train, all numbers) of this model; shared parameters count once."""
        return counting.count(self)

    def print_trainable_parameters(self) -> None:
        """Print how much of the model trains. (Differs from transformers' `num_parameters`: adapters are counted.)"""
        print(counting.summary(self))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or name == ATTRIBUTE:
                raise
            operation = self._operation(name)
            return getattr(self.base_model, name) if operation is None else operation
