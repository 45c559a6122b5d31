"""The model classes with upstream's defaults: if tensors are missing, loading an adapter warns instead of raising an error."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

import peft_core
from peft_core import PeftWarning
from peft_core.checkpoint.load import TensorSource, write_tensors
from peft_core.checkpoint.state_dict import keyed_slots
from peft_core.config import HUB_KEYS
from peft_core.models import factory
from peft_core.models.uploading import OF_UPLOAD, OF_WHOLE_MODELS
from peft_core.operations.activate import activate
from peft_core.operations.add import add_adapter
from peft_core.operations.delete import delete
from peft_core.tuners.index import index_of

from ._older_transformers import keep_scale_of_experts
from ._tuner_models import DELEGATED, BaseTuner, seams_of, stand_for


class _Lenient(type(nn.Module)):  # type: ignore[misc]
    """Metaclass: instances of the corresponding class in peft-core (`of_core`) count as instances of the class, whichever of the two created them.

    Classes that users derive from such a class use the normal `isinstance` check.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        core = cls.__dict__.get("of_core")
        found: bool = super().__instancecheck__(instance) if core is None else isinstance(instance, core)
        return found

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Create a model. If the base already has an adapter of this name (a notebook cell that ran twice), replace the adapter and warn."""
        given = dict(zip(("model", "peft_config", "adapter_name"), args, strict=False)) | kwargs
        with anew(given.get("model"), given.get("adapter_name", "default")):
            return super().__call__(*args, **kwargs)

    def __subclasscheck__(cls, subclass: type) -> bool:
        core = cls.__dict__.get("of_core")
        found: bool = super().__subclasscheck__(subclass) if core is None else issubclass(subclass, core)
        return found

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature of the constructor, without `self`."""
        found = inspect.signature(cls.__dict__.get("of_core", cls).__init__)
        return found.replace(parameters=list(found.parameters.values())[1:])


MODULE = "peft.peft_model"


@contextlib.contextmanager
def anew(model: Any, adapter_name: str, *, beside: bool = True) -> Iterator[None]:
    """If the model has an adapter of this name, warn and delete it before the block; if the block fails, restore the adapter.

    Args:
        model: a model with or without adapters.
        adapter_name: the name of the adapter that the block creates.
        beside: after the block, the adapters that were active before are active together with the new adapter.
    """
    index = index_of(model) if isinstance(model, nn.Module) else None
    if index is None or adapter_name not in index.configs:
        yield
        return
    warnings.warn(f"the model has an adapter {adapter_name!r} already, which is replaced by a new one", PeftWarning, stacklevel=4)
    config, active = index.configs[adapter_name], index.active
    tensors = {key: slot.read().clone() for key, slot in keyed_slots(index, adapter_name).items() if not slot.unread}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # the warning about the adapter that is activated in the meantime
        delete(index, adapter_name)
    try:
        yield
        if beside:
            activate(index, [*active, adapter_name], trainable=not index.configs[adapter_name].inference_mode)
    except BaseException:
        source = TensorSource.of(tensors)
        add_adapter(index, adapter_name, config, mount_on=model, before_commit=lambda: write_tensors(index, adapter_name, source) and None)
        activate(index, active, trainable=not config.inference_mode)
        raise


def _lenient(core: Any) -> Any:
    """Return the class of this module that corresponds to `core`. All task classes inherit from it, so a method replaced in it is replaced in all."""
    members = {"__module__": MODULE, "__doc__": core.__doc__, "of_core": core, "strict_loading": "warn", "class_for": classmethod(_class_for)}
    members["restores_base"] = False  # training recipes save the base that `unload` returns together with an adapter that changed the base
    members["from_pretrained"] = classmethod(_tolerant(core.from_pretrained.__func__, (*HUB_KEYS, "subfolder")))
    members["load_adapter"] = _tolerant(core.load_adapter, (*HUB_KEYS, "subfolder"))
    members["save_pretrained"] = _tolerant(core.save_pretrained, (*OF_UPLOAD, *OF_WHOLE_MODELS))
    return _Lenient(core.__name__, (core,), members)


def _of_task(core: Any) -> Any:
    return _Lenient(core.__name__, (PeftModel, core), {"__module__": MODULE, "__doc__": core.__doc__, "of_core": core})


def _with_tuner_model(kind: Any) -> Any:
    """Make the models of a class create a `base_model` of the method's class (such as `LoraModel`), and call the methods of that object."""

    def make(self: Any, model: Any, peft_config: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any) -> None:
        super(kind, self).__init__(model, peft_config, adapter_name, *args, **kwargs)
        if isinstance(self.base_model, BaseTuner):  # code that has replaced `__init__` expects that the adapter exists and is active
            self.base_model.__init__(self.base_model.model, self.peft_config, adapter_name)  # type: ignore[misc]
            self.get_base_model().__dict__["peft_config"] = self.peft_config  # upstream's injection also sets this attribute

    def operation(self: Any, name: str) -> Any:
        base = self.__dict__.get("_modules", {}).get("base_model")
        return getattr(base, name) if hasattr(type(base), name) and isinstance(base, BaseTuner) else super(kind, self)._operation(name)

    kind.__init__ = functools.wraps(kind.__init__)(make)
    kind._operation = operation
    kind._tuner_model = lambda self, index, config, called: stand_for(index, config, called)
    for name in DELEGATED:
        setattr(kind, name, _delegating(name, getattr(kind, name)))
    return kind


def _delegating(name: str, method: Any) -> Any:
    @functools.wraps(method)
    def delegate(self: Any, *args: Any, **kwargs: Any) -> Any:
        base = self.base_model
        return (getattr(base, name) if isinstance(base, BaseTuner) else functools.partial(method, self))(*args, **kwargs)

    return delegate


def _tolerant(function: Any, further: tuple[str, ...]) -> Any:
    """Return a method that ignores all keyword arguments except those of `function` and those in `further`, with one warning.

    Code in model cards also passes keyword arguments that are meant for loading whole models.
    """
    signature = inspect.signature(function)
    known = {*signature.parameters, *further}

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        runtime = kwargs.pop("runtime_config", None) if "adapter_name" in known else None
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            warnings.warn(f"{function.__name__} ignores {', '.join(map(repr, unknown))}: an adapter has no use for it", PeftWarning, stacklevel=2)
        found = function(self, *args, **{name: value for name, value in kwargs.items() if name not in unknown})
        if runtime is not None:
            bound = signature.bind(self, *args, **{name: value for name, value in kwargs.items() if name not in unknown})
            bound.apply_defaults()
            model: Any = found if isinstance(found, nn.Module) else self
            _set_runtime(model.peft_config[bound.arguments["adapter_name"]], runtime)
        return found

    return method


def _set_runtime(config: Any, runtime: Any) -> None:
    """Set `runtime_config` of an adapter's config to the settings passed in a call; warn if this kind of config has no such attribute."""
    if hasattr(config, "runtime_config"):
        config.runtime_config = runtime
    else:
        warnings.warn(f"runtime_config has no effect on adapters of {config.peft_type}", PeftWarning, stacklevel=3)


def _class_for(cls: Any, task: str) -> Any:
    """Return the model class for a task (a value of `TaskType`); for other tasks, and for `PeftMixedModel`, return `cls`."""
    return cls if issubclass(cls, PeftMixedModel) else MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, cls)


PeftModel = _with_tuner_model(_lenient(peft_core.PeftModel))
PeftModelForSequenceClassification = _of_task(peft_core.PeftModelForSequenceClassification)
PeftModelForTokenClassification = _of_task(peft_core.PeftModelForTokenClassification)
PeftModelForQuestionAnswering = _of_task(peft_core.PeftModelForQuestionAnswering)
PeftModelForFeatureExtraction = _of_task(peft_core.PeftModelForFeatureExtraction)
PeftModelForCausalLM = _of_task(peft_core.PeftModelForCausalLM)
PeftModelForSeq2SeqLM = _of_task(peft_core.PeftModelForSeq2SeqLM)
PeftMixedModel = _lenient(peft_core.PeftMixedModel)
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {task: globals()[kind.__name__] for task, kind in peft_core.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()}


def get_peft_model(
    model: nn.Module,
    peft_config: peft_core.PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """The same as `peft_core.get_peft_model`, but the returned model is of a class of this module."""
    kind = PeftMixedModel if mixed else PeftModel
    return factory.wrap(kind, model, peft_config, adapter_name, autocast_adapter_dtype, revision, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: peft_core.PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The same as `peft_core.inject_adapter_in_model`, with three differences.

    If the model already has an adapter of this name, it is replaced, with a warning. Methods that were replaced in the method's class (such as
    `LoraModel`) are called. A config that transformers 5.0 to 5.3 converted gets the alpha that they forget.
    """
    keep_scale_of_experts(peft_config)
    with anew(model, adapter_name, beside=False):
        return factory.inject(peft_config, model, adapter_name, low_cpu_mem_usage, state_dict, lambda index: seams_of(index, peft_config))


def _auto(core: Any) -> Any:
    members = {"__module__": "peft.auto", "__doc__": core.__doc__, "class_for": classmethod(lambda cls, task: PeftModel.class_for(task or ""))}
    return type(core.__name__, (core,), members)


AutoPeftModel = _auto(peft_core.AutoPeftModel)
AutoPeftModelForCausalLM = _auto(peft_core.AutoPeftModelForCausalLM)
AutoPeftModelForSeq2SeqLM = _auto(peft_core.AutoPeftModelForSeq2SeqLM)
AutoPeftModelForSequenceClassification = _auto(peft_core.AutoPeftModelForSequenceClassification)
AutoPeftModelForTokenClassification = _auto(peft_core.AutoPeftModelForTokenClassification)
AutoPeftModelForQuestionAnswering = _auto(peft_core.AutoPeftModelForQuestionAnswering)
AutoPeftModelForFeatureExtraction = _auto(peft_core.AutoPeftModelForFeatureExtraction)
