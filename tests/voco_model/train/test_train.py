"""Runs on one process: what they learn, what they leave behind, what they refuse."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
import sys
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from transformers import LlavaForConditionalGeneration, TrainerCallback, TrainerState

import voco_model.train.arguments
import voco_model.train.config
import voco_model.train.run
import voco_model.vlm.attention
from tests.voco_model import instruction, tiny
from voco_model.data.faults import DataError, FaultLog, FaultPolicy
from voco_model.miniature.dataset import write_data
from voco_model.train import checkpoints, load_config, make_config, train
from voco_model.train.messages import quiet
from voco_model.train.progress import Meter
from voco_model.vlm.load import load, load_processor
from voco_model.vlm.prompt import STYLES

ROOT = Path(__file__).parents[3]


@pytest.fixture
def values(checkpoint, data, tmp_path):
    def made(**changes) -> dict:
        return instruction.config(checkpoint, data, tmp_path / "out", **changes)

    return made


class Gradients(TrainerCallback):
    """The gradients of each step, in one vector, and the losses."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.losses: list[float] = []
        self.samples: list[int] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        found = [p.grad.detach().double().flatten() for p in model.parameters() if p.requires_grad]
        self.gradients.append(torch.cat(found))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.samples.append(logs["samples"])


def watched(values: dict) -> Gradients:
    seen = Gradients()
    train(make_config(values), callbacks=[seen])
    shutil.rmtree(values["output"])
    return seen


def dense(query, key, value, layout, *, scale=None, **kwargs):
    """What the authors run: SDPA with a mask of one bool a pair, whose padding rows are un-hidden."""
    mask = layout.materialize()[:, None]
    mask = mask | ~mask.any(-1, keepdim=True)
    groups = query.shape[1] // key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, scale=scale, enable_gqa=groups > 1
    )


def unmasked(query, key, value, layout, *, scale=None, **kwargs):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def test_a_configuration_with_a_byte_order_mark(values, tmp_path):
    written = yaml.safe_dump(values(prompt="authors"))
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "run.yaml").write_text(written, encoding=encoding)
        assert load_config(tmp_path / "run.yaml") == make_config(values(prompt="authors"))
    (tmp_path / "run.yaml").write_bytes(b"output: caf\xe9\n")
    with pytest.raises(ValueError, match="expected a YAML file, got .*run.yaml: "):
        load_config(tmp_path / "run.yaml")


def test_what_is_no_yaml_file_is_named(tmp_path):
    tiny.picture(0).save(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match=r"expected a YAML file, got .*photo\.jpg: "):
        load_config(tmp_path / "photo.jpg")
    with pytest.raises(FileNotFoundError, match="expected a YAML file, got a folder: "):
        load_config(tmp_path)
    (tmp_path / "list.yaml").write_text("- model\n")
    with pytest.raises(ValueError, match=r"with keys and values, got list in .*list\.yaml"):
        load_config(tmp_path / "list.yaml")


LONG = {"optimizer": {"learning_rate": 1e-3, "epochs": 10}}  # 30 steps


@pytest.mark.slow
def test_thirty_steps_are_those_of_a_dense_mask(values, monkeypatch):
    """Losses and gradients within twice the error of the dense mask, against a dense run in float64."""
    padded = values(batch={"packed": False}, **LONG)
    ours = watched(padded)
    monkeypatch.setattr(voco_model.vlm.attention, "masked_attention", dense)
    theirs = watched(padded)
    with monkeypatch.context() as in_double:
        in_double.setattr(voco_model.train.run, "_weights_dtype", lambda config: torch.float64)
        truth = watched(padded)
    monkeypatch.setattr(voco_model.vlm.attention, "masked_attention", unmasked)
    without = watched(padded)

    assert len(truth.losses) == 30 and truth.losses[-1] < 0.7 * truth.losses[0]

    def errors(seen: Gradients) -> torch.Tensor:
        """Of the losses, and of the gradients of each step (largest of all)."""
        losses = torch.tensor(seen.losses) - torch.tensor(truth.losses)
        pairs = zip(seen.gradients, truth.gradients, strict=True)
        return torch.stack(
            [losses.abs(), torch.stack([(a - b).abs().max() for a, b in pairs]).float()]
        )

    allowed = 2 * errors(theirs).max(1, keepdim=True).values + 1e-5
    assert (errors(ours) <= allowed).all()
    # A mask that does nothing would be noticed.
    assert (errors(without)[:, 0] > 100 * allowed[:, 0]).all()


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}], ids=["plain", "again"])
def test_packed_rows_are_padded_rows(values, changes):
    padded = watched(values(batch={"packed": False}, **changes))
    packed = watched(values(**changes))
    for ours, expected in zip(packed.gradients[:1], padded.gradients[:1], strict=True):
        assert (ours - expected).norm() <= 1e-5 * expected.norm()
    assert packed.losses == pytest.approx(padded.losses, abs=1e-4)


def test_micro_batches_make_no_difference(values):
    one = watched(values(batch={"max_tokens": 4096}))
    many = watched(values(batch={"max_tokens": 512}))
    assert one.losses == pytest.approx(many.losses, abs=1e-4)
    assert (one.gradients[0] - many.gradients[0]).norm() <= 1e-5 * one.gradients[0].norm()


def test_the_frozen_tower_is_not_gone_through_backwards(values):
    class Look(TrainerCallback):
        asked: list[bool] = []

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            patches = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
            patches.register_forward_hook(
                lambda module, inputs, out: self.asked.append(out.requires_grad)
            )

    train(make_config(values(gradient_checkpointing=True)), callbacks=[Look()])
    assert Look.asked and not any(Look.asked)


@pytest.mark.slow
def test_compiled_and_checkpointed_under_the_mask(values):
    plain = watched(values(optimizer={"steps": 1}, batch={"max_tokens": 4096}))
    both = watched(
        values(
            optimizer={"steps": 1},
            batch={"max_tokens": 4096},
            compile=True,
            gradient_checkpointing=True,
            trainer={"use_cpu": True, "torch_compile_backend": "eager"},
        )
    )
    assert both.losses == pytest.approx(plain.losses, abs=1e-4)
    assert (both.gradients[0] - plain.gradients[0]).norm() <= 1e-5 * plain.gradients[0].norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_liger_under_the_mask(values):
    pytest.importorskip("liger_kernel")
    plain = watched(values(optimizer={"steps": 3}, trainer={}))
    liger = watched(values(optimizer={"steps": 3}, trainer={}, liger=True))
    assert liger.losses == pytest.approx(plain.losses, rel=2e-3)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_model_is_what_load_and_from_pretrained_read(kind, tmp_path, data):
    source = instruction.write_checkpoint(tmp_path / "checkpoint", kind)
    changes = {
        "voco": {"tokens": [1, 2, 4], "distinct": True, "isolated": True},
        "prompt": "mistral",
    }
    values = instruction.config(source, data, tmp_path / "out", **changes)
    saved = train(make_config(values))

    model, processor = load(saved)
    assert (model.config.num_voco, model.config.voco_distinct) == (4, True)
    assert (model.config.voco_isolated, model.config.voco_prompt) == (True, "mistral")
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    written = processor.apply_chat_template(question, add_generation_prompt=True)
    assert written == voco_model.prompt("What?", 4, style="mistral")
    plain = type(model).from_pretrained(saved)
    assert torch.equal(instruction.weights(plain), instruction.weights(model))
    # Each VoCo token has learnt a row of its own.
    before = dict(tiny.tiny_llava(kind).named_parameters())[
        "model.language_model.embed_tokens.weight"
    ]
    after = model.get_input_embeddings().weight
    assert after.shape[0] == tiny.VOCO + 4 and before.shape[0] == tiny.VOCO + 1
    assert not torch.equal(after[tiny.VOCO], before[tiny.VOCO])
    assert len({tuple(row.tolist()) for row in after[tiny.VOCO :]}) == 4


def test_lora_trains_adapters_projector_and_voco_rows(values, checkpoint):
    saved = train(make_config(values(lora={"r": 4, "alpha": 8}, optimizer={"learning_rate": 0.05})))
    before = dict(LlavaForConditionalGeneration.from_pretrained(checkpoint).named_parameters())
    after = dict(load(saved)[0].named_parameters())
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(
        ("_proj" in n and "language" in n) or "projector" in n or "embed_tokens" in n
        for n in changed
    )
    embeddings = "model.language_model.embed_tokens.weight"
    rows = (before[embeddings] != after[embeddings]).any(1).nonzero().flatten().tolist()
    assert rows == [tiny.VOCO]


@pytest.mark.parametrize("changes", [{}, {"lora": {"r": 4, "alpha": 8}}], ids=["all", "lora"])
def test_a_run_goes_on_where_it_was_and_refuses_to_be_another(changes, values, tmp_path):
    whole = watched(values(**changes))
    stopped = values(checkpoints={"every": 2, "keep": 1}, **changes)

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_config(stopped), callbacks=[Stop()])
    output = tmp_path / "out"
    assert [p.name for p in checkpoints.folders(output)] == ["checkpoint-2"]
    for other, said in (
        ({"seed": 1}, r"got another \(seed: 42 before, 1 now\)"),
        ({"voco": {"tokens": 1}}, r"data: other samples, .*; voco.tokens: 2 before, 1 now\)"),
        ({"prompt": "mistral"}, r"; prompt: vicuna before, mistral now\)"),
        (
            {"optimizer": {**stopped["optimizer"], "learning_rate": 0.1}},
            r"\(optimizer.learning_rate: 0.002 before, 0.1 now\)",
        ),
        ({"checkpoints": {"resume": False}}, "expected no checkpoints"),
    ):
        with pytest.raises(ValueError, match=said):
            train(make_config({**stopped, **other}))
    seen = Gradients()
    train(make_config(stopped), callbacks=[seen])
    assert seen.losses == pytest.approx(whole.losses[2:], abs=1e-6)
    assert seen.samples[-1] == whole.samples[-1] == 48
    assert [p.name for p in checkpoints.folders(output)] == ["checkpoint-6"]


def test_a_full_disk_costs_no_checkpoint(values, tmp_path, monkeypatch):
    config = make_config(values(checkpoints={"every": 2, "keep": 1}))
    output = tmp_path / "out"
    usage = shutil.disk_usage

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                full = usage(output)._replace(free=1000)
                monkeypatch.setattr(shutil, "disk_usage", lambda path: full)

    with pytest.raises(OSError, match="of free space for a checkpoint"):
        train(config, callbacks=[Fill()])
    assert [p.name for p in checkpoints.folders(output)] == ["checkpoint-2"]
    assert checkpoints.newest(output).name == "checkpoint-2"
    monkeypatch.setattr(shutil, "disk_usage", usage)

    # And where the disk fills up while it is written: files may have no more than 100 kB from now on.
    class Limit(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            Exception, match=r"(?i)file too large|write|inline_container|os error 27"
        ):
            train(config, callbacks=[Limit()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints.newest(output).name == "checkpoint-2"
    assert (output / "checkpoint-4").is_dir()  # half of it
    train(config)
    assert [p.name for p in checkpoints.folders(output)] == ["checkpoint-6"]


def test_what_is_left_out_is_told(values, data, tmp_path, capsys):
    records = instruction.records(24)
    records[5]["image"] = "nowhere.png"
    records[7]["image"] = "broken.png"
    path = data.with_name("with_faults.json")
    path.write_text(json.dumps(records, indent=1))
    # A header alone: its size can be read, its pixels can't.
    data.with_name("broken.png").write_bytes((data.parent / "1.png").read_bytes()[:200])
    source = {"sources": [{"path": str(path), "images": str(data.parent)}], "workers": 0}
    with pytest.raises(ValueError, match="missing_file: 1"):
        train(make_config(values(data={**source, "max_length": 320})))
    with pytest.raises(DataError, match=r"with_faults.json:\d+: broken_image: .*broken.png"):
        faults = {"missing_file": "skip"}
        train(
            make_config(values(data={**source, "workers": 1, "max_length": 320, "faults": faults}))
        )
    (tmp_path / "out" / "left-out-0.jsonl").unlink()
    faults = {"missing_file": "skip", "broken_image": "skip"}
    train(make_config(values(data={**source, "max_length": 320, "faults": faults})))
    said = capsys.readouterr().err
    line = 1 + path.read_text()[: path.read_text().index('"id": "5"')].count("\n") - 1
    missing = f"expected an image, got no such file: {data.parent / 'nowhere.png'}"
    assert f"{path}:{line}: {missing}" in said
    assert said.count("skipped or cut: ") == 1 and "broken_image" in said  # once, in two epochs
    told = (tmp_path / "out" / "left-out-0.jsonl").read_text().splitlines()
    assert [json.loads(one)["kind"] for one in told] == ["broken_image"]


def test_dry_run_touches_no_model(values, capsys, tmp_path):
    assert train(make_config(values()), dry_run=True) is None
    said = capsys.readouterr().err
    assert re.search(r"24 samples, [\d,]+ tokens, 3 steps per epoch", said)
    assert not (tmp_path / "out" / "train.yaml").exists()


def test_dry_run_refuses_a_processor_that_does_not_fit(values, tmp_path):
    found = values()
    shutil.copytree(found["model"], tmp_path / "other")
    found["model"] = str(tmp_path / "other")
    processor = load_processor(found["model"])
    processor.num_additional_image_tokens = 0
    processor.save_pretrained(found["model"])
    with pytest.raises(ValueError, match="num_additional_image_tokens 1, got 0"):
        train(make_config(found), dry_run=True)
    processor.num_additional_image_tokens = 1
    processor.save_pretrained(found["model"])
    with pytest.raises(ValueError, match=r"the token <\|im_end\|>, which ends answers"):
        train(make_config(found | {"prompt": "chatml"}), dry_run=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modle": "x"}, "modle: expected one of model, output"),
        ({"batch": {"global_sise": 4}}, "batch.global_sise: expected one of global_size"),
        ({"prompt": "llama"}, f"expected a prompt style among {', '.join(STYLES)}"),
        ({"voco": {"tokens": 0}}, "expected at least 1 VoCo token, got 0"),
        ({"trainer": {"learning_rate": 1}}, r"learning_rate \(set optimizer.learning_rate\)"),
        ({"data": {"faults": {"over_long": "maybe"}}}, "expected truncate or skip or fatal"),
        ({"data": {"sources": []}}, "data.sources"),
        ({"lora": {}, "sharding": "zero3"}, "expected sharding: none with lora, got zero3"),
        ({"lora": {}, "train_vision_tower": True}, "expected train_vision_tower: false with lora"),
    ],
)
def test_errors_of_a_configuration(values, changes, said):
    with pytest.raises(ValueError, match=said):
        make_config(values(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainer": {"lerning_rate": 1}}, "got lerning_rate"),
        ({"batch": {"packed": False, "rows": 3}}, "got 8 with 3 rows on 1 processes"),
        (
            {"batch": {"max_tokens": 100}},
            "expected batch.max_tokens of at least the longest sample",
        ),
        ({"data": {"streaming": True}}, "expected optimizer.steps with data.streaming"),
        ({"trainer": {"use_cpu": True, "report_to": "wandbb"}}, "report_to as one of none, all, "),
    ],
)
def test_errors_of_a_run(values, changes, said):
    with pytest.raises(ValueError, match=said):
        train(make_config(values(**changes)))


@pytest.mark.parametrize(
    ("changes", "missing", "said"),
    [
        (
            {"trainer": {"report_to": "wandb"}},
            "wandb",
            "trainer.report_to: wandb needs, found none",
        ),
        ({"trainer": {"report_to": ["wandb"]}}, "wandb", "set report_to: none"),
        ({"sharding": "zero3"}, "deepspeed", r"voco-kernels\[deepspeed\].*set sharding: fsdp2"),
        ({"lora": {"r": 4}}, "peft", r"voco-kernels\[train\]"),
        ({"liger": True}, "liger_kernel", r"voco-kernels\[liger\].*set liger: false"),
    ],
)
def test_a_missing_package_is_named_by_the_dry_run_too(values, monkeypatch, changes, missing, said):
    arguments = voco_model.train.arguments
    monkeypatch.setattr(
        arguments, "find_spec", lambda name: None if name == missing else ModuleSpec(name, None)
    )
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: [])
    for dry_run in (False, True):
        with pytest.raises(ModuleNotFoundError, match=said):
            train(make_config(values(**changes)), dry_run=dry_run)


def test_without_a_gpu_the_run_says_what_to_set(values, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    config = make_config(values() | {"trainer": {}})
    with pytest.raises(ValueError, match=r"expected a GPU, .* set trainer: \{use_cpu: true\}"):
        train(config)
    assert not (tmp_path / "out").exists()
    assert train(config, dry_run=True) is None
    said = capsys.readouterr().err
    assert "this machine can't train it: expected a GPU" in said and "3 steps per epoch" in said
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(voco_model.train.arguments, "is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match="expected a GPU that computes in bfloat16"):
        train(make_config({**values(dtype="bfloat16"), "trainer": {}}))


def test_fewer_samples_than_a_step_are_noted(values, capsys):
    train(make_config(values(batch={"global_size": 128, "max_tokens": 8192})), dry_run=True)
    said = capsys.readouterr().err
    assert "1 step per epoch" in said
    assert "fewer samples than a step: batch.global_size is 128" in said


def test_by_default_there_are_no_more_workers_than_cores(values, monkeypatch):
    default = make_config(values(data={"workers": None})).data
    for cpus, processes, expected in ((2, 1, 2), (64, 1, 4), (8, 8, 1), (4, 8, 1)):
        monkeypatch.setattr(voco_model.train.config, "available_cpus", lambda cpus=cpus: cpus)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert default.num_workers == expected
    assert make_config(values(data={"workers": 7})).data.num_workers == 7


def test_a_log_in_a_file_is_lines_of_json(values, capfd):
    train(make_config(values(checkpoints={"every": 2}, data={"workers": None})))
    out, err = capfd.readouterr()
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    steps = [line for line in lines if "loss" in line]
    assert [(line["step"], line["steps"]) for line in steps] == [(n, 6) for n in range(1, 7)]
    assert all(isinstance(line["loss"], float) and line["samples"] > 0 for line in steps)
    assert re.fullmatch(r"\d+:\d\d:\d\d", steps[0]["eta"]) and steps[-1]["eta"] == "0:00:00"
    for noise in ("Writing model shards", "PAD/BOS/EOS", "worker processes", "unable to detect"):
        assert noise not in out + err


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_bar_keeps_its_place_at_any_width(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stderr", io.StringIO())
    meter = Meter(None, FaultPolicy(), FaultLog(), samples=0, bar=True)
    meter._console = Console(file=sys.stderr, width=width, force_terminal=True, color_system=None)
    state = TrainerState(global_step=0, max_steps=1200, is_world_process_zero=True)
    meter.on_train_begin(None, state, None, model=torch.nn.Linear(1, 1))
    logs = {"loss": 1.2345, "tokens_per_second": 45678.0, "padding": 0.0, "useful_tflops": 321.0}
    state.global_step = 1200
    meter.on_step_end(None, state, None)
    meter.on_log(None, state, None, logs=logs)
    meter.on_train_end(None, state, None)
    shown = [line for line in re.split("[\r\n]", sys.stderr.getvalue()) if "step" in line][-1]
    assert "step 1200/1200" in shown and "…" not in shown
    assert shown.count("━") >= 10
    assert ("loss 1.2345  45,678 tokens/s" in shown) == (width >= 80)
    assert ("TFLOP/s per GPU" in shown) == (width == 160)


def test_a_warning_is_shown_once():
    with warnings.catch_warnings(record=True) as shown, quiet():
        for number in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("is deprecated", FutureWarning, stacklevel=1)
                warnings.warn(f"another {number}", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == [
        "is deprecated",
        "another 0",
        "another 1",
        "another 2",
    ]


def test_the_laptop_config_trains_the_miniature(tmp_path):
    pytest.importorskip("sklearn", reason="the miniature's digits need scikit-learn")
    source = {"path": str(write_data(tmp_path / "data", 40)), "images": str(tmp_path / "data")}
    config = yaml.safe_load((ROOT / "configs/miniature-cpu.yaml").read_text())
    config |= {"model": str(ROOT / config["model"]), "output": str(tmp_path / "out")}
    config |= {"data": {"sources": [source]}, "checkpoints": {"every": 0}}
    config["optimizer"] |= {"steps": 2}
    model, _ = load(train(make_config(config)))
    assert (model.config.num_voco, model.config.voco_distinct) == (4, True)


def test_a_missing_image_that_was_put_there_is_found(values, data, tmp_path):
    records = instruction.records(8)
    records[1]["image"] = "late.png"
    path = tmp_path / "late.json"
    path.write_text(json.dumps(records))
    found = values(data={"sources": [{"path": str(path), "images": str(tmp_path)}]})
    with pytest.raises(ValueError, match="missing_file"):
        train(make_config(found), dry_run=True)
    for number in range(6):
        shutil.copy(data.with_name(f"{number}.png"), tmp_path)
    shutil.copy(tmp_path / "1.png", tmp_path / "late.png")
    train(make_config(found), dry_run=True)


def test_a_trained_tower_leaves_no_parameter_waiting(values):
    class Look(TrainerCallback):
        without: list[str] = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            Look.without = [name for name, parameter in named if parameter.grad is None]
            assert any("vision_tower" in name for name, _ in named)

    changes = {"train_vision_tower": True, "optimizer": {"steps": 1}}
    train(make_config(values(**changes)), callbacks=[Look()])
    assert not Look.without


def test_an_output_that_is_a_file_is_refused(values, data):
    found = {**values(), "output": str(data)}
    with pytest.raises(ValueError, match="expected a folder as output, got a file"):
        train(make_config(found))
