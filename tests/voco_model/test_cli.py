"""The command ``voco``."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import voco_model
from tests.voco_kernels.kv.test_entry import make_entry
from tests.voco_model import instruction
from voco_model.cli import PromptStyle, app
from voco_model.cli_common import EXTRAS, check_checkpoint, check_device, reported_errors
from voco_model.kv_store import KVStore
from voco_model.kv_store.open import open_store
from voco_model.vlm.prompt import STYLES

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "": ["--version", "--help"],
    "demo": ["--ask", "--pictures", "--image", "--question", "--num-voco", "--new-tokens", "--out"],
    "train": ["--output", "--model", "--dry-run"],
    "eval": ["--model", "--tasks", "--output", "--method", "--checkpoint", "--device"],
    "explain": ["--model", "--question", "--output", "--new-tokens", "--device"],
    "miniature": ["--output", "--quick", "--seeds", "--distinct", "--workers", "--device"],
    "store": ["ls", "stats", "verify", "rm"],
    "store ls": ["redis://"],
    "store stats": ["redis://"],
    "store verify": ["redis://"],
    "store rm": ["redis://", "--all"],
    "convert": ["from-authors", "to-authors"],
    "convert from-authors": ["--num-voco", "--vision-tower", "vicuna|authors|mistral|chatml"],
    "convert to-authors": ["--vision-tower"],
}
HEAVY = ("torch", "transformers", "numpy", "PIL", "pandas", "sklearn", "matplotlib")


def invoke(*arguments) -> tuple[int, str]:
    """Exit status and output, on one line."""
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_options(command):
    code, text = invoke(*command.split(), "--help")
    assert code == 0 and "<bool>" not in text
    assert [name for name in COMMANDS[command] if name not in text] == []


def python(code: str, *arguments) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_help_and_argument_errors_import_nothing_heavy(tmp_path):
    lines = [f"{command} --help" for command in COMMANDS]
    lines += [
        "--version",
        "trian",
        "train missing.yaml",
        "explain missing.jpg --model x",
        "explain x.jpg --model x --output x.gif",
        "explain x.jpg --model x --device gpu",
        "miniature --device cudaa",
        "eval --model no/such/folder --tasks x --output y",
        "demo --image missing.jpg",
        "store ls no/store",
        "convert to-authors missing x",
    ]
    code = """
import sys
from typer.testing import CliRunner
from voco_model.cli import app
for line in sys.argv[2:]:
    expected = 0 if line.endswith(("--help", "--version")) else 2
    result = CliRunner().invoke(app, line.split())
    heavy = set(sys.argv[1].split()) & set(sys.modules)
    if result.exit_code != expected or heavy:
        print(line, result.exit_code, result.output, heavy)
"""
    assert python(code, " ".join(HEAVY), *lines) == ""


def test_version():
    code, text = invoke("--version")
    assert code == 0 and text.startswith(f"voco-kernels {voco_model.__version__}, torch 2.")


def test_the_package_is_imported_lazily():
    code = f"import sys, voco_model; print(set({HEAVY}) & set(sys.modules))"
    assert python(code) == "set()\n"
    code = "import sys, voco_model; voco_model.prompt('x', 1); voco_model.kv_store.KVStore; print('ok')"
    assert python(code) == "ok\n"


@pytest.mark.parametrize("package", [voco_model, voco_model.explain])
def test_type_checkers_see_what_the_interpreter_sees(package):
    tree = ast.parse(Path(package.__file__).read_text())
    (branch,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {node.module: {a.name for a in node.names} for node in branch.body}
    (call,) = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    lazy = {module: set(names) for module, names in ast.literal_eval(call.args[1]).items()}
    assert shown == lazy
    assert set().union(*lazy.values()) == set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        package.compres  # noqa: B018


def test_functions_win_over_modules_of_their_names():
    assert callable(voco_model.load) and callable(voco_model.prompt)
    assert callable(voco_model.fingerprint) and callable(voco_model.image_key)


def test_prompt_styles_and_extras_are_those_of_the_package():
    assert [style.value for style in PromptStyle] == list(STYLES)
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python 3.11 and newer")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == voco_model.__version__
    names = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
    for package, extra in EXTRAS.items():
        wanted = names.get(package, package.replace("_", "-"))
        required = {
            re.match(r"[\w.-]+", text)[0] for text in project["optional-dependencies"][extra]
        }
        assert wanted in required, (package, extra)


@pytest.mark.parametrize(
    "line, message",
    [
        ("trian", "No such command 'trian'. Did you mean 'train'?"),
        ("store lst x", "No such command 'lst'"),
        ("demo --picture 3", "No such option: --picture"),
        ("train run.yaml --dryrun", "No such option: --dryrun"),
        ("eval --modle x", "No such option: --modle"),
        ("explain photo.jpg --modle x", "No such option: --modle"),
        ("miniature --seed 3", "No such option: --seed"),
        ("store ls x --al", "No such option: --al"),
        ("convert to-authors x y --tower z", "No such option: --tower"),
        ("train", "Missing argument"),
        ("explain photo.jpg", "Missing option '--model'"),
        # a file that is missing, a folder, or of another kind
        ("train missing.yaml", "expected a YAML file, got missing.yaml, which does not exist"),
        ("train .", "expected a YAML file, got the folder ."),
        ("train photo.jpg", "expected a YAML file, got photo.jpg, which is not text"),
        ("explain missing.jpg --model voco", "a picture, got missing.jpg, which does not exist"),
        ("explain . --model voco", "expected a picture, got the folder ."),
        ("explain run.yaml --model voco", "in no format that Pillow can read"),
        (
            "explain photo.jpg --model voco --output out.gif",
            "expected a file ending in .png or .html, got",
        ),
        ("explain photo.jpg --model voco --output no/x.png", "in an existing folder, got"),
        ("demo --image missing.jpg", "for --image, got missing.jpg, which does not exist"),
        ("demo --image run.yaml", "in no format that Pillow can read"),
        ("eval --model voco --tasks gqa --output o --option x", "expected METHOD.NAME=VALUE, got"),
        ("miniature --output run.yaml", "expected a folder, got the file"),
        ("convert from-authors run.yaml to", "got run.yaml, which is a file"),
        # the folder of a model
        ("train run.yaml --model no/such/model", "no/such/model; there is no such folder"),
        ("train missing-model.yaml", "got no/such/model; there is no such folder"),
        ("explain photo.jpg --model no/such/model", "no/such/model; there is no such folder"),
        ("explain photo.jpg --model run.yaml", "got the file run.yaml"),
        ("explain photo.jpg --model .", "which has no config.json; did you mean voco?"),
        ("eval --model no/such/model --tasks gqa --output o", "there is no such folder"),
        ("eval --model voco --upper ./no --tasks gqa --output o", "./no; there is no such folder"),
        ("convert from-authors missing to", "got missing, which does not exist"),
        ("convert to-authors missing to", "got missing, which does not exist"),
        ("convert to-authors . to", "without config.json"),
        # values
        ("explain photo.jpg --model voco --device gpu", "expected cpu, cuda or cuda:N, got 'gpu'"),
        ("eval --model voco --tasks x --output o --device mps", "got 'mps'"),
        ("miniature --device meta", "expected cpu, cuda or cuda:N, got 'meta'"),
        ("explain photo.jpg --model voco --device cuda:99", "got --device cuda:99, and PyTorch"),
        ("explain photo.jpg --model voco --new-tokens 0", "'--new-tokens'"),
        ("convert from-authors voco to --prompt chat", "vicuna"),
        ("convert from-authors voco to --num-voco 0", "'--num-voco'"),
    ],
)
def test_what_is_wrong_is_named(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model: x")
    Path("missing-model.yaml").write_text(
        json.dumps(instruction.config("no/such/model", Path("d/x.json"), "o"))
    )
    Path("photo.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(32))
    Path("voco").mkdir()
    Path("voco/config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    code, text = invoke(*line.split())
    assert code == 2 and message in text, text
    assert "Traceback" not in text and sorted(tmp_path.rglob("*")) == before


def test_names_on_the_hub_are_left_to_the_hub():
    for name in ("gpt2", "llava-hf/llava-1.5-7b-hf"):
        check_checkpoint(name)


def test_a_missing_package_is_named_with_its_extra(tmp_path):
    """In a process of its own, in which none of these has been imported."""
    (tmp_path / "run.yaml").write_text("model: x")
    (tmp_path / "photo.jpg").touch()
    (tmp_path / "voco").mkdir()
    (tmp_path / "voco/config.json").write_text("{}")
    checkpoint = ROOT / "voco_model" / "miniature" / "checkpoints" / "full"
    cases = {
        "train run.yaml": ("yaml", "train"),
        "explain photo.jpg --model voco": ("matplotlib", "bench"),
        "miniature": ("sklearn.datasets", "miniature"),
        "demo": ("matplotlib", "miniature"),
        f"eval --model {checkpoint} --tasks gqa --output o --method full": ("lmms_eval", "eval"),
        "store ls redis://localhost": ("redis", "redis"),
        "store ls s3://bucket": ("fsspec", "objects"),
    }
    code = """
import os, sys
from typer.testing import CliRunner
from voco_model.cli import app
os.chdir(sys.argv[1])
for line, package in zip(sys.argv[2::2], sys.argv[3::2]):
    sys.modules[package] = None
    result = CliRunner().invoke(app, line.split())
    del sys.modules[package]
    assert result.exit_code == 2, (line, result.output, result.exception)
    print(result.output.splitlines()[-1])
"""
    asked = [word for line, (package, _) in cases.items() for word in (line, package)]
    found = python(code, tmp_path, *asked).splitlines()
    extras = [re.search(r"pip install .*\[(\w+)\]", line)[1] for line in found]
    assert extras == [extra for _, extra in cases.values()]


def test_errors_are_reported_in_the_words_of_the_command(capsys):
    with pytest.raises(typer.Exit), reported_errors(options=("num_voco", "vision_tower")):
        raise ValueError(
            "expected num_voco, got a/num_voco/b; pass vision_tower='x', not t.vision_tower"
        )
    assert capsys.readouterr().err == (
        "expected --num-voco, got a/num_voco/b; pass --vision-tower='x', not t.vision_tower\n"
    )
    with pytest.raises(RuntimeError, match="a bug"), reported_errors():
        raise RuntimeError("a bug")
    with pytest.raises(typer.Exit), reported_errors(RuntimeError):
        raise RuntimeError("out of memory")


def test_a_traceback_can_be_had(monkeypatch):
    monkeypatch.setenv("VOCO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="x"), reported_errors():
        raise ValueError("x")


def test_devices_that_the_machine_lacks(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [check_device(name) for name in (None, "cpu", "cuda", "cuda:1")] == [
        None,
        "cpu",
        "cuda",
        "cuda:1",
    ]
    with pytest.raises(ValueError, match="got --device cuda:2, and PyTorch sees 2 GPUs"):
        check_device("cuda:2")


def key(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def store(tmp_path):
    with KVStore(tmp_path / "store", max_bytes=1 << 24, fsync=False) as store:
        for number in range(3):
            store.put(make_entry(number + 1), key(number))
        store.put(make_entry(1).quantize(), key(3))
        store.get(key(0))
        yield store


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["store", *map(str, arguments)])
    return result.exit_code, result.output


def spoil(store: KVStore, number: int) -> None:
    path = store.path / "v1" / key(number)[:2] / f"{key(number)}.safetensors"
    data = bytearray(path.read_bytes())
    data[4096 + 5] ^= 1
    path.write_bytes(data)


def test_ls_shows_what_was_used_last_first(store):
    code, text = run("ls", store.path)
    lines = text.splitlines()
    assert code == 0 and lines[0].split()[:4] == ["key", "bytes", "tokens", "dtype"]
    cells = [line.split() for line in lines[1:]]
    assert [row[0] for row in cells] == [key(0), key(3), key(2), key(1)]
    assert [row[2:4] for row in cells] == [
        ["1", "float32"],
        ["1", "int8"],
        ["3", "float32"],
        ["2", "float32"],
    ]
    assert sum(int(row[1]) for row in cells) == store.stats().bytes


def test_stats(store):
    code, text = run("stats", store.path)
    assert code == 0
    assert text.split() == f"entries 4 bytes {store.stats().bytes} set aside 0".split()


def test_verify_sets_aside_what_is_bad_and_says_so(store):
    assert run("verify", store.path) == (
        0,
        f"4 entries of {store.stats().bytes} bytes are intact\n",
    )
    spoil(store, 1)
    code, text = run("verify", store.path)
    assert code == 1
    assert text.startswith("3 entries of ") and f"set aside, corrupt: {key(1)}" in text
    assert run("verify", store.path)[0] == 0
    assert "set aside    1" in run("stats", store.path)[1]


def test_rm(store):
    assert run("rm", store.path, key(0), key(9)) == (
        1,
        f"removed: {key(0)}\nnot there: {key(9)}\n",
    )
    code, text = run("rm", store.path, "../x")
    assert code == 2 and "expected a key of 64 lower-case hex digits, got '../x'" in text
    for arguments in ((), (key(1), "--all")):
        code, text = run("rm", store.path, *arguments)
        assert code == 2 and "expected keys, or --all" in text
    assert run("rm", store.path, "--all") == (0, "removed 3 entries\n")
    assert run("stats", store.path)[1].split()[:2] == ["entries", "0"]


def test_rm_of_a_bad_key_removes_nothing(store):
    code, text = run("rm", store.path, key(0), "zz")
    assert code == 2 and "got 'zz'" in text
    assert key(0) in store
    assert run("rm", store.path, key(0), key(0)) == (0, f"removed: {key(0)}\n")


def test_ls_prints_any_fingerprint(tmp_path):
    with KVStore(tmp_path, max_bytes=1 << 20, fsync=False) as store:
        store.put(replace(make_entry(1), fingerprint="[/bold]x"), key(0))
        code, text = run("ls", store.path)
    assert code == 0 and "[/bold]x" in text


def test_a_folder_that_is_no_store_is_left_alone(tmp_path):
    code, text = run("ls", tmp_path)
    assert code == 2 and f"expected a store, got {tmp_path}, without v1 in it" in text
    for form in ("file:///", "redis://", "unix://", "s3://"):
        assert form in text
    assert not list(tmp_path.iterdir())


def test_from_a_shell(store):
    command = [sys.executable, "-m", "voco_model", "store", "ls", store.path]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert key(2) in listed


def test_stores_by_url(store, tmp_path):
    url = f"file://{store.path}"
    assert run("ls", url) == run("ls", store.path)
    assert run("stats", f"{url}?max_bytes=1GB") == run("stats", store.path)
    objects = f"local://{tmp_path}/objects"
    with open_store(objects) as other:
        other.put(make_entry(1), key(0))
        other.put(make_entry(1), key(7))
    code, text = run("ls", objects)
    assert code == 0 and text.split() == ["key", key(0), key(7)]
    assert run("stats", objects)[1].split() == "entries 2 bytes not known".split()
    code, text = run("verify", objects)
    assert code == 0 and text.startswith("2 entries of ")

    tiers = f"memory://?max_bytes=1MB | {url} | {objects}"
    code, text = run("stats", tiers)
    assert code == 0 and "memory:// is left out" in text
    assert [line for line in text.splitlines() if "://" in line[:8]][-2:] == [
        f"{url}:",
        f"{objects}:",
    ]
    removed = run("rm", f"{url}|{objects}", key(0), key(7), key(9))
    assert removed == (
        1,
        f"removed: {key(0)}\nremoved: {key(7)}\nnot there: {key(9)}\n",
    )
    assert key(0) not in store and run("stats", objects)[1].split()[:2] == ["entries", "0"]
    assert run("rm", f"{url}|{objects}", "--all")[0] == 0 and len(store) == 0


@pytest.mark.parametrize(
    "url, message",
    [
        ("memory://", "expected a store that outlives its process, got memory://"),
        ("redis:/localhost", "expected a store, got redis:/localhost, which is no folder; give"),
        ("file:///no/such/store?max_bytes=1GB", "which is no folder"),
        ("memory://?max_bytes=1GB|no/such/store", "got no/such/store, which is no folder"),
        (
            "nothing://bucket",
            "expected a path, file, memory, redis, rediss, unix or a scheme of fsspec",
        ),
        ("redis://127.0.0.1:1", "127.0.0.1"),
    ],
)
def test_stores_that_cannot_be_opened(url, message):
    code, text = run("ls", url)
    assert code == 2 and message in text and "Traceback" not in text


def test_a_password_is_not_shown(tmp_path):
    code, text = run("stats", "redis://user:secret@127.0.0.1:1 | redis://user:secret@127.0.0.1:1")
    assert code == 2 and "secret" not in text
