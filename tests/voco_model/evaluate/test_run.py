"""The command: what it refuses before anything is loaded, and a whole run through lmms-eval."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from transformers import AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

import voco_model
from tests.voco_model import tiny
from tests.voco_model.instruction import write_checkpoint
from voco_model import baselines
from voco_model.devices import device_name
from voco_model.evaluate import results, run
from voco_model.evaluate.cli import evaluate as command
from voco_model.evaluate.run import evaluate

QUESTIONS = (
    "<image>\nWhat is it?",
    "Which colour has it?\nAnswer in one word.",
    "Is it large?",
    "What is 1 + 1?",  # without an image
    "Where is the cup?\n<image>",
)
WITHOUT_IMAGE = 3
NEW = 6  # tokens of an answer


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """As training leaves a VoCo model: the config says so. Two tokens an image."""
    folder = tmp_path_factory.mktemp("tuned")
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.5)  # not the plain one
    voco_model.enable(model, processor, 2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def expect_error(match: str, model: Path, tmp_path: Path, **changes) -> None:
    arguments = {"tasks": ["gqa"], "output": tmp_path / "out", "methods": ["full"], **changes}
    with pytest.raises(ValueError, match=match):
        evaluate(model, **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"methods": ["fast"]}, "expected methods of full, voco, .*got 'fast'"),
        ({"methods": []}, "at least one method"),
        ({"methods": ["fastv:0"]}, "fastv:TOKENS, got 'fastv:0'"),
        ({"methods": ["fastv:8", "fastv"], "num_tokens": 8}, "each method once, got fastv:8 again"),
        ({"methods": ["untrained:1", "untrained:2"]}, "each method once, got untrained:2 again"),
        ({"methods": ["fastv"], "num_tokens": 0}, "num_tokens >= 1, got 0"),
        ({"methods": ["full", "fastv"]}, "expected a number of tokens for fastv, got none"),
        ({"methods": ["voco"]}, "trained for voco, got .* a plain LLaVA.*--checkpoint voco=PATH"),
        ({"methods": ["qformer"]}, "trained for qformer"),
        ({"tasks": ["gqa", "gqa"]}, "each task once"),
        ({"tasks": ["seedbench"]}, "several_images='middle' for seedbench"),
        ({"several_images": "all"}, "one of refuse, middle, got 'all'"),
        ({"limit": 0}, "limit >= 1, got 0"),
        ({"batch_size": 0}, "batch_size >= 1, got 0"),
        (
            {"checkpoints": {"voco": "there"}},
            "options of full, got some of voco",
        ),
        ({"options": {"fastv": {"layer": 2}}}, "options of full"),
        ({"options": {"full": {"layer": 2}}}, "option of full .*num_voco.*got 'layer'"),
    ],
)
def test_refused_before_anything_is_loaded(changes, match, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "load", None)
    expect_error(match, plain, tmp_path, **changes)


def test_without_lmms_eval_the_extra_is_named(plain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'voco-kernels\[eval\]'"):
        evaluate(plain, ["gqa"], methods=["full"], output=tmp_path / "out")


def test_a_folder_holds_what_can_be_compared(plain, tmp_path):
    record = {"run": "full", "method": "full", "label": "All tokens", "num_tokens": 16}
    facts = {"tasks": ["gqa"], "limit": 4, "several_images": "refuse", "paper_model": None}
    results.write(tmp_path, {**record, **facts, "results": {"gqa": {"exact_match,none": 0.5}}})
    assert "| All tokens | 16 | 50.0 | - | 100.0 |" in (tmp_path / results.TABLE).read_text()
    for changes, match in (
        ({"limit": 4}, "no results of full yet"),
        ({"methods": ["fastv:4"]}, "expected limit None as now, got 4 in .*full.json"),
    ):
        arguments = {"methods": ["full"], **changes}
        with pytest.raises(ValueError, match=match):
            evaluate(plain, ["gqa"], output=tmp_path, **arguments)
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="results of format 1 in .*other.json"):
        evaluate(plain, ["gqa"], methods=["fastv:4"], output=tmp_path, limit=4)


@pytest.mark.parametrize("method", ["full", "untrained", "fastv:4", "random:4"])
def test_a_voco_model_is_measured_as_nothing_else(method, tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "load", None)
    match = "wasn't trained to compress, got .*, which is of voco; name one with upper=..., --upper PATH"
    expect_error(match, tuned, tmp_path, methods=["voco", method])


def test_a_baseline_is_measured_as_nothing_else(tmp_path, monkeypatch):
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    with baselines.apply("pooling", model, processor, 4):
        model.save_pretrained(tmp_path / "pooling")
    monkeypatch.setattr(baselines, "load", None)
    expect_error("expected for full .*, which is of pooling", tmp_path / "pooling", tmp_path)


@pytest.fixture
def loaded(monkeypatch) -> list[tuple]:
    """What ``baselines.load`` is asked for, in a run that loads and asks nothing."""
    seen = []

    def load(path, name, *, num_tokens, dtype, device, **given):
        seen.append((name, num_tokens, path, given))
        model = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))
        return SimpleNamespace(label=name, num_tokens=num_tokens, model=model)

    measured = {"n-samples": {}, "results": {"gqa": {"exact_match,none": 0.5}}}
    monkeypatch.setattr(baselines, "load", load)
    monkeypatch.setattr(run, "_checked_manager", lambda manager, tasks: manager)
    monkeypatch.setattr(run, "_measure", lambda *arguments: measured)
    return seen


def test_upper_is_for_all_that_is_not_tuned(plain, tuned, tmp_path, loaded):
    methods = ["full", "untrained", "fastv:4", "random:4", "voco"]
    evaluate(tuned, ["gqa"], methods=methods, upper=plain, output=tmp_path / "out")
    upper, style = str(plain), {"style": "vicuna"}  # which the tuned model's config names
    assert loaded == [
        ("full", None, upper, style),
        ("untrained", 1, upper, style),
        ("fastv", 4, upper, style),
        ("random", 4, upper, style),
        ("voco", 2, str(tuned), {}),
    ]
    assert json.loads((tmp_path / "out/fastv-4.json").read_text())["options"] == style
    with pytest.raises(ValueError, match="no results of voco:2 yet, got .*voco-2.json"):
        evaluate(tuned, ["gqa"], methods=["voco:2"], output=tmp_path / "out")
    expect_error("once, got voco:2 again", tuned, tmp_path / "new", methods=["voco", "voco:2"])


def test_upper_is_noted_where_no_method_uses_it(plain, tuned, tmp_path, loaded, caplog):
    evaluate(tuned, ["gqa"], methods=["voco"], upper=plain, output=tmp_path / "out")
    assert [call[2] for call in loaded] == [str(tuned)]
    assert "upper is not used: of these methods (voco) none is measured on it" in caplog.text


def test_llava_next_is_asked_in_its_own_style(plain, tmp_path, loaded, monkeypatch):
    for name, style in (("LLaVA-1.6-7B", "mistral"), ("LLaVA-1.6-34B", "chatml")):
        monkeypatch.setattr(run, "model_of", lambda config, name=name: name)
        methods = ["full", "fastv:4"]
        options = {"fastv": {"style": "authors"}}
        evaluate(plain, ["gqa"], methods=methods, options=options, output=tmp_path / style)
        assert [given for *_, given in loaded[-2:]] == [{"style": style}, {"style": "authors"}]
        assert json.loads((tmp_path / style / "full.json").read_text())["options"] == {
            "style": style
        }


def test_an_unusable_output_is_refused_first(plain, tmp_path, loaded, monkeypatch):
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(ValueError, match="expected a folder for results, got .*file"):
            evaluate(plain, ["gqa"], methods=["full"], output=tmp_path / place)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="expected a folder that can be written to, got .*closed"):
        evaluate(plain, ["gqa"], methods=["full"], output=tmp_path / "closed")
    assert not loaded


def run_command(*arguments) -> tuple[int, str]:
    app = typer.Typer()
    app.command(name="eval")(command)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize(
    "more, message",
    [
        (["--option", "fastv=3"], "expected METHOD.NAME=VALUE, got 'fastv=3'"),
        (["--checkpoint", "voco"], "expected METHOD=PATH, got 'voco'"),
        (["--method", "fast"], "expected methods of full"),
    ],
)
def test_command_says_what_was_expected(more, message, plain, tmp_path):
    code, text = run_command("--model", plain, "--tasks", "gqa", "--output", tmp_path, *more)
    assert code == 2 and message in text and "Traceback" not in text


def test_command_hands_its_arguments_on(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(
        "voco_model.evaluate.run.evaluate", lambda *args, **given: seen.update(given, args=args)
    )
    code, _ = run_command(
        *("--model", "m", "--tasks", "gqa, pope,", "--output", tmp_path, "--method", "fastv:64"),
        *("--method", "qformer", "--checkpoint", "qformer=q", "--option", "fastv.layer=3"),
        *("--option", "fastv.style=mistral", "--upper", "u", "--limit", 8, "--num-tokens", 1),
    )
    assert code == 0
    assert seen["args"] == ("m", ["gqa", "pope"])
    assert seen["methods"] == ["fastv:64", "qformer"] and seen["num_tokens"] == 1
    assert seen["options"] == {"fastv": {"layer": 3, "style": "mistral"}}
    assert seen["checkpoints"] == {"qformer": "q"} and seen["upper"] == "u" and seen["limit"] == 8


def test_command_says_what_torch_says_of_a_device(monkeypatch, tmp_path):
    def fail(*arguments, **given):
        torch.device("nonsense")

    monkeypatch.setattr("voco_model.evaluate.run.evaluate", fail)
    monkeypatch.delenv("LOGURU_LEVEL", raising=False)
    code, text = run_command("--model", "m", "--tasks", "gqa", "--output", tmp_path)
    assert code == 2 and "nonsense" in text and "Traceback" not in text
    assert os.environ["LOGURU_LEVEL"] == "WARNING"  # of lmms-eval's lines, no others


# From here on with lmms-eval.


def answers_of_the_plain_model(plain: Path, images: list) -> list[str]:
    """Row by row, prompts written out, with Transformers alone."""
    model = LlavaForConditionalGeneration.from_pretrained(plain).eval()
    processor = AutoProcessor.from_pretrained(plain)
    found = []
    for number, question in enumerate(QUESTIONS):
        image = number != WITHOUT_IMAGE
        text = voco_model.prompt(question.replace("<image>", "").strip(), images=int(image))
        inputs = processor(
            images=[images[number]] if image else None,
            text=text.replace("<VoCo>", "").replace("<image>\n\n", "<image>\n"),
            return_tensors="pt",
        )
        new = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        answer = processor.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(answer.strip())
    return found


def answers_of_the_tuned_model(tuned: Path, images: list) -> list[str]:
    """Row by row, in two passes; the row without an image in the masked model, which hides nothing."""
    model, processor = voco_model.load(tuned)
    found = []
    for number, question in enumerate(QUESTIONS):
        text = question.replace("<image>", "").strip()
        if number == WITHOUT_IMAGE:
            inputs = processor(text=voco_model.prompt(text, images=0), return_tensors="pt")
            new = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
            new = new[:, inputs["input_ids"].shape[1] :]
        else:
            entry = voco_model.compress(model, images[number], processor=processor)
            new = voco_model.generate(
                model, entry, [text], processor=processor, max_new_tokens=NEW, do_sample=False
            )
        found.append(processor.decode(new[0], skip_special_tokens=True).strip())
    return found


def write_task(folder: Path, documents: list[dict]) -> None:
    """A task of lmms-eval under the name of the paper's GQA, its data beside it."""
    folder.mkdir()
    (folder / "gqa.json").write_text("\n".join(map(json.dumps, documents)))
    (folder / "utils.py").write_text(
        "from PIL import Image\n\n\n"
        "def visual(doc):\n"
        "    return [Image.open(doc['path']).convert('RGB')] if doc['path'] else []\n\n\n"
        "def score(doc, answers):\n"
        "    return {'exact_match': float(answers[0] == doc['answer'])}\n"
    )
    (folder / "gqa.yaml").write_text(
        "task: gqa\n"
        "dataset_path: json\n"
        "dataset_kwargs:\n"
        f"  data_files: {{test: '{folder / 'gqa.json'}'}}\n"
        f"  cache_dir: '{folder / 'cache'}'\n"
        "test_split: test\n"
        "output_type: generate_until\n"
        "doc_to_visual: !function utils.visual\n"
        "doc_to_text: question\n"
        "doc_to_target: answer\n"
        "process_results: !function utils.score\n"
        f"generation_kwargs: {{max_new_tokens: {NEW}, until: ['ASSISTANT:']}}\n"
        "metric_list:\n"
        "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )


def test_a_whole_run(plain, tuned, tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval", reason="needs lmms-eval")
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images = [tiny.picture(number) for number in range(len(QUESTIONS))]
    said = {
        "full": answers_of_the_plain_model(plain, images),
        "voco": answers_of_the_tuned_model(tuned, images),
    }
    # The truth is what the one or the other says, so that both are right now and then.
    truth = [said["full" if number in (0, 1, 3) else "voco"][number] for number in range(5)]
    documents = []
    for number, question in enumerate(QUESTIONS):
        path = ""
        if number != WITHOUT_IMAGE:
            path = str(tmp_path / f"{number}.png")
            images[number].save(path)
        documents.append({"question": question, "answer": truth[number], "path": path})
    write_task(tmp_path / "task", documents)

    output = tmp_path / "out"
    arguments = {
        "output": output,
        "batch_size": 2,
        "device": "cpu",
        "task_manager": TaskManager(
            include_path=str(tmp_path / "task"), include_defaults=False, model_name="voco"
        ),
    }
    text = evaluate(tuned, ["gqa"], methods=["full"], upper=plain, **arguments)
    assert (output / results.TABLE).read_text() == text + "\n" and len(text.splitlines()) == 3
    text = evaluate(tuned, ["gqa"], methods=["voco:2"], **arguments)  # later, into the same folder
    right = {
        method: 20.0 * sum(answer == true for answer, true in zip(answers, truth, strict=True))
        for method, answers in said.items()
    }
    assert right["full"] != right["voco"] and min(right.values()) > 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[0] == ["method", "tokens", "GQA", "retention %", "share of upper %"]
    share = f"{100 * right['voco'] / right['full']:.1f}"
    assert lines[2:] == [
        ["All tokens", "16", f"{right['full']:.1f}", "-", "100.0"],
        ["VoCo-LLaMA", "2", f"{right['voco']:.1f}", "-", share],
    ]

    record = json.loads((output / "voco-2.json").read_text())
    assert record["checkpoint"] == str(tuned) and record["samples"]["gqa"]["effective"] == 5
    assert (
        record["versions"]["lmms-eval"]
        and record["versions"]["torch"]
        and record["device"] == device_name("cpu")
    )
    assert json.loads((output / "full.json").read_text())["checkpoint"] == str(plain)

    with pytest.raises(ValueError, match="expected tasks of lmms-eval, got pope; the paper's are"):
        evaluate(plain, ["pope"], methods=["fastv:4"], **{**arguments, "output": tmp_path / "new"})


def test_data_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval", reason="needs lmms-eval")
    from tenacity import Future, RetryError

    def simple_evaluate(**given):
        raise RetryError(Future.construct(3, PermissionError("401 of the hub"), True))

    monkeypatch.setattr("lmms_eval.evaluator.simple_evaluate", simple_evaluate)
    facts = {"tasks": ["gqa"], "limit": None, "several_images": "refuse"}
    match = "the data sets of gqa, got PermissionError: 401 of the hub; .*hf auth login"
    with pytest.raises(OSError, match=match):
        run._measure(None, None, tmp_path, facts, 1)


@pytest.fixture
def lmms_model():
    pytest.importorskip("lmms_eval", reason="needs lmms-eval")
    from voco_model.evaluate.lmms_model import LMMSModel

    return LMMSModel


def asked(documents: list[dict], *, middle) -> list:
    """Requests as lmms-eval makes them; the second argument is options, or what is to be said."""
    return [
        SimpleNamespace(
            args=(
                document["question"],
                middle(document),
                lambda d: d["images"],
                number,
                "t",
                "test",
            )
        )
        for number, document in enumerate(documents)
    ]


@pytest.mark.parametrize("name", ["voco", "full"])
def test_loglikelihood_is_the_models_own(name, lmms_model, tuned):
    documents = [
        {"question": "What is it?", "images": [tiny.picture(0)], "answer": " A cup"},
        {"question": "Is it\nlarge?", "images": [tiny.picture(1)], "answer": "No"},
        {"question": "What is 1 + 1?", "images": [], "answer": "2"},
    ]
    with baselines.load(tuned, name) as method:
        model = lmms_model(method, batch_size=3)
        model.task_dict = {"t": {"test": documents}}
        # A text is given where the choices are known, a function where the task has one target.
        found = model.loglikelihood(asked(documents, middle=lambda d: d["answer"]))
        assert (
            model.loglikelihood(asked(documents, middle=lambda d: lambda doc: doc["answer"]))
            == found
        )
        for document, (loss, greedy) in zip(documents, found, strict=True):
            images, answer = document["images"], " " + document["answer"].strip()
            text = voco_model.prompt(document["question"], 2, images=len(images)) + answer
            if name == "full":
                text = text.replace("\n<VoCo><VoCo>", "")
            inputs = method.processor(images=images or None, text=text, return_tensors="pt")
            with torch.no_grad():  # one masked pass over prompt and answer
                logits = method.model(**inputs).logits
            length = len(answer)  # its tokens are bytes
            targets = inputs["input_ids"][0, -length:]
            expected = torch.nn.functional.cross_entropy(logits[0, -length - 1 : -1], targets)
            assert loss == pytest.approx(expected.item(), abs=1e-5)
            assert greedy == (logits[0, -length - 1 : -1].argmax(-1) == targets).all().item()


def test_told_tokens_are_judged_and_said(lmms_model):
    from voco_model.evaluate.lmms_model import Told

    told = Told([[1, 0], [2]], eos_token_id=3)
    first = torch.tensor([[0.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    second = torch.tensor([[0.5, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
    assert told(None, first).argmax(-1).tolist() == [1, 2]
    assert told(None, second).argmax(-1).tolist() == [0, 3]  # the shorter one has ended
    own = [first[0].softmax(-1)[1].log(), second[0].softmax(-1)[0].log()]
    assert told.losses() == pytest.approx(
        [-sum(own).item() / 2, -first[1].log_softmax(-1)[2].item()]
    )
    assert told.greedy() == [True, False]


def test_several_rounds_and_bad_arguments_are_refused(lmms_model, tuned):
    with baselines.load(tuned, "voco") as method:
        with pytest.raises(NotImplementedError, match="expected a task that asks once"):
            lmms_model(method).generate_until_multi_round([])
        with pytest.raises(ValueError, match="batch_size >= 1, got 0"):
            lmms_model(method, batch_size=0)
        with pytest.raises(ValueError, match="several_images as one of refuse, middle"):
            lmms_model(method, several_images="first")


def test_lmms_evals_own_command_finds_the_model(lmms_model, tuned):
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from voco_model.evaluate.plugin import manifests

    registry = ModelRegistryV2()
    for manifest in manifests():
        registry.register_manifest(manifest)
    cls = registry.get_model_class("voco")
    assert cls is lmms_model
    arguments = {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    made = cls.create_from_arg_string(f"pretrained={tuned},several_images=middle", arguments)
    assert made.method.name == "voco" and made.method.num_tokens == 2
    assert (made.batch_size, made.several_images) == (2, "middle")
    made = cls.create_from_arg_string(
        f"pretrained={tuned},method=fastv,num_tokens=4,layer=1", arguments
    )
    assert made.method.name == "fastv" and made.method.num_tokens == 4 and made.method.layer == 1
    with pytest.raises(ValueError, match="model_args with a checkpoint, got 'method=voco'"):
        cls.create_from_arg_string("method=voco", arguments)
