"""What a model computes with besides its weights: modules, their attributes, adapters, hooks.

``describe`` turns it into text, which becomes part of the fingerprint. What has no description, such as
a user's hook, is refused: entries made with it would have the same keys as those made without it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# An attribute of a hook or a replaced function: a string that identifies its effect on answers.
MARK = "voco_fingerprint"
# Functions of these libraries are described by name; their state is in the modules' attributes.
_LIBRARIES = {
    "accelerate",
    "bitsandbytes",
    "builtins",
    "deepspeed",
    "kernels",
    "liger_kernel",
    "math",
    "peft",
    "torch",
    "torchao",
    "transformers",
    "voco_kernels",
    "voco_model",
}
_PLAIN = {type(None), bool, int, float, complex, str, bytes}
# Attributes about how a model is stored, distributed, trained or called, not what it computes.
_NOT_DESCRIBED = {
    *vars(nn.Module()),
    "_caches",  # PEFT's, of one forward pass
    "_compiled_call_impl",
    "_gradient_checkpointing_func",
    "_hf_hook",
    "_is_hf_initialized",
    "_old_forward",
    "all_tied_weights_keys",
    "generation_config",
    "gradient_checkpointing",
    "hf_device_map",
    "kernel_config",
    "loss_type",
    "max_seq_len_cached",
    "name_or_path",
    "original_max_seq_len",
    "peft_config",  # the relevant values are in its layers
    "warnings_issued",
}
_SHARDED = (
    "expected complete weights to compute a fingerprint from, got {}; save the model and load it on one "
    "device"
)
# Entries of a config about its origin and how it is run. The weights have their own dtype.
_NOT_IN_CONFIG = {
    "_attn_implementation",
    "_experts_implementation",
    "_name_or_path",
    "architectures",
    "dtype",
    "transformers_version",
    "voco_isolated",
    "voco_prompt",
}


def describe(model: nn.Module, *, strict: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a model computes with.

    Args:
        strict: refuse functions with unknown effects. Otherwise they are described by their address,
            which is enough to detect that one was added or removed.

    Returns:
        two dicts: descriptions by place (configs; each module's class, children and attributes, such as
        scales and active, merged or disabled adapters; hooks; replaced functions) and tensors by name
        (parameters, all buffers, and tensors in plain attributes).

    Raises:
        ValueError: a hook or function with an unknown effect, or a model wrapped by FSDP.
    """
    description = _Description(strict)
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        description.add_hooks(f"torch.nn.modules.module.{name}", getattr(global_hooks, name))
    description.add_module("", model)
    return description.texts, description.tensors


class _Description:
    """Collects the result of ``describe``.

    Attributes:
        texts, tensors: the two dicts.
    """

    def __init__(self, strict: bool) -> None:
        self.texts: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self._strict = strict
        self._classes: dict[type, str] = {}
        self._places: dict[int, str] = {}  # of modules, configs and objects, by id
        self._kept: list[Any] = []  # keeps ids from being reused

    def add_module(self, path: str, root: nn.Module) -> None:
        """A module and all below it."""
        for below, module in root.named_modules(prefix=path, remove_duplicate=False):
            place = below or type(module).__name__
            if self._seen(place, module):
                self.texts[place] = f"the same as {self._places[id(module)]}"
            else:
                self._add_one(place, f"{below}." if below else "", module)

    def _add_one(self, place: str, prefix: str, module: nn.Module) -> None:
        kind = type(module)
        if kind not in self._classes:
            self._classes[kind] = self._class(place, kind)
        attributes = vars(module)
        children = attributes["_modules"]
        text = self._classes[kind]
        self.texts[place] = f"{text} of {', '.join(children)}" if children else text
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            if attributes[name]:
                self.add_hooks(f"{place}.{name}", attributes[name])
        for group in ("_parameters", "_buffers"):
            for name, tensor in attributes[group].items():
                if tensor is not None:
                    self.tensors[prefix + name] = tensor
        for name, value in attributes.items():
            if name in _NOT_DESCRIBED:
                continue
            if name[0] == "_" and isinstance(module, PreTrainedModel):
                continue  # internal bookkeeping of Transformers
            if name == "kwargs" and kind.__module__.startswith("peft."):
                continue  # the arguments that PEFT's layers were created with
            if type(value) in _PLAIN:  # nearly all of them
                self.texts[f"{place}.{name}"] = repr(value)
            elif isinstance(value, Tensor):
                self.tensors[prefix + name] = value
            elif name == "forward":
                self._add_replaced_forward(f"{place}.forward", module, value)
            else:
                self.texts[f"{place}.{name}"] = self._value(f"{place}.{name}", value)

    def add_hooks(self, place: str, hooks: dict[int, Callable]) -> None:
        functions = [self._function(place, hook) for hook in hooks.values()]
        # Their hooks only observe, or move weights. Some are installed during the first forward pass.
        libraries = ("transformers", "accelerate")
        functions = [name for name in functions if name.partition(".")[0] not in libraries]
        if functions:
            self.texts[place] = ", ".join(functions)

    def _add_replaced_forward(self, place: str, module: nn.Module, forward: Callable) -> None:
        """A forward that is an attribute of the module, not of its class.

        Accelerate wraps the original to move weights, torch.compile to compile it; neither changes the
        result.
        """
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and type(hook).__module__.partition(".")[0] == "accelerate":
            forward = module._old_forward
        forward = getattr(forward, "_torchdynamo_orig_callable", forward)
        if getattr(forward, "__func__", None) is not type(module).forward:
            self.texts[place] = self._function(place, forward)

    def _class(self, place: str, kind: type) -> str:
        """A class by name, and its forward if another module defines it.

        Raises:
            ValueError: FSDP's, with original parameters or without: its weights are views of a shard.
        """
        if kind.__name__ == "FullyShardedDataParallel":
            raise ValueError(_SHARDED.format(f"{place} in FullyShardedDataParallel"))
        forward = kind.forward
        name = _name_of(kind)
        origin = getattr(inspect.unwrap(forward), "__module__", None)
        if origin in {base.__module__ for base in kind.__mro__}:
            return name
        return f"{name} with forward {self._function(f'{name}.forward', forward)}"

    def _function(self, place: str, function: Callable) -> str:
        """The mark of a function, or its name if it belongs to a known library.

        Raises:
            ValueError: a user's function or callable object without the mark.
        """
        mark = getattr(function, MARK, None)
        if isinstance(mark, str):
            return f"marked {mark!r}"
        if isinstance(function, functools.partial):
            given = self._value(place, [*function.args, function.keywords])
            return f"{self._function(place, function.func)} with {given}"
        name = _name_of(function if hasattr(function, "__qualname__") else type(function))
        if name.partition(".")[0] in _LIBRARIES:
            return name
        if not self._strict:
            return f"{name} at {id(function):#x}"
        raise ValueError(
            f"expected a model without functions of unknown effect, got {name} at {place}, which may "
            f"change answers without changing keys; remove it, or set its attribute {MARK} to a string "
            "that changes whenever its effect does ('' if it has none)"
        )

    def _value(self, place: str, value: Any) -> str:
        """An attribute's value, or part of one. Tensors and modules in it are added separately."""
        if type(value) in _PLAIN:
            return repr(value)
        if isinstance(value, Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if isinstance(value, np.generic | np.ndarray):
            return f"{value.dtype} {self._value(place, value.tolist())}"
        if isinstance(value, torch.dtype | torch.Size):
            return str(value)
        if isinstance(value, torch.device):
            return "a device"  # results don't depend on it
        if isinstance(
            value, bool | int | float | str
        ):  # a class of its own, derived from one of these
            return f"{type(value).__qualname__} {value!s}"
        if isinstance(value, Tensor):
            self.tensors[place] = value
            return "a tensor"
        if isinstance(value, type):
            return _name_of(value)
        if isinstance(value, functools.partial) or inspect.isroutine(value):
            return self._function(place, value)
        if isinstance(value, nn.Module):
            self.add_module(place, value)
            return "a module"
        if self._seen(place, value):
            return f"the same as {self._places[id(value)]}"
        if isinstance(value, PretrainedConfig):
            self._check_attention(place, value)
            return self._value(place, _without_origin(value.to_dict()))
        if isinstance(value, dict):
            pairs = [
                f"{self._value(place, k)}: {self._value(f'{place}[{k!r}]', v)}"
                for k, v in value.items()
            ]
            return "{" + ", ".join(sorted(pairs)) + "}"
        if isinstance(value, set | frozenset):
            return "{" + ", ".join(sorted(self._value(place, each) for each in value)) + "}"
        if isinstance(value, list | tuple):
            each = [self._value(f"{place}[{index}]", item) for index, item in enumerate(value)]
            return "[" + ", ".join(each) + "]"
        return self._object(place, value)

    def _object(self, place: str, value: Any) -> str:
        """An object's class; for a user's object and for plain data, its attributes as well."""
        mark = getattr(value, MARK, None)
        if isinstance(mark, str):
            return f"marked {mark!r}"
        name = _name_of(type(value))
        library = name.partition(".")[0]
        is_data = isinstance(value, SimpleNamespace) or is_dataclass(value)
        if not is_data and (library in _LIBRARIES or library in sys.stdlib_module_names):
            return name
        if callable(value):
            return self._function(place, value)
        return f"{name} {self._value(place, dict(vars(value)) if hasattr(value, '__dict__') else None)}"

    def _seen(self, place: str, value: Any) -> bool:
        """Whether this object was described before, at the place in ``_places``."""
        if id(value) in self._places:
            return True
        self._places[id(value)] = place
        self._kept.append(value)
        return False

    def _check_attention(self, place: str, config: PretrainedConfig) -> None:
        """Raise ``ValueError`` for an attention that a user registered without the mark."""
        name = getattr(config, "_attn_implementation", None)
        function = ALL_ATTENTION_FUNCTIONS.get(name)
        if function is not None:
            self._function(f"the attention {name!r} of {place}", function)


def _name_of(function: Callable) -> str:
    return f"{getattr(function, '__module__', None) or 'builtins'}.{function.__qualname__}"


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The strided tensors that make up a tensor: itself, or those that its subclass wraps (torchao).

    Raises:
        ValueError: an incomplete tensor, or one whose bytes can't be read.
    """
    _check_whole(name, tensor)
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        kind = f"{type(tensor).__qualname__} {_Description(True)._value(name, context)}"
        for inner in names:
            yield from plain_tensors(f"{name}.{inner} of {kind}", getattr(tensor, inner))
    elif tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(
            f"expected weights as dense tensors, got {name} as {tensor.layout} {tensor.dtype}, whose "
            "bytes don't determine its values; load the model with another quantization"
        )
    else:
        yield name, tensor


def _check_whole(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` for a weight that is incomplete in this process."""
    if isinstance(tensor, DTensor):
        sharded = "a shard of a DTensor (FSDP2 or tensor parallelism)"
    elif getattr(getattr(tensor, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE":
        sharded = "a partition of it (DeepSpeed ZeRO-3)"
    elif type(tensor).__name__ == "FlatParameter" or getattr(tensor, "_is_flat_param", False):
        sharded = "a flat shard (FSDP)"
    elif tensor.device.type == "meta":
        raise ValueError(
            f"expected loaded weights, got {name} on the meta device; load the model without offloading "
            "(device_map to a disk or CPU)"
        )
    else:
        return
    raise ValueError(_SHARDED.format(f"{name} as {sharded}"))


def difference(before: dict[str, str], now: dict[str, str]) -> str | None:
    """The first difference between two descriptions, in words; None if there is none."""
    for place in [*before, *now]:
        old, new = before.get(place), now.get(place)
        if old != new:
            return f"{place}: {_shortened(old)} before, {_shortened(new)} now"
    return None


def _shortened(text: str | None) -> str:
    if text is None:
        return "nothing"
    return text if len(text) <= 80 else text[:77] + "..."


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_origin(v) for k, v in value.items() if k not in _NOT_IN_CONFIG}
    return value
