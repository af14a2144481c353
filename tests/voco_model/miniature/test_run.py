import json
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import voco_model
from voco_model import baselines
from voco_model.cli import app
from voco_model.miniature import run as runs
from voco_model.miniature.exam import make_exam, score
from voco_model.miniature.model import Shape, build_model, build_processor
from voco_model.miniature.recipe import FULL, QUICK, Job, Recipe, jobs
from voco_model.miniature.run import _alone, _check_done, run
from voco_model.miniature.scenes import KINDS, digits
from voco_model.miniature.training import _muon_and_adamw, train_tower

TINY = Recipe(
    shape=Shape(hidden=32, inner=32, layers=3, heads=2, tower_hidden=32, tower_layers=1),
    seeds=1,
    counts=(1, 2),
    tower_steps=2,
    start_steps=2,
    tune_steps=2,
    long=2,
    tower_batch=2,
    batch=2,
    questions=2,
    distinct=(2,),
    pictures=2,
)


def quiet():
    return Console(file=open("/dev/null", "w"))  # noqa: SIM115


@pytest.mark.slow
def test_a_run_has_every_row_and_goes_on_where_it_stopped(tmp_path):
    results = run(TINY, tmp_path, workers=1, device="cpu", console=quiet())
    found = {(row["row"], row["tokens"]) for row in results["rows"]}
    assert found == {
        ("full", 144),
        *((row, n) for n in (1, 2) for row in ("untrained", "fastv", "random", "voco")),
        *((row, n) for n in (1, 2) for row in ("voco drawn", "pooling", "qformer")),
        ("voco distinct", 2),
        ("qformer long", 1),
    }
    for row in results["rows"]:
        assert set(row["accuracy"]) == set(KINDS)
    assert (tmp_path / "retention.png").exists()
    assert "VoCo" in (tmp_path / "tables.md").read_text()

    # What is saved answers as what was examined.
    (one,) = [r for r in results["rows"] if (r["row"], r["tokens"]) == ("voco", 1)]
    method = baselines.load(tmp_path / "seed-0/voco-1")
    assert method.name == "voco" and method.num_tokens == 1
    assert score(method, make_exam(TINY.pictures, TINY.exam_seed)) == one["accuracy"]
    for name in ("qformer-2", "pooling-1"):
        loaded = baselines.load(tmp_path / "seed-0" / name)
        assert name == f"{loaded.name}-{loaded.num_tokens}"

    before = (tmp_path / "seed-0/voco-2/scores.json").stat().st_mtime_ns
    (tmp_path / "seed-0/qformer-2/scores.json").unlink()
    again = run(TINY, tmp_path, workers=1, device="cpu", console=quiet())
    assert (tmp_path / "seed-0/voco-2/scores.json").stat().st_mtime_ns == before
    assert again["rows"] == results["rows"]  # from the same seed, the same
    assert run(TINY, tmp_path, workers=2, device="cpu", console=quiet()) == again

    with pytest.raises(ValueError, match="another recipe.json"):
        run(replace(TINY, tune_steps=3), tmp_path, workers=1, device="cpu", console=quiet())
    (tmp_path / "recipe.json").write_text(json.dumps(replace(TINY, seeds=2).to_dict()))
    with pytest.raises(
        ValueError, match="at least the 2 seeds of the run .* got 1; pass --seeds 2"
    ):
        run(TINY, tmp_path, workers=1, device="cpu", console=quiet())


def test_all_methods_tune_for_the_same_number_of_steps():
    for recipe in (FULL, QUICK, TINY):
        tuned = [j for j in jobs(recipe) if j.row not in ("tower", "start", "qformer long")]
        assert {job.steps for job in tuned} == {recipe.tune_steps}
        names = [job.name for job in jobs(recipe)]
        assert len(names) == len(set(names))
        for number, job in enumerate(jobs(recipe)):
            assert job.needs is None or job.needs in names[:number]
    assert Job("voco", 2, 1, 5, 5).name == "seed-1/voco-2"
    assert json.dumps(FULL.to_dict())


def test_who_does_not_know_places_guesses_the_most_frequent_answer():
    exam = make_exam(40, seed=0)
    assert {exam.without_places[kind] for kind in ("count", "largest", "smallest", "colours")} == {
        1
    }
    # Two digits of four leave two quarters empty, four digits are seldom alike.
    assert 0.25 < exam.without_places["digit"] < exam.without_places["colour"] < 0.6


def test_an_exam_counts_right_answers_only():
    class Oracle:
        """Knows all, but says nothing about colours."""

        def __init__(self, exam):
            self.asked = [question for questions in exam.questions for question in questions]

        def answer(self, pictures, texts, **options):
            assert options == {"max_new_tokens": 2, "do_sample": False}
            now, self.asked = self.asked[: len(texts)], self.asked[len(texts) :]
            assert [question.text for question in now] == texts
            return ["" if question.kind == "colour" else question.answer for question in now]

    exam = make_exam(5, seed=0)
    assert score(Oracle(exam), exam, pictures_at_once=2) == {
        kind: float(kind != "colour") for kind in KINDS
    }


def test_one_pass_and_two_passes_answer_alike():
    processor = build_processor()
    model = build_model(processor, Shape(hidden=32, heads=2, layers=2, tower_layers=1), 0)
    exam = make_exam(2, seed=0)
    with baselines.apply("voco", model, processor, 2) as method:
        texts = [question.text for question in exam.questions[0]]
        pictures = [exam.pictures[0]] * len(texts)
        two = method.generate(pictures, texts, max_new_tokens=2, do_sample=False)
        inputs = method.inputs(pictures, texts)
        one = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert torch.equal(one[:, inputs["input_ids"].shape[1] :], two)


def test_the_tower_learns_and_is_then_frozen():
    processor = build_processor()
    tower = build_model(processor, Shape(layers=1, tower_layers=1), 0).model.vision_tower
    losses = []
    train_tower(
        tower, 160, seed=0, size=8, rate=8e-3, progress=lambda step, loss: losses.append(loss)
    )
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert not any(p.requires_grad for p in tower.parameters()) and not tower.training


def test_the_model_is_one_that_enable_takes():
    processor = build_processor()
    model = build_model(processor, Shape(layers=1, tower_layers=1), 0)
    rows = model.get_input_embeddings().num_embeddings
    handle = voco_model.enable(model, processor, 1)
    assert handle.voco_token_id == processor.tokenizer.voco_token_id
    assert model.get_input_embeddings().num_embeddings == rows  # the tokenizer knows it already


def test_a_qformer_is_tuned_by_the_same_optimizers():
    processor = build_processor()
    model = build_model(processor, Shape(layers=1, tower_layers=1), 0)
    baselines.apply("qformer", model, processor, 2, layers=1, width=32, heads=2)
    model.model.vision_tower.requires_grad_(False)
    muon, adamw = (
        {id(p) for group in optimizer.param_groups for p in group["params"]}
        for optimizer in _muon_and_adamw(model, 1e-3)
    )
    for name, weight in model.named_parameters():
        if "vision_tower" in name:
            assert id(weight) not in muon | adamw
        else:
            matrix = weight.dim() == 2 and "embed_tokens" not in name and "lm_head" not in name
            assert id(weight) in (muon if matrix else adamw), name


def test_a_killed_training_says_what_to_do():
    future, job = Future(), Job("voco", 1, 0, 5, 5)
    future.set_exception(BrokenProcessPool("terminated abruptly"))
    with pytest.raises(RuntimeError, match="seed-0/voco-1 .* killed.*the same command resumes"):
        _check_done(future, job)
    future = Future()
    future.set_exception(KeyError("weight"))
    with pytest.raises(RuntimeError, match=r"training seed-0/voco-1 failed: KeyError\('weight'"):
        _check_done(future, job)


def test_two_runs_do_not_share_a_folder(tmp_path):
    with _alone(tmp_path), pytest.raises(ValueError, match="one in progress; wait for it"):
        run(TINY, tmp_path, workers=1, device="cpu", console=quiet())


def test_without_matplotlib_nothing_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"no matplotlib; pip install .*miniature"):
        run(TINY, tmp_path / "new", workers=1, device="cpu", console=quiet())
    assert not (tmp_path / "new").exists()


def test_the_command_refuses_the_folder_of_another_run(tmp_path):
    (tmp_path / "recipe.json").write_text('{"seeds": 3, "distinct": []}')
    result = CliRunner().invoke(app, ["miniature", "--quick", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "with another recipe.json; choose another --output" in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_without_scikit_learn_the_extra_is_named(tmp_path, monkeypatch):
    digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = CliRunner().invoke(app, ["miniature", "--output", str(tmp_path / "new")])
    assert result.exit_code == 2 and "pip install 'voco-kernels[miniature]'" in result.stderr
    assert not (tmp_path / "new").exists()


def test_the_command_adds_to_a_run_and_takes_nothing_away(tmp_path, monkeypatch):
    path, asked = tmp_path / "recipe.json", []
    monkeypatch.setattr(runs, "_run_all", lambda todo, recipe, *rest: asked.append(recipe))
    monkeypatch.setattr(runs, "collect", lambda recipe, output: sys.exit(0))

    def call(*options):
        return CliRunner().invoke(app, ["miniature", "--output", str(tmp_path), *options])

    call("--distinct", "4", "--seeds", "2")
    call("--distinct", "8", "--distinct", "4", "--seeds", "3")
    assert [(recipe.distinct, recipe.seeds) for recipe in asked] == [((4,), 2), ((4, 8), 3)]
    result = call("--distinct", "8")
    assert result.exit_code == 2 and len(asked) == 2
    assert "keep its models with [4] distinct VoCo tokens, got [8]" in " ".join(
        result.stderr.split()
    )
    result = call("--distinct", "1")
    assert result.exit_code == 2
    assert json.loads(path.read_text())["distinct"] == [4, 8]


@pytest.mark.parametrize(
    ("options", "written", "message"),
    [
        (["--device", "cudaa"], None, "expected cpu, cuda or cuda:N, got 'cudaa'"),
        ([], "a file", "expected a folder, got the file"),
        (["--device", "meta"], None, "expected cpu, cuda or cuda:N, got 'meta'"),
        ([], {"recipe.json": "{"}, "expected a recipe of an earlier run"),
        ([], {"recipe.json": "[]"}, "expected a recipe of an earlier run"),
    ],
)
def test_the_command_refuses_before_anything_is_written(tmp_path, options, written, message):
    output = tmp_path / "run"
    if isinstance(written, str):
        output.write_text(written)
    elif written:
        output.mkdir()
        (output / "recipe.json").write_text(written["recipe.json"])
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["miniature", "--output", str(output), *options])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert sorted(tmp_path.rglob("*")) == before
