"""What a model computes with besides its weights: modules, their attributes, adapters, hooks.

``describe`` writes it down as text, which becomes part of the fingerprint. What can't be written down,
such as a user's hook, is refused: its entries would have the same keys as those made without it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# A hook or a replaced function says with this attribute, a string, what it does to an answer.
MARK = "voco_fingerprint"
# Their functions are known by name: what else they depend on is in the modules' attributes.
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
# Attributes that say how a model is stored, spread, trained or called, not what it computes.
_NOT_TOLD = {
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
    "kwargs",  # those that PEFT's layers were made with
    "loss_type",
    "max_seq_len_cached",
    "name_or_path",
    "original_max_seq_len",
    "peft_config",  # its layers hold what counts of it
    "warnings_issued",
}
_SHARDED = (
    "expected whole weights, from which a fingerprint is computed, got {}; save the model and load it "
    "whole on one device"
)
# What a config says of where it came from and how it is run. Weights have a dtype of their own.
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


def describe(model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a model computes with.

    Returns:
        two dicts. By place, everything but tensors: configs, each module's class and attributes (scales;
        adapters that are active, merged or disabled), hooks, replaced functions. By name, the tensors:
        parameters, all buffers, and tensors that are plain attributes.

    Raises:
        ValueError: a hook or function whose effect isn't known, or a model that FSDP has cut up.
    """
    told: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    configs: dict[int, tuple[str, PretrainedConfig]] = {}
    classes: dict[type, str] = {}
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        _tell_hooks(told, f"torch.nn.modules.module.{name}", getattr(global_hooks, name))
    for path, module in model.named_modules():
        place = path or type(module).__name__
        kind = type(module)
        if kind not in classes:
            classes[kind] = _class(place, kind)
        told[place] = classes[kind]
        attributes = vars(module)
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            if attributes[name]:
                _tell_hooks(told, f"{place}.{name}", attributes[name])
        for group in ("_parameters", "_buffers"):
            for name, tensor in attributes[group].items():
                if tensor is not None:
                    tensors[f"{path}.{name}" if path else name] = tensor
        for name, value in attributes.items():
            if name in _NOT_TOLD:
                continue
            if name[0] == "_" and isinstance(module, PreTrainedModel):
                continue  # Transformers' own books
            if type(value) in _PLAIN:  # nearly all of them
                told[f"{place}.{name}"] = repr(value)
            elif isinstance(value, Tensor):
                tensors[f"{path}.{name}" if path else name] = value
            elif isinstance(value, PretrainedConfig):
                configs.setdefault(id(value), (f"{place}.{name}", value))
            elif name == "forward":
                _tell_replaced_forward(told, f"{place}.forward", module, value)
            else:
                told[f"{place}.{name}"] = _value(f"{place}.{name}", value)
    for place, config in configs.values():
        told[place] = _value(place, _without_origin(config.to_dict()))
        _check_attention(place, config)
    return told, tensors


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The strided tensors that a tensor is made of: itself, or what its subclass wraps (torchao).

    Raises:
        ValueError: one that isn't here as a whole, or whose bytes can't be read.
    """
    _check_whole(name, tensor)
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        kind = f"{type(tensor).__qualname__} {_value(name, context)}"
        for inner in names:
            yield from plain_tensors(f"{name}.{inner} of {kind}", getattr(tensor, inner))
    elif tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(
            f"expected weights as dense tensors, got {name} as {tensor.layout} {tensor.dtype}; their "
            "bytes don't tell their values: load the model with another quantization"
        )
    else:
        yield name, tensor


def _check_whole(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` for a weight of which only a part, or nothing, is here."""
    if isinstance(tensor, DTensor):
        sharded = "a shard of a DTensor (FSDP2 or tensor parallelism)"
    elif getattr(getattr(tensor, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE":
        sharded = "a partition of it (DeepSpeed ZeRO-3)"
    elif type(tensor).__name__ == "FlatParameter" or getattr(tensor, "_is_flat_param", False):
        sharded = "a flat shard (FSDP)"
    elif tensor.device.type == "meta":
        raise ValueError(
            f"expected weights that are loaded, got {name} on the meta device; load the model whole, "
            "without offloading (device_map to a disk or CPU)"
        )
    else:
        return
    raise ValueError(_SHARDED.format(f"{name} as {sharded}"))


def difference(before: dict[str, str], now: dict[str, str]) -> str | None:
    """The first place where two descriptions differ, in words; None where they don't."""
    for place in [*before, *now]:
        old, new = before.get(place), now.get(place)
        if old != new:
            return f"{place}: {_shortened(old)} before, {_shortened(new)} now"
    return None


def _shortened(told: str | None) -> str:
    if told is None:
        return "nothing"
    return told if len(told) <= 80 else told[:77] + "..."


def _tell_hooks(told: dict[str, str], place: str, hooks: dict[int, Callable]) -> None:
    functions = [_function(place, hook) for hook in hooks.values()]
    # These only watch, or move weights. Transformers installs some during the first forward pass.
    functions = [f for f in functions if f.partition(".")[0] not in ("transformers", "accelerate")]
    if functions:
        told[place] = ", ".join(functions)


def _value(place: str, value: Any) -> str:
    """A plain value as it is, anything else by the name of its class or function."""
    if type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, np.generic | np.ndarray):
        return f"{value.dtype} {_value(place, value.tolist())}"
    if isinstance(value, torch.dtype | torch.Size):
        return str(value)
    if isinstance(value, bool | int | float | str):  # a class of its own, derived from one of these
        return f"{type(value).__qualname__} {value!s}"
    if isinstance(value, torch.device):
        return "a device"  # the same answer on any
    if isinstance(value, dict):
        pairs = [f"{_value(place, k)}: {_value(place, v)}" for k, v in value.items()]
        return "{" + ", ".join(sorted(pairs)) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(_value(place, each) for each in value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(place, each) for each in value) + "]"
    if isinstance(value, functools.partial) or inspect.isroutine(value):
        return _function(place, value)
    kind = value if isinstance(value, type) else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if value is not kind and is_dataclass(value):
        return f"{name} {_value(place, vars(value))}" if hasattr(value, "__dict__") else name
    return name


def _function(place: str, function: Callable) -> str:
    """The name of a function, where that tells what it does.

    Raises:
        ValueError: one of a user's, without the mark.
    """
    mark = getattr(function, MARK, None)
    if isinstance(mark, str):
        return f"marked {mark!r}"
    if isinstance(function, functools.partial):
        given = _value(place, [*function.args, function.keywords])
        return f"{_function(place, function.func)} with {given}"
    if not hasattr(function, "__qualname__"):  # an object that can be called
        function = type(function)
    module = getattr(function, "__module__", None) or "builtins"
    name = f"{module}.{function.__qualname__}"
    if module.partition(".")[0] not in _LIBRARIES:
        raise ValueError(
            f"expected a model without functions of unknown effect, got {name} at {place}, which may "
            f"change answers without changing keys; remove it, or set its attribute {MARK} to a text "
            "that changes whenever its effect does ('' if it has none)"
        )
    return name


def _class(place: str, kind: type) -> str:
    """A class by name; with its forward's, where that isn't the class's own.

    Raises:
        ValueError: FSDP's, with original parameters or without: the weights in it are views of a shard.
    """
    if kind.__name__ == "FullyShardedDataParallel":
        raise ValueError(_SHARDED.format(f"{place} in FullyShardedDataParallel"))
    forward = kind.forward
    name = f"{kind.__module__}.{kind.__qualname__}"
    origin = getattr(inspect.unwrap(forward), "__module__", None)
    if origin in {base.__module__ for base in kind.__mro__}:
        return name
    return f"{name} with forward {_function(f'{name}.forward', forward)}"


def _tell_replaced_forward(
    told: dict[str, str], place: str, module: nn.Module, forward: Callable
) -> None:
    """A forward that is an attribute of the module, not of its class.

    Accelerate wraps the one there was to move weights about, which changes no answer.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and type(hook).__module__.partition(".")[0] == "accelerate":
        forward = module._old_forward
    if getattr(forward, "__func__", None) is not type(module).forward:
        told[place] = _function(place, forward)


def _check_attention(place: str, config: PretrainedConfig) -> None:
    """Raise ``ValueError`` for an attention that a user has registered without the mark."""
    function = ALL_ATTENTION_FUNCTIONS.get(getattr(config, "_attn_implementation", None))
    if function is not None:
        _function(f"the attention {config._attn_implementation!r} of {place}", function)


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_origin(v) for k, v in value.items() if k not in _NOT_IN_CONFIG}
    return value
