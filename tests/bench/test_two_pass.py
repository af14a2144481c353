"""``bench/two_pass.py``: its models, its count of FLOPs, what it measures from the outside, and the
tables and plots that its records become."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DynamicCache,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)
from typer.testing import CliRunner

from bench import report, two_pass
from bench.answering import models, plots, questions, rows
from bench.answering import report as answering_report
from bench.answering.models import DEFAULT, SPECS
from bench.answering.report import FAMILY
from bench.answering.run import Step, plan
from bench.answering.subject import QUICK, Reference, References, Subject
from bench.harness.family import read
from bench.harness.guard import WrongError
from voco_model import flops

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--quick", "--text-tokens", "9", "--new-tokens", "3"]


# ---- the models


@pytest.mark.parametrize("name", ["tiny", "tiny-next"])
def test_a_model_filled_in_place_is_the_one_that_its_config_makes(name):
    spec = SPECS[name]
    processor = models.build_processor(spec)
    config = models.build_config(spec, processor.tokenizer)
    made = models.build_model(config, CPU, torch.float32, std=spec.std)
    usual = type(made)(copy.deepcopy(config)).eval()
    usual.load_state_dict(made.state_dict())
    inputs = processor(
        images=[models.picture(spec, 0)], text=["<image> What?"], return_tensors="pt"
    )
    with torch.no_grad():
        ours, theirs = made(**inputs).logits, usual(**inputs).logits
    assert torch.equal(ours, theirs) and ours.std() > 0.01
    assert [n for n, _ in made.named_buffers()] == [n for n, _ in usual.named_buffers()]
    for (name, ours), (_, theirs) in zip(made.named_buffers(), usual.named_buffers(), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name


def test_weights_are_of_the_dtype_and_frequencies_of_float32():
    spec = SPECS["tiny"]
    config = models.build_config(spec, models.build_processor(spec).tokenizer)
    made = models.build_model(config, CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert made.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    again = models.build_model(config, CPU, torch.bfloat16)
    for ours, theirs in zip(made.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_buffer_that_nobody_fills_is_an_error():
    spec = SPECS["tiny"]
    config = models.build_config(spec, models.build_processor(spec).tokenizer)
    made = models.build_model(config, CPU, torch.float32)
    made.register_buffer("surprise", torch.zeros(1))
    with pytest.raises(ValueError, match="expected buffers named .*, got surprise, too"):
        models.fill_buffers(made, CPU)


@pytest.mark.parametrize(
    "name, parameters, vision_tokens",
    [
        ("llava-1.5-7b", 7.06e9, 576),
        ("llava-1.5-13b", 13.35e9, 576),
        ("llava-1.6-mistral-7b", 7.57e9, 2928),
        ("llava-1.6-34b", 34.75e9, 2928),
    ],
)
def test_shapes_are_the_true_ones(name, parameters, vision_tokens):
    spec = SPECS[name]
    processor = models.build_processor(spec)
    config = models.build_config(spec, processor.tokenizer)
    kind = LlavaNextForConditionalGeneration if spec.tiled else LlavaForConditionalGeneration
    with torch.device("meta"):
        model = kind._from_config(config, dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.005)
    made = processor(images=[models.picture(spec, 0)], text=["<image>"], return_tensors="pt")
    assert int((made["input_ids"] == config.image_token_id).sum()) == vision_tokens
    tiles = made["pixel_values"].shape[-4] if spec.tiled else 1
    assert tiles == models.tiles_of(spec)


def test_what_is_expected_of_a_record_is_what_is_measured_by_default():
    for device, names in DEFAULT.items():
        titles = tuple(SPECS[name].title for name in names)
        assert titles == answering_report.EXPECTED[device]


# ---- FLOPs


@pytest.fixture(scope="module", params=["tiny", "tiny-next"])
def counted(request):
    """A model and ``count(function)`` -> the FLOPs that torch counts in it."""
    spec = SPECS[request.param]
    config = models.build_config(spec, models.build_processor(spec).tokenizer)
    model = models.build_model(config, CPU, torch.float32)
    # torch counts nothing in the CPU's fused attention; eager attention is products.
    model.set_attn_implementation("eager")

    def count(function) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    return model, count


def test_flops_of_the_vision_tower_and_the_projector(counted):
    model, count = counted
    config, side = model.config, model.config.vision_config.image_size
    pixels = torch.randn(3, 3, side, side)
    tower = count(lambda: model.model.vision_tower(pixels, output_hidden_states=True))
    assert tower == flops.vision_tower(config, 3).full
    features = torch.randn(3, 16, config.vision_config.hidden_size)
    projected = count(lambda: model.model.multi_modal_projector(features))
    assert projected == flops.projector(config, 3).full == flops.projector(config, 3).useful
    # The features are those of the last layer but one: a layer less is useful.
    shorter = copy.deepcopy(config)
    shorter.vision_config.num_hidden_layers -= 1
    assert flops.vision_tower(config).useful == flops.vision_tower(shorter).full


def test_flops_of_both_passes_and_of_a_decoding_step(counted):
    model, count = counted
    config = model.config
    cache = DynamicCache(config=config.text_config)

    def read(tokens: int) -> int:
        ids = torch.full((1, tokens), 9)
        return count(lambda: model(input_ids=ids, past_key_values=cache, logits_to_keep=1))

    first = count(
        lambda: model.model.language_model(
            inputs_embeds=torch.randn(1, 21, config.text_config.hidden_size),
            past_key_values=cache,
        )
    )
    assert first == flops.language(config, 21).full
    assert read(7) == flops.first_token(config, 7, past=21).full
    assert read(1) == flops.first_token(config, 1, past=28).full


def test_useful_flops_leave_out_what_is_masked():
    config = models.build_config(SPECS["tiny"], models.build_processor(SPECS["tiny"]).tokenizer)
    new, past = 5, 3
    both = flops.language(config, new, past)
    text = config.text_config
    pairs = sum(past + query + 1 for query in range(new))
    hidden = new * (past + new) - pairs
    head_dim = text.hidden_size // text.num_attention_heads
    masked = 4 * head_dim * text.num_attention_heads * text.num_hidden_layers * hidden
    assert both.full - both.useful == masked
    assert flops.language(config, 1, past).useful == flops.language(config, 1, past).full


# ---- measuring


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``run(*arguments)`` -> the CLI's result and the record that it left, if any."""

    def invoke(*arguments: str):
        out = tmp_path_factory.mktemp("two-pass") / "two-pass.json"
        models = [] if "--model" in arguments else ["--model", "tiny"]
        result = CliRunner().invoke(two_pass.app, [*TINY, *models, *arguments, "--out", str(out)])
        return result, read(out, [FAMILY]) if out.exists() else None, out

    return invoke


@pytest.fixture(scope="module")
def whole_run(run):
    return run("--num-voco", "1", "--num-voco", "2", "--batch", "1", "--batch", "2")


def test_a_run_leaves_a_whole_record(whole_run):
    result, record, out = whole_run
    assert result.exit_code == 0, result.output
    assert record["finished"] and record["settings"]["weights"] == "random"
    assert set(record["ceilings"]) == {"matmul_tflops", "copy_tb_per_s"}
    (case,) = record["cases"]
    assert case["fits"] and case["vision_tokens"] == 16 and case["text_tokens"] == 9
    assert {row["status"] for row in case["rows"]} == {"ok"}
    steps = plan(num_voco=[1, 2], batches=[1, 2], shares=list(two_pass.SHARES), compiled=[False])
    assert len(case["rows"]) == len(steps)
    for picture in FAMILY.pictures:
        assert picture.path(out).stat().st_size > 5_000
    assert "| a tiny LLaVA | 2 | 1 VoCo cached |" in " ".join(result.output.split())


def test_each_mode_has_its_stages_its_bytes_and_its_flops(whole_run):
    _, record, _ = whole_run
    (case,) = record["cases"]
    text, one = case["text_tokens"], 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, D, bytes
    expected = {
        ("voco", "stored"): (["load", "prefill"], one, ["prefill"], 1 + text),
        ("voco", "new"): (
            ["vision", "prefix", "extract", "load", "prefill"],
            one,
            ["vision", "prefix", "prefill"],
            1 + text,
        ),
        ("full cache", "stored"): (["load", "prefill"], 17 * one, ["prefill"], 17 + text),
        ("uncached", "read"): (["vision", "prefill"], 0, ["vision", "prefill"], 17 + text),
    }
    for (name, images), (stages, nbytes, counted, prompt) in expected.items():
        for batch in (1, 2):
            row = questions.answer_row(case, name, batch, int(name == "voco"), images=images)
            if row is None:  # new images are timed one at a time
                assert images == "new" and batch == 2
                continue
            assert list(row["stages"]) == stages and list(row["flops"]) == counted
            assert row["cache_bytes"] == nbytes and row["prompt_tokens"] == prompt
            total = sum(stage["p50"] for stage in row["stages"].values())
            assert row["device"]["p50"] == pytest.approx(total, rel=0.5)
            assert row["wall"]["p50"] > 0 and row["tokens_per_s"] > 0
            assert row["decode"]["repeats"] == 2 * 2  # two steps behind the first token, twice
            answers = 1 if name == "uncached" else 2  # with a new image, and from the store
            agreed = row["agreement"]
            assert agreed["identical"] == agreed["tokens"] == 3 * answers
            assert agreed["first_identical"] == agreed["answers"] == answers
    two = questions.answer_row(case, "voco", 1, 2, images="stored")
    assert two["cache_bytes"] == 2 * one
    assert {"wall", "tokens_per_s"} <= set(questions.answer_row(case, "voco generate", 1, 1))


def test_streams_read_each_new_image_once_and_a_plain_llava_all(whole_run):
    _, record, _ = whole_run
    (case,) = record["cases"]
    for share in two_pass.SHARES:
        numbers = rows.stream(QUICK["cpu"].requests, share)
        for name, count in (("voco", len(set(numbers))), ("uncached", len(numbers))):
            row = questions.stream_row(case, name, share)
            assert row["images_read"] == count and row["answers_per_s"] > 0
    assert questions.stream_row(case, "stock generate", 0.5)["requests"] == len(numbers)


@pytest.mark.parametrize(
    "count, share, new", [(20, 0.0, 20), (20, 0.5, 10), (20, 0.9, 2), (4, 0.9, 1)]
)
def test_the_share_of_a_stream_that_came_before(count, share, new):
    numbers = rows.stream(count, share)
    assert len(numbers) == count and len(set(numbers)) == new
    assert [n for i, n in enumerate(numbers) if n not in numbers[:i]] == list(range(new))
    assert numbers == rows.stream(count, share)


def test_a_tiled_model_too(run):
    result, record, _ = run(
        "--model", "tiny-next", "--num-voco", "2", "--batch", "1", "--no-streams"
    )
    assert result.exit_code == 0, result.output
    (tiled,) = record["cases"]
    assert tiled["tiles"] == 5 and tiled["vision_tokens"] == 88
    assert {row["status"] for row in tiled["rows"]} == {"ok"}
    assert not any(row["kind"] == "stream" for row in tiled["rows"])


def test_when_the_budget_is_spent_the_rest_is_skipped_and_said(run):
    result, record, _ = run("--budget", "0", "--num-voco", "1", "--batch", "1")
    assert result.exit_code == 0 and record["finished"]
    (case,) = record["cases"]
    assert case["rows"] and {row["status"] for row in case["rows"]} == {"skipped"}
    assert {row["reason"] for row in case["rows"]} == {"the budget of 0 s was spent"}
    assert "a tiny LLaVA: the budget of 0 s was spent." in result.output


def test_a_model_that_does_not_fit_says_so_and_the_next_one_runs(run, monkeypatch):
    build = models.build_model

    def too_large(config, *arguments, **options):
        if hasattr(config, "image_grid_pinpoints"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(config, *arguments, **options)

    monkeypatch.setattr(models, "build_model", too_large)
    result, record, _ = run(
        "--model", "tiny-next", "--model", "tiny", "--num-voco", "1", "--batch", "1", "--no-streams"
    )
    assert result.exit_code == 0, result.output
    fits = {case["model"]: case for case in record["cases"]}
    assert not fits["tiny-next"]["fits"] and fits["tiny"]["fits"]
    reasons = {row["reason"] for row in fits["tiny-next"]["rows"]}
    assert reasons == {"does not fit: OutOfMemoryError: CUDA out of memory"}
    assert "a tiny LLaVA-NeXT: does not fit" in result.output


def test_a_wrong_answer_is_red_and_not_timed(run, monkeypatch):
    def wrong(self, num_voco):
        return References([Reference([5, 5, 5], torch.zeros(264))], 0.0)

    monkeypatch.setattr(Subject, "voco_references", wrong)
    result, record, _ = run("--num-voco", "1", "--batch", "1", "--no-streams")
    assert result.exit_code == 1 and "RED tiny voco answer batch 1" in result.output
    rows = record["cases"][0]["rows"]
    red = [row for row in rows if row["status"] == "red"]
    assert {row["name"] for row in red} == {"voco", "voco generate"}
    assert all("expected the tokens of generate, got" in row["reason"] for row in red)
    assert {row["status"] for row in rows if row not in red} == {"ok"}


def test_what_raises_fails_its_row_and_the_others_go_on(run, monkeypatch):
    def broken(subject, batch):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(rows, "generate_row", broken)
    result, record, _ = run("--num-voco", "1", "--batch", "1", "--no-streams")
    assert result.exit_code == 1
    found = {(row["name"], row["images"]): row for row in record["cases"][0]["rows"]}
    assert found["stock generate", "read"]["reason"] == "RuntimeError: no such kernel"
    assert {row["status"] for key, row in found.items() if key[0] != "stock generate"} == {"ok"}


@pytest.fixture(scope="module")
def subject():
    made = Subject(
        SPECS["tiny"],
        CPU,
        torch.bfloat16,
        text_tokens=9,
        new_tokens=2,
        max_batch=2,
        store_bytes=1 << 24,
        effort=QUICK["cpu"],
    )
    made.enable()
    return made


def test_in_16_bits_the_gap_is_held_against_the_noise(subject):
    """The engine's token may be another one, but not one that generate found much worse."""
    references = subject.voco_references(1)
    largest = float(references.answers[0].logits.abs().max())
    assert references.noise >= torch.finfo(torch.bfloat16).eps * largest > 0
    engine = subject.engine("voco", 1, False)
    found = subject.compare(engine, references, "a")
    assert found["answers"] == 2 and 0 <= found["gap"] <= 2 * references.noise
    logits = references.answers[0].logits.clone()
    logits[200] = logits.max() + 3 * references.noise  # as if another token had been the likeliest
    shifted = References([Reference([200, 5], logits)], references.noise)
    with pytest.raises(WrongError, match="within twice the noise"):
        subject.compare(engine, shifted, "b")
    unknown = subject.compare(engine, References(shifted.answers, None, "no second route"), "c")
    assert unknown["first_identical"] == 0 and unknown["noise_reason"] == "no second route"


def test_on_a_gpu_the_host_enqueues_while_the_device_is_busy(subject, monkeypatch):
    """As there, but that the device is this CPU: twice as many runs, half of them covered."""

    class Busy:
        calls = 0

        def repeats_covering(self, milliseconds: float) -> int:
            return 3

        def __call__(self) -> None:
            self.calls += 1

    busy = Busy()
    monkeypatch.setattr(subject, "flush", busy)
    engine = subject.engine("full_cache", 0, False)
    row = rows.answer_row(subject, engine, batch=2, num_voco=0, new_images=False, variant="covered")
    assert busy.calls == 3 * QUICK["cpu"].repeats
    assert row["wall"]["repeats"] == row["device"]["repeats"] == QUICK["cpu"].repeats
    assert row["peak_bytes"] is None and row["setup_s"] > 0


def test_images_that_should_come_from_the_store_do(subject, monkeypatch):
    engine = subject.engine("voco", 1, False)
    monkeypatch.setattr(subject, "keep", lambda engine, variant: 1)
    with pytest.raises(RuntimeError, match="expected 1 images from the store, got 0"):
        rows.answer_row(
            subject, engine, batch=1, num_voco=1, new_images=False, variant="never kept"
        )


def test_pictures_and_questions_change_the_answers(subject):
    references = [subject._generated(subject.plain_inputs([n]))[0] for n in range(2)]
    assert not torch.equal(references[0].logits, references[1].logits)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "llava-9"], "expected models among"),
        (["--num-voco", "0"], "expected --num-voco and --batch >= 1, got 0"),
        (["--share", "1"], "expected --share from 0 to below 1"),
        (["--device", "cuda"], "expected a CUDA device"),
        (["--new-tokens", "1"], "--new-tokens"),
    ],
)
def test_wrong_use_says_what_was_expected(run, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result, record, _ = run(*arguments)
    assert result.exit_code == 2 and record is None
    assert message in " ".join(result.output.replace("│", " ").split())


def test_on_cuda_compiled_layers_come_first_and_shapes_of_work_are_few():
    steps = plan(num_voco=[1, 8], batches=[1, 8], shares=[0.0], compiled=[True, False])
    kinds = [(step.name, step.compiled, step.kind) for step in steps if step.num_voco < 8]
    assert kinds.index(("voco", True, "answer")) < kinds.index(("voco", False, "answer"))
    engines = [step.engine for step in steps if step.engine is not None]
    changes = [one for one, before in zip(engines, [None, *engines], strict=False) if one != before]
    # Each engine is made once; those of the compiled streams, which come last, once more.
    assert len(changes) == len(set(changes)) + 3
    assert len(steps) == len(set(steps))


# ---- records, tables and plots


def summary(p50: float) -> dict:
    return {"p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50, "repeats": 9}


def made_up(device_type: str) -> dict:
    """A record in which everything of a VoCo answer takes a fifth of what a plain one takes."""
    compiled = [True, False] if device_type == "cuda" else [False]
    cases = []
    for title in answering_report.EXPECTED[device_type]:
        rows = []
        for step in plan(num_voco=[1, 8], batches=[1, 8], shares=[0.0, 0.9], compiled=compiled):
            factor = {"voco": 1.0, "full cache": 2.0}.get(step.name, 5.0)
            row = step.head() | {"status": "ok"}
            row |= {"wall": summary(3 * factor), "peak_bytes": 15 * 10**9}
            if step.kind == "stream":
                row |= {"answers_per_s": 40 / factor, "requests": 32, "images_read": 8}
            else:
                stages = {"prefill": summary(0.9 * factor), "load": summary(0.1 * factor)}
                if step.images == "new":
                    stages |= {"vision": summary(2.0), "prefix": summary(3.0)}
                if step.images == "read":
                    stages["vision"] = stages.pop("load")
                nbytes = {"voco": step.num_voco, "full cache": 576}.get(step.name, 0) * 524288
                row |= {
                    "flops": {k: {"useful": 10**12, "full": 2 * 10**12} for k in stages},
                    "cache_bytes": nbytes,
                    "tokens_per_s": 123.4,
                }
                if "generate" not in step.name:
                    row |= {
                        "stages": stages,
                        "device": summary(factor),
                        "decode": summary(4.0),
                        "kv_bytes": 10**9,
                        "agreement": {
                            "tokens": 96,
                            "identical": 90,
                            "first_identical": 7,
                            "answers": 8,
                            "gap": 0.01,
                            "noise": 0.02,
                            "noise_reason": "",
                        },
                    }
            rows.append(row)
        cases.append(
            {
                "model": title.lower(),
                "title": title,
                "fits": True,
                "rows": rows,
                "vision_tokens": 576,
                "language_bytes": 10**9,
            }
        )
    return {
        "schema": 1,
        "bench": "two_pass",
        "finished": True,
        "environment": {
            "date": "2030-01-02 03:04 UTC",
            "commit": "0123456789abcdef",
            "sources_sha256": "f" * 64,
            "device": {"type": device_type, "name": f"Test {device_type}"},
            "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
        },
        "settings": {
            "dtype": "bf16",
            "num_voco": [1, 8],
            "batches": [1, 8],
            "shares": [0.0, 0.9],
            "text_tokens": 114,
            "new_tokens": 12,
            "quick": False,
        },
        "ceilings": {"matmul_tflops": 500.0, "copy_tb_per_s": 2.0},
        "cases": cases,
    }


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a page for these tables, and no results."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    names = ("two-pass-cpu", "two-pass", "two-pass-plot")
    text = "".join(f"<!-- bench:{name}:start -->\n<!-- bench:{name}:end -->\n" for name in names)
    (tmp_path / "docs" / "two_pass.md").write_text(text)
    (tmp_path / "README.md").write_text("# Title\n")
    return tmp_path


def report_on(checkout, *arguments: str):
    result = CliRunner().invoke(report.app, [*arguments, "--root", str(checkout)])
    return result, (checkout / "docs" / "two_pass.md").read_text()


def test_without_results_every_figure_is_not_measured(checkout):
    result, text = report_on(checkout)
    assert result.exit_code == 0 and text.count("Not measured yet.") == 2
    assert "≤ 1.25 |" + " not measured |" * 4 in text
    assert "| LLaVA-1.5-7B | 1 | VoCo cached |" + " not measured |" * 7 in text
    assert "| the paper, A100 | 1 | VoCo cached |" in text and "0.525 MB" in text
    assert "Answers per second by the share of images seen before: not measured." in text
    assert report_on(checkout, "--check")[0].exit_code == 0


def test_results_become_tables_and_plots(checkout):
    folder = checkout / "bench" / "results"
    for device_type in ("cpu", "cuda"):
        FAMILY.write(made_up(device_type), folder / f"two-pass-{device_type}.json")
    result, text = report_on(checkout)
    assert "wrote: bench/results/two-pass-cpu-streams.png" in result.stdout
    for name in ("two-pass-cpu", "two-pass-cuda-streams"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
        assert f"](../bench/results/{name}.png)" in text
    # 1 GB at 2 TB/s: 0.5 ms; 1 TFLOP at 500 TFLOP/s: 2 ms.
    on_gpu = text.split("<!-- bench:two-pass:start -->")[1]
    assert "× the time to read the weights | ≤ 1.25 | 2.00 |" in on_gpu
    assert "× its GEMM floor | ≤ 1.3 | 1.50 |" in on_gpu
    assert "time lower by | ≥ 75% | 80.0% |" in on_gpu and "| 576 | 576 |" in on_gpu
    assert (
        "| LLaVA-1.5-7B | pass 2, load and prefill | 2.00 ms | 500 µs | 1.00 ms | 0.50 |" in on_gpu
    )
    assert "1.00 ms (900 µs to 1.10 ms, compiled) | 80.0% | 524 kB | 4 TFLOP (2 TFLOP) |" in on_gpu
    assert "| LLaVA-1.5-7B | 8 | stock `generate` | 15.0 ms |  |  | 123 |  | 15 GB |" in on_gpu
    assert "| LLaVA-1.5-7B | engine, VoCo cached | 40 | 40 |" in on_gpu
    assert "| LLaVA-1.5-7B | 1 VoCo cached, compiled | 7 of 8 | 90 of 96 | 0.01 | 0.02 |" in on_gpu
    assert "Test cuda, bf16, random weights; 114 text tokens" in on_gpu
    assert "not measured" not in on_gpu.split("<!-- bench:two-pass:end -->")[0]
    assert report_on(checkout, "--check")[0].exit_code == 0

    record = made_up("cpu")
    record["cases"][0]["rows"][1]["wall"]["p50"] *= 2
    FAMILY.write(record, folder / "two-pass-cpu.json")
    result, _ = report_on(checkout, "--check")
    assert result.exit_code == 1 and "two-pass-cpu.png" in result.stdout


def test_a_share_saved_is_of_two_rows_of_one_kind():
    """An answer through the compiler is not held against one that was not."""
    case = made_up("cuda")["cases"][0]
    for row in case["rows"]:
        if row["compiled"] and row["name"] == "uncached":
            row["status"], row["reason"] = "skipped", "no time"
        if row["compiled"] and row["name"] == "voco" and row["kind"] == "answer":
            row["device"]["p50"] = 0.001
    assert questions.saved(case, 1, 1) == pytest.approx(0.8)


def test_what_was_not_timed_is_not_measured(checkout):
    record = made_up("cpu")
    for row in record["cases"][0]["rows"]:
        if row["name"] == "uncached":
            del row["wall"]
            row |= {"status": "failed", "reason": "broken"}
    record["cases"].append(
        {
            "model": "large",
            "title": "a large one",
            "fits": False,
            "rows": [
                Step("voco", "answer", "stored", 1, 1).head()
                | {"status": "unsupported", "reason": "does not fit"}
            ],
        }
    )
    FAMILY.write(record, checkout / "bench" / "results" / "two-pass.json")
    _, text = report_on(checkout)
    assert "time lower by | ≥ 75% | not measured | not measured |" in text
    assert "| 1 | nothing cached |" + " not measured |" * 7 in text
    assert "a large one: does not fit." in text


def test_show_prints_a_record(whole_run):
    _, _, out = whole_run
    result = CliRunner().invoke(report.app, ["--show", str(out)])
    assert result.exit_code == 0 and "| a tiny LLaVA | 1 | nothing cached |" in result.stdout
    assert "bench/results" not in result.stdout


def test_quick_records_are_refused(whole_run, tmp_path):
    shutil.copy(whole_run[2], tmp_path)
    with pytest.raises(ValueError, match="two-pass.json of a --quick one"):
        report.load_results(tmp_path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda r: r.update(schema=0), "expected schema 1"),
        (lambda r: r.pop("ceilings"), "'ceilings' in a record"),
        (lambda r: r["cases"][0].pop("fits"), "'fits' in a case"),
        (lambda r: r["cases"][0]["rows"][0].pop("wall"), "a time exactly where"),
        (lambda r: r["cases"][0]["rows"][0].update(status="red"), "a time exactly where"),
        (lambda r: r["cases"][0]["rows"][0].update(kind="mine"), "a kind of"),
    ],
)
def test_broken_records_are_refused(tmp_path, spoil, message):
    record = made_up("cpu")
    spoil(record)
    with pytest.raises(ValueError, match=message):
        FAMILY.write(record, tmp_path / "two-pass.json")
    assert not list(tmp_path.iterdir())


def test_plots_need_figures(tmp_path):
    empty = {**made_up("cpu"), "cases": []}
    assert FAMILY.draw(empty, tmp_path / "two-pass.json") == []
    for plot in (plots.plot_stages, plots.plot_streams):
        with pytest.raises(ValueError, match="expected a record with timed"):
            plot(empty, tmp_path / "two-pass.png")
