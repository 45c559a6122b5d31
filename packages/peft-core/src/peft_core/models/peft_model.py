"""`PeftModel` and its task classes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoint.files import find_weights
from ..checkpoint.load import Strict, Tensors
from ..checkpoint.stack import read_stack
from ..config import PeftConfig, TaskType
from ..errors import CapabilityError, ConfigError, ModelError
from ..inspection.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from ..plugins import hooks
from ..tuners.call import Call
from ..tuners.tasks import TASKS
from .adapted import AdaptedModel
from .configs import read_config, take_hub_arguments


class PeftModel(AdaptedModel):
    """A base model with adapters.

    The base is modified in place: layers are wrapped, its parameters are frozen, the adapter's train (unless the config is for
    inference). Several adapters, also of different methods, can be added, used alone, together, or each for some rows of a batch.

    Args:
        model: the base; a transformers model, or any `nn.Module` for methods that wrap layers.
        peft_config: config of the first adapter; kept, not copied.
        adapter_name: its name.
        autocast_adapter_dtype: half-precision adapter weights are kept in float32.
        low_cpu_mem_usage: weights on the meta device, to be loaded later.

    Raises:
        UnknownTunerError, PluginError: the method is not installed, or its plugin is broken.
        AdapterNameError, ConfigError, NoMatchingPeftModuleError, UnsupportedModuleError: the base is as before.

    Example:
        >>> model = PeftModel(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        >>> model.print_trainable_parameters()
    """

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        torch_device: str | None = None,
        strict: Strict = True,
        **kwargs: Any,
    ) -> PeftModel:
        """Wrap a base with an adapter from a folder or the Hub. Everything is compared before the base is touched.

        Args:
            model: the base.
            model_id: folder, or repository id.
            adapter_name: its name in this model; the files do not hold one.
            is_trainable: it goes on training; default frozen and in eval mode.
            config: use this config instead of the file's.
            autocast_adapter_dtype, low_cpu_mem_usage, key_mapping, torch_device, strict: as `load_adapter`.
            **kwargs: download options (`revision`, `subfolder`, `token`, ...).

        Raises:
            ConfigFileError, AdapterFileError: there is no adapter.
            AdapterWeightsError: its tensors do not fit; the base is as before.
        """
        hub = take_hub_arguments(kwargs)
        if config is None:
            config = read_config(model_id, hub)
        elif not isinstance(config, PeftConfig):
            raise ConfigError(f"The input config must be a PeftConfig, got {type(config).__name__}", hint="use get_peft_config(dict)")
        before, config.inference_mode = config.inference_mode, not is_trainable
        task = str(config.task_type) if config.task_type is not None else None
        target = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task or "", cls)
        try:
            mapping = key_mapping
            if mapping is None and not config.is_prompt_learning:
                mapping = getattr(model, "_checkpoint_conversion_mapping", None) or None
            file = find_weights(model_id, **hub)
            source = Tensors.of_file(file, torch_device, str(config.peft_type), config, mapping)
            wrapped = target(
                model,
                config,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                source=source,
                strict=strict,
            )
        except BaseException:
            config.inference_mode = before
            raise
        hooks.adapter_loaded(model, adapter_name, file.path.parent, str(model_id))
        return wrapped if is_trainable else wrapped.eval()

    @classmethod
    def from_stack(cls, model: nn.Module, directory: str | os.PathLike[str], is_trainable: bool = False, *, strict: Strict = True) -> PeftModel:
        """Wrap a base with all adapters that `save_pretrained` of a model with several wrote, in their order, those in use in use again.

        Args:
            model: the base.
            directory: the folder with `peft_stack.json`.
            is_trainable: the adapters in use go on training; default frozen and in eval mode.
            strict: as `load_adapter`.

        Raises:
            AdapterFileError: there is no manifest, or it names what is not there.
            others as `from_pretrained`; the base is as before.
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
        """Write or update `README.md` in a folder. Doing it twice changes nothing."""
        from ..checkpoint import model_card
        from ..checkpoint.files import AtomicFolder

        target = Path(output_dir) / "README.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        with AtomicFolder() as folder:
            folder.text(target, model_card.render(self._peft_index, target))

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the adapter in use (of the first, if there are several)."""
        index = self._peft_index
        if not index.active:
            raise ModelError("no adapter is active", hint="set_adapter one")
        return index.configs[index.active[0]]

    @property
    def peft_type(self) -> str | None:
        """The method of the first adapter."""
        first = next(iter(self._peft_index.configs.values()), None)
        return first.peft_type if first is not None else None

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of all modules that adapters save whole; None if there are none."""
        names = {name for config in self._peft_index.configs.values() for name in config.extras().modules_to_save}
        names |= set(self.task.heads)
        return names or None

    @property
    def special_peft_forward_args(self) -> set[str]:
        """Keywords that the model takes for itself and does not pass to the base."""
        return {"adapter_names", "alora_offsets", *self._peft_index.call_arguments}

    @property
    def base_model_torch_dtype(self) -> Any:
        """The base's dtype, or None."""
        return getattr(self.get_base_model(), "dtype", None)

    @property
    def transformer_backbone_name(self) -> str:
        """The name of the base's first child that is a transformers model; ``"base_model"`` if the base itself is all there is."""
        for name, child in self.get_base_model().named_children():
            if any(cls.__name__ == "PreTrainedModel" for cls in type(child).__mro__):
                return name
        return "base_model"

    @property
    def word_embeddings(self) -> nn.Module:
        """The module that embeds tokens."""
        found: nn.Module = self.get_base_model().get_input_embeddings()  # type: ignore[operator]
        return found

    # ---- prompts ---------------------------------------------------------------------------------------------------
    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """Adapter → numbers of its virtual tokens (tokens,), on the CPU."""
        import torch

        return {
            name: torch.arange((config.num_virtual_tokens or 0) * (config.num_transformer_submodules or 1))  # type: ignore[attr-defined]
            for name, config in self._peft_index.configs.items()
            if config.is_prompt_learning
        }

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Any:
        """Return the virtual tokens of the adapter in use: (batch, tokens, hidden), or a cache of keys and values.

        Args:
            batch_size: how many samples; each gets the same tokens unless `task_ids` say otherwise.
            task_ids: (batch,), for methods with several tasks.

        Raises:
            CapabilityError: the adapter in use has no virtual tokens.
        """
        import torch

        from ..tuners.assemble import prompt_of

        index = self._peft_index
        device = next(self.parameters()).device
        call = Call(
            self.task.name or None,
            {},
            index.activation.current(),
            batch_size,
            device,
            arguments={"task_ids": task_ids} if task_ids is not None else {},
        )
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            for tuner in index.speakers:
                call = tuner.prepare(call)
        if not call.virtual:
            raise CapabilityError("the adapter in use has no virtual tokens", hint="set_adapter one that has")
        return prompt_of(call, index.forward)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Return what a file holds of a prompt: detached, on the CPU.

        Raises:
            AdapterNotFoundError: the model has no such adapter.
            CapabilityError: it has no virtual tokens.
        """
        index = self._peft_index
        index.require(adapter_name)
        for path, _, slot in index.slots(adapter_name):
            if path is None:
                return slot.read().detach().cpu()
        raise CapabilityError(f"the adapter {adapter_name!r} has no virtual tokens")


class _TaskModel(PeftModel):
    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)

    @property
    def cls_layer_name(self) -> str | None:
        """The name of the base's first child that is a head of this task."""
        for name, _ in self.get_base_model().named_children():
            if any(name == head or name.endswith(f".{head}") for head in self.task.heads):
                return name
        return None


class PeftModelForSequenceClassification(_TaskModel):
    """A sequence classifier; its head trains and is saved with the adapter."""

    task = TASKS[TaskType.SEQ_CLS.value]


class PeftModelForTokenClassification(_TaskModel):
    """A token classifier; its head trains and is saved with the adapter. Logits are those of the caller's tokens."""

    task = TASKS[TaskType.TOKEN_CLS.value]


class PeftModelForQuestionAnswering(_TaskModel):
    """An extractive question answerer; its head trains and is saved with the adapter. Positions are those of the caller's tokens."""

    task = TASKS[TaskType.QUESTION_ANS.value]


class PeftModelForFeatureExtraction(_TaskModel):
    """A model without a head."""

    task = TASKS[TaskType.FEATURE_EXTRACTION.value]


class PeftModelForCausalLM(_TaskModel):
    """A causal language model. With virtual embeddings the logits have their positions, too, and labels ignore them."""

    task = TASKS[TaskType.CAUSAL_LM.value]

    @property
    def base_model_prepare_inputs_for_generation(self) -> Any:
        """The base's own preparation of a generation step."""
        from ..tuners.generation import METHOD, GenerationDoor

        door = getattr(self.get_base_model(), METHOD)
        return door.original if isinstance(door, GenerationDoor) else door


class PeftModelForSeq2SeqLM(_TaskModel):
    """An encoder-decoder language model."""

    task = TASKS[TaskType.SEQ_2_SEQ_LM.value]


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    cls.task.name: cls
    for cls in (
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        PeftModelForQuestionAnswering,
        PeftModelForFeatureExtraction,
        PeftModelForCausalLM,
        PeftModelForSeq2SeqLM,
    )
}
