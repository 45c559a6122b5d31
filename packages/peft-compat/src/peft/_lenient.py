"""The model classes with the defaults that users of this module expect: loading warns about missing tensors instead of raising."""

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

from ._tuner_models import DELEGATED, BaseTuner, seams_of, stand_for


class _Lenient(type(nn.Module)):  # type: ignore[misc]
    """A class that takes instances of the class of core that it stands for (`of_core`) for its own: which of the two made a model does not matter.

    Classes that users derive from it are ordinary ones.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        core = cls.__dict__.get("of_core")
        found: bool = super().__instancecheck__(instance) if core is None else isinstance(instance, core)
        return found

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a model. Where the base has an adapter of this name (a cell of a notebook that ran twice), it is made anew, with a warning."""
        given = dict(zip(("model", "peft_config", "adapter_name"), args, strict=False)) | kwargs
        with anew(given.get("model"), given.get("adapter_name", "default")):
            return super().__call__(*args, **kwargs)

    def __subclasscheck__(cls, subclass: type) -> bool:
        core = cls.__dict__.get("of_core")
        found: bool = super().__subclasscheck__(subclass) if core is None else issubclass(subclass, core)
        return found

    @property
    def __signature__(cls) -> inspect.Signature:
        """What making a model takes."""
        found = inspect.signature(cls.__dict__.get("of_core", cls).__init__)
        return found.replace(parameters=list(found.parameters.values())[1:])


MODULE = "peft.peft_model"


@contextlib.contextmanager
def anew(model: Any, adapter_name: str, *, beside: bool = True) -> Iterator[None]:
    """Take an adapter of this name out of the model until the block ends; if it fails, the adapter is put back.

    Args:
        model: with or without adapters.
        adapter_name: the adapter that the block makes.
        beside: adapters that were in use stay so beside the new one.
    """
    index = index_of(model) if isinstance(model, nn.Module) else None
    if index is None or adapter_name not in index.configs:
        yield
        return
    warnings.warn(f"the model has an adapter {adapter_name!r} already, which is replaced by a new one", PeftWarning, stacklevel=4)
    config, active = index.configs[adapter_name], index.active
    tensors = {key: slot.read().clone() for key, slot in keyed_slots(index, adapter_name).items() if not slot.unread}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # which adapter takes over meanwhile
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
    """Return the class of this module for `core`, which all classes of tasks have in common: what somebody replaces in it they all have replaced."""
    members = {"__module__": MODULE, "__doc__": core.__doc__, "of_core": core, "strict_loading": "warn", "class_for": classmethod(_class_for)}
    members["restores_base"] = False  # recipes save what `unload` returns beside an adapter that changed it
    members["from_pretrained"] = classmethod(_tolerant(core.from_pretrained.__func__, (*HUB_KEYS, "subfolder")))
    members["load_adapter"] = _tolerant(core.load_adapter, (*HUB_KEYS, "subfolder"))
    members["save_pretrained"] = _tolerant(core.save_pretrained, (*OF_UPLOAD, *OF_WHOLE_MODELS))
    return _Lenient(core.__name__, (core,), members)


def _of_task(core: Any) -> Any:
    return _Lenient(core.__name__, (PeftModel, core), {"__module__": MODULE, "__doc__": core.__doc__, "of_core": core})


def _with_tuner_model(kind: Any) -> Any:
    """Give a class a `base_model` of its method, which does what that has methods for."""

    def make(self: Any, model: Any, peft_config: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any) -> None:
        super(kind, self).__init__(model, peft_config, adapter_name, *args, **kwargs)
        if isinstance(self.base_model, BaseTuner):  # as whoever has replaced it expects: the adapter is there, and in use
            self.base_model.__init__(self.base_model.model, self.peft_config, adapter_name)  # type: ignore[misc]
            self.get_base_model().__dict__["peft_config"] = self.peft_config  # as injection leaves it there

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
    """Return a method that ignores keywords, but its own and `further` ones, with one warning: model cards pass those of whole models."""
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
    """Give an adapter's config the settings of this process that a call brought along; warn if it has no place for them."""
    if hasattr(config, "runtime_config"):
        config.runtime_config = runtime
    else:
        warnings.warn(f"runtime_config has no effect on adapters of {config.peft_type}", PeftWarning, stacklevel=3)


def _class_for(cls: Any, task: str) -> Any:
    """Return the class of models for a task, as in `TaskType`; this one for others."""
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
    """As `peft_core.get_peft_model`, with the classes of this module."""
    kind = PeftMixedModel if mixed else PeftModel
    return factory.wrap(kind, model, peft_config, adapter_name, autocast_adapter_dtype, revision, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: peft_core.PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Any] | None = None,
) -> nn.Module:
    """As `peft_core.inject_adapter_in_model`; an adapter of this name is replaced, with a warning, and the method's class is asked (`LoraModel`)."""
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
