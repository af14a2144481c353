"""Two states of a model that make different entries never share a key, or the key is refused."""

from __future__ import annotations

import functools
import tempfile
import types
import warnings
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from peft.helpers import rescale_adapter_scale
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import voco_model
from tests.voco_model import tiny
from voco_model.kv_store.memory_store import MemoryStore
from voco_model.vlm.fingerprint import Unchanged

PICTURE = tiny.picture(3)
TARGETS = r".*(language_model|vision_tower).*\.(q_proj|v_proj)"


@dataclass
class World:
    model: nn.Module
    processor: object

    def entry(self) -> torch.Tensor:
        (entry,) = voco_model.compress(self.model, PICTURE, processor=self.processor)
        return entry.kv

    def key(self) -> str:
        return voco_model.image_key(PICTURE, model=self.model, processor=self.processor)

    def layer(self, number: int = 0) -> nn.Module:
        return self.model.model.language_model.layers[number]


def make_world(kind: str, adapters: tuple[str, ...] = ()) -> World:
    model, processor = tiny.tiny_llava(kind), tiny.tiny_processor(kind)
    for number, name in enumerate(adapters):
        torch.manual_seed(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, about a second adapter
            config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
            model.add_adapter(config, name)
    voco_model.enable(model.eval(), processor, num_voco=2)
    return World(model, processor)


@pytest.fixture
def world(kind):
    return make_world(kind)


@pytest.fixture
def adapted(kind):
    return make_world(kind, ("shop", "clinic"))


# ---- every number that a module has as an attribute


def numbers_of(model: nn.Module) -> list[tuple[str, str, object]]:
    """Where a module, or a dict of a module, holds a plain number or a bool: path, attribute, key."""
    found = []
    for path, module in model.named_modules():
        if ".layers.1." in path:  # as layer 0
            continue
        for name, value in vars(module).items():
            if name in vars(nn.Module()) or name in (
                "gradient_checkpointing",
                "_is_hf_initialized",
            ):
                continue
            if name[0] == "_" and isinstance(module, PreTrainedModel):
                continue  # which hooks of Transformers' own are installed, and the like
            if isinstance(value, bool | int | float):
                found.append((path, name, None))
            elif isinstance(value, dict) and not name.startswith("_"):
                found += [(path, name, key) for key, v in value.items() if type(v) in (bool, float)]
    return found


def changed(value):
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 1.5 + 0.25


@pytest.mark.parametrize("kind, adapters", [("llava", ()), ("next", ("shop",))])
def test_each_number_that_changes_an_entry_changes_its_key(kind, adapters):
    world = make_world(kind, adapters)
    before, key = world.entry(), world.key()
    seen = {}
    for path, name, entry_of in numbers_of(world.model):
        module = world.model.get_submodule(path)
        holder = vars(module) if entry_of is None else getattr(module, name)
        at = name if entry_of is None else entry_of
        value = holder[at]
        holder[at] = changed(value)
        try:
            after = world.entry()
        except Exception:  # a model that can't run with this number serves nothing wrong
            continue
        else:
            if after.shape != before.shape or not torch.equal(after, before):
                seen[f"{path}.{name}"] = world.key()
        finally:
            holder[at] = value
    assert world.key() == key
    found = {place.rpartition(".")[2] for place in seen}
    assert found >= {"eps", "variance_epsilon", "scaling", "attention_scaling"}
    assert [place for place, other in seen.items() if other == key] == []


# ---- what people do to a model


def other_inv_freq(world):
    world.model.model.language_model.rotary_emb.inv_freq.mul_(0.5)


def another_activation(world):
    world.layer().mlp.act_fn = nn.ReLU()


def an_activation_as_function(world):
    del world.layer().mlp.act_fn
    world.layer().mlp.act_fn = torch.relu


def layers_the_other_way_round(world):
    layers = world.model.model.language_model.layers
    layers[0], layers[1] = layers[1], layers[0]


def a_layer_less(world):
    world.model.model.language_model.layers = world.model.model.language_model.layers[:-1]
    world.model.config.text_config.num_hidden_layers -= 1


def other_feature_layer(world):
    world.model.config.vision_feature_layer = -1


def half_precision(world):
    world.model.to(torch.bfloat16)


def a_weight_of_the_vision_tower(world):
    with torch.no_grad():
        next(world.model.model.vision_tower.parameters()).add_(0.5)


def a_row_of_the_embeddings(world):
    with torch.no_grad():
        world.model.get_input_embeddings().weight[tiny.VOCO] += 1


def a_plain_tensor(world):
    projector = world.model.model.multi_modal_projector
    weight = projector.linear_2.bias.detach() + 1
    del projector.linear_2._parameters["bias"]
    projector.linear_2.bias = weight


def a_wrapped_tensor(world):
    linear = world.layer().self_attn.k_proj
    weight = linear.weight.detach()
    linear.weight = nn.Parameter(TwoTensor(weight + 1, weight), requires_grad=False)


def a_weight_norm(world):
    projection = world.layer().self_attn.v_proj
    nn.utils.parametrizations.weight_norm(projection)
    with torch.no_grad():
        projection.parametrizations.weight.original0.mul_(2)


def other_means(world):
    world.processor.image_processor.image_mean = [0.1, 0.5, 0.5]


def other_resampling(world):
    world.processor.image_processor.resample = 0


def not_rescaled(world):
    world.processor.image_processor.do_rescale = False


CHANGES = [
    other_inv_freq,
    another_activation,
    an_activation_as_function,
    layers_the_other_way_round,
    a_layer_less,
    other_feature_layer,
    half_precision,
    a_weight_of_the_vision_tower,
    a_row_of_the_embeddings,
    a_plain_tensor,
    a_wrapped_tensor,
    a_weight_norm,
    other_means,
    other_resampling,
    not_rescaled,
]


def test_whatever_changes_an_entry_changes_its_key(kind):
    seen = {}
    for change in [lambda world: None, *CHANGES]:
        world = make_world(kind)
        change(world)
        key = world.key()
        entry = world.entry() if change is not a_wrapped_tensor else torch.empty(0)
        for name, (other_key, other_entry) in seen.items():
            if key == other_key:
                assert torch.equal(entry, other_entry), f"{change.__name__} and {name} share a key"
        seen[change.__name__] = key, entry
    assert len({key for key, _ in seen.values()}) == len(seen)


def test_adapters_are_in_the_key(adapted):
    world = adapted
    states: dict[str, tuple[str, torch.Tensor]] = {}

    def note(name: str) -> None:
        world.model.eval()
        states[name] = world.key(), world.entry()

    world.model.set_adapter("shop")
    note("shop")
    with rescale_adapter_scale(world.model, 0.5):
        note("shop at half")
    world.model.set_adapter("clinic")
    note("clinic")
    world.model.set_adapter(["shop", "clinic"])
    note("both")
    world.model.disable_adapters()
    note("none")
    world.model.enable_adapters()
    world.model.set_adapter("shop")
    note("shop again")
    assert states.pop("shop again")[0] == states["shop"][0]
    layers = [m for m in world.model.modules() if hasattr(m, "merge") and hasattr(m, "lora_A")]
    for layer in layers:
        layer.merge()
    note("merged")  # the same answer up to rounding
    world.model.delete_adapter("clinic")
    names = list(states)
    for index, name in enumerate(names):
        for other in names[:index]:
            apart = (states[name][1] - states[other][1]).abs().max()
            assert states[name][0] != states[other][0], (name, other)
            assert apart > 1e-3 or {name, other} == {"merged", "shop"}


def test_a_store_serves_an_adapter_what_it_made(adapted):
    world, store = adapted, MemoryStore(1 << 20)
    compress = functools.partial(
        voco_model.compress, world.model, PICTURE, processor=world.processor
    )
    for name in ("shop", "clinic", "shop", "clinic"):
        world.model.set_adapter(name)
        world.model.eval()
        (fresh,), (served,) = compress(), compress(store=store)
        assert torch.equal(fresh.kv, served.kv)
    assert (store.stats().hits, store.stats().misses) == (2, 2)


def test_a_fingerprint_is_the_same_after_use_and_in_another_copy(kind):
    world = make_world(kind, ("shop",))
    before = voco_model.fingerprint(world.model)
    key = world.key()
    world.entry()
    prompt = world.processor(
        images=PICTURE, text=voco_model.prompt("What?", 2), return_tensors="pt"
    )
    world.model.generate(**prompt, max_new_tokens=2)
    assert (voco_model.fingerprint(world.model, refresh=True), world.key()) == (before, key)
    assert make_world(kind, ("shop",)).key() == key


def test_autocast_is_in_the_key(world):
    keys = [world.key()]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            keys.append(world.key())
    assert len({*keys, world.key()}) == 3


def test_what_does_not_change_an_entry_shares_its_key(world):
    """The text behind an image is read in the second pass; other kernels compute the same."""
    key = world.key()
    world.model.config.voco_prompt = "mistral"
    world.model.config.voco_isolated = True
    world.model.model.vision_tower.set_attn_implementation("eager")
    world.model.gradient_checkpointing_enable()
    world.model.gradient_checkpointing_disable()
    assert world.key() == key


def test_compiled_layers_and_moved_weights_share_a_key(world):
    key = world.key()
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    world.layer().compile()
    world.layer(2).forward = torch.compile(world.layer(2).forward)
    add_hook_to_module(world.layer(1), AlignDevicesHook("cpu"))
    assert world.key() == key


# ---- what can't be known is refused


def steer(module, args, output):
    return output * 1.5


def test_a_hook_of_unknown_effect_is_refused(world):
    hook = world.layer().mlp.register_forward_hook(steer)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\._forward_hooks.*remove it, or set"):
        world.key()
    hook.remove()
    world.key()
    hook = world.layer().register_forward_pre_hook(lambda module, args: args)
    with pytest.raises(ValueError, match="expected a model without functions of unknown effect"):
        voco_model.compress(
            world.model, PICTURE, processor=world.processor, store=MemoryStore(1 << 20)
        )
    hook.remove()
    hook = torch.nn.modules.module.register_module_forward_hook(steer)
    with pytest.raises(ValueError, match="module._global_forward_hooks"):
        world.key()
    hook.remove()


def test_a_marked_hook_is_in_the_key(world):
    keys = [world.key()]
    for mark in ("", "steering 1", "steering 2"):

        def hook(module, args, output):
            return output

        hook.voco_fingerprint = mark
        handle = world.layer().register_forward_hook(hook)
        keys.append(world.key())
        handle.remove()
    assert len(set(keys)) == 4
    assert world.key() == keys[0]


@pytest.mark.parametrize("how", ["module", "class", "attention"])
def test_a_replaced_forward_is_refused(world, how, monkeypatch):
    mlp = world.layer().mlp
    if how == "module":
        mlp.forward = types.MethodType(lambda self, x: 0 * x, mlp)
    elif how == "class":
        monkeypatch.setattr(type(mlp), "forward", lambda self, x: 0 * x)
    else:
        tower = world.model.model.vision_tower
        AttentionInterface.register("mine", lambda *args, **kwargs: sdpa_attention_forward(*args))
        tower.set_attn_implementation("mine")
    with pytest.raises(ValueError, match="expected a model without functions of unknown effect"):
        world.key()


@pytest.fixture
def one_rank():
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def test_shards_are_refused(world, one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import Shard, distribute_tensor

    key = world.key()
    linear = world.layer().mlp.up_proj
    whole = linear.weight
    mesh = init_device_mesh("cpu", (1,))
    linear.weight = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
    with pytest.raises(
        ValueError, match=r"expected complete weights.*up_proj.*FSDP2.*load it on one"
    ):
        world.key()
    linear.weight = whole
    assert world.key() == key
    world.layer().mlp = FullyShardedDataParallel(
        world.layer().mlp, use_orig_params=True, device_id=torch.device("cpu")
    )
    with pytest.raises(
        ValueError, match=r"expected complete weights.*layers\.0\.mlp in FullySharded"
    ):
        world.key()


def test_partitions_of_zero_3_are_refused(world):
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    key = world.key()
    weight = world.layer().mlp.up_proj.weight
    whole, weight.data = weight.data, torch.empty(0)
    weight.ds_status = ZeroParamStatus.NOT_AVAILABLE
    with pytest.raises(ValueError, match=r"expected complete weights.*up_proj.*ZeRO-3"):
        world.key()
    weight.data, weight.ds_status = whole, ZeroParamStatus.AVAILABLE  # gathered
    assert world.key() == key


def test_quantized_weights_whose_bytes_say_too_little_are_refused(world):
    world.layer().mlp.scale = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    with pytest.raises(ValueError, match="expected weights as dense tensors, got .*mlp.scale"):
        world.key()


class Scaled:
    """An object of a user's, with a number that counts."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.itself = self


@pytest.mark.parametrize(
    "one, other",
    [
        ([torch.tensor(1.0)], [torch.tensor(5.0)]),
        ({"a": torch.tensor(1.0)}, {"a": torch.tensor(5.0)}),
        ([nn.Linear(2, 2)], [nn.Linear(2, 3)]),
        (types.SimpleNamespace(scale=1), types.SimpleNamespace(scale=2)),
        (Scaled(1.0), Scaled(2.0)),
        (nn.Sequential(nn.Tanh(), nn.ReLU()), nn.Sequential(nn.ReLU(), nn.Tanh())),
    ],
)
def test_what_attributes_hold_is_in_the_key(world, one, other):
    keys = []
    for value in (one, other, one):
        world.layer().extra = value
        keys.append(world.key())
    assert keys[0] == keys[2] != keys[1]


def test_the_order_of_modules_is_in_the_key(world):
    first, second = nn.Linear(2, 2), nn.Tanh()
    keys = []
    for named in ({"a": first, "b": second}, {"b": second, "a": first}):
        world.layer().extra = nn.Sequential(OrderedDict(named))
        keys.append(world.key())
    assert keys[0] != keys[1]


def test_which_module_is_shared_is_in_the_key(world):
    layers = world.model.model.language_model.layers
    keys = []
    for shared in (0, 1, 0):
        layers[2] = layers[shared]
        keys.append(world.key())
    assert keys[0] == keys[2] != keys[1]


def test_an_object_that_can_be_called_is_refused(world):
    class Act:
        def __call__(self, x):
            return 0 * x

    world.layer().act = Act()
    with pytest.raises(ValueError, match="functions of unknown effect, got .*Act at"):
        world.key()
    world.layer().act.voco_fingerprint = "zeros"
    world.key()


def test_an_image_processor_is_known_by_more_than_its_class_name(world):
    key = world.key()
    kind = type(world.processor.image_processor)
    world.processor.image_processor.__class__ = type(kind.__name__, (kind,), {"__module__": "mine"})
    assert world.key() != key


@pytest.mark.parametrize("value", [np.float32(2), np.arange(3.0), {"a": {1, 2}}, torch.float16])
def test_attributes_of_many_types_are_told(world, value):
    keys = [world.key()]
    world.layer().strength = value
    keys += [world.key(), world.key()]
    world.layer().strength = np.float32(3)
    keys.append(world.key())
    assert keys[1] == keys[2] and len(set(keys)) == 3


# ---- later


def test_a_changed_model_is_told_from_what_it_was(adapted):
    world = adapted
    world.model.set_adapter("shop")
    watch = Unchanged(world.model)
    watch.check()
    with ExitStack() as steps:
        world.model.set_adapter("clinic")
        steps.callback(world.model.set_adapter, "shop")
        with pytest.raises(
            ValueError, match=r"_active_adapter: \['shop'\] before, \['clinic'\] now"
        ):
            watch.check()
    watch.check()
    with torch.no_grad():
        world.model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="got weights that were written or replaced"):
        watch.check()


def test_without_a_store_a_hook_is_noticed_and_not_refused(world):
    world.layer().register_forward_hook(lambda *given: None)
    watch = Unchanged(world.model, strict=False)
    watch.check()
    hook = world.layer().register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match=r"layers\.0\._forward_hooks: .* before, "):
        watch.check()
    hook.remove()
    watch.check()
    engine = voco_model.TwoPassEngine(world.model, world.processor, max_new_tokens=1)
    engine.answer(PICTURE, "What?")
    with pytest.raises(ValueError, match="functions of unknown effect"):
        voco_model.TwoPassEngine(world.model, world.processor, MemoryStore(1 << 20))


def test_dropout_in_training_mode_is_refused(world):
    world.layer().drop = nn.Dropout(0.1)
    world.layer().drop.train()
    with pytest.raises(ValueError, match=r"layers\.0\.drop.*call model.eval\(\)"):
        world.entry()
    world.model.eval()
    world.entry()
