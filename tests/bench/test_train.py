"""``bench/train.py``: how samples are drawn and packed, that all methods train alike, its count of
FLOPs, its record, and that what is wrong has no figure."""

from __future__ import annotations

import copy
import math
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from bench import report, train
from bench.harness.family import read
from bench.training import data as train_data
from bench.training import methods as train_methods
from bench.training import report as train_report
from bench.training import steps as train_steps
from bench.training.data import IGNORED, Distribution, Sample
from bench.training.methods import SMALL, QFormerLlava
from bench.training.report import FAMILY
from bench.training.run import Q_FORMER
from voco_model import flops

CPU = torch.device("cpu")
RUN = ["--small", "--device", "cpu", "--steps", "2"]


def build(checkpointing: bool = False):
    return train_methods.build(SMALL, None, CPU, torch.float32, checkpointing=checkpointing)


def small_batches(config, samples, num_voco: int = 2):
    return train_steps.batches(config, samples, num_voco, CPU, torch.float32)


SAMPLES = [
    Sample(torch.arange(5, 16), True),
    Sample(torch.arange(20, 28), False),
    Sample(torch.arange(30, 51), True),
]


# ---- samples


def test_texts_have_the_stated_mean_and_median():
    distribution = Distribution()
    assert distribution.median * math.exp(distribution.sigma**2 / 2) == pytest.approx(290)
    samples = train_data.draw(
        distribution, 4000, prefix=577, first_special_id=32000, seed=3, candidates=1
    )
    lengths = torch.tensor([len(sample.text) for sample in samples], dtype=torch.float64)
    assert lengths.median() == pytest.approx(200, rel=0.05)
    assert lengths.mean() == pytest.approx(290, rel=0.05)
    assert 8 <= lengths.min() and lengths.max() <= 2048
    assert sum(not sample.image for sample in samples) / 4000 == pytest.approx(0.06, abs=0.015)
    assert all(3 <= sample.text.min() and sample.text.max() < 32000 for sample in samples[:50])


def test_the_batch_is_one_of_median_padding_and_the_same_each_time():
    shares = []
    for seed in range(60):
        row = train_data.draw(
            Distribution(), 4, prefix=577, first_special_id=99, seed=seed, candidates=1
        )
        shares.append(train_data.padding_share([len(s.text) + 577 * s.image for s in row]))
    one, again = (train_data.draw(Distribution(), 4, prefix=577, first_special_id=99) for _ in "ab")
    assert all(map(torch.equal, (s.text for s in one), (s.text for s in again)))
    share = train_data.padding_share([len(s.text) + 577 * s.image for s in one])
    assert sum(other < share for other in shares) / 60 == pytest.approx(0.5, abs=0.2)


def test_padded_and_packed_rows_hold_the_same_tokens_and_labels():
    config = train_methods.config_of(SMALL)
    made = small_batches(config, SAMPLES)
    padded, packed, query = made["padded"], made["packed"], made["query"]
    assert padded.input_ids.shape == (3, 16 + 2 + 21) and packed.input_ids.shape == (1, 76)
    assert padded.tokens == packed.tokens == 76 and packed.padding == 0
    assert padded.padding == pytest.approx(1 - 76 / (3 * 39))
    assert torch.equal(padded.input_ids[padded.real], packed.input_ids[0])
    assert torch.equal(padded.labels[padded.real], packed.labels[0])
    assert padded.labelled == packed.labelled == 5 + 4 + 10 == query.labelled
    starts = (packed.position_ids[0] == 0).nonzero().flatten().tolist()
    assert starts == [0, 29, 37] and padded.position_ids is None
    assert padded.pixel_values is packed.pixel_values and padded.images == 2
    assert query.tokens == 2 * 2 + 11 + 8 + 21
    assert padded.labels[0, : 18 + 6].eq(IGNORED).all()
    assert padded.labels[0, 24:29].tolist() == [11, 12, 13, 14, 15]
    assert padded.labels[~padded.real].eq(IGNORED).all()


# ---- methods


def test_losses_and_gradients_of_all_methods_agree():
    found = train_steps.small_check(["dense", "padded", "packed"], CPU, 2)
    assert set(found) == {"dense", "padded", "packed"}
    for name, entry in found.items():
        assert entry["reason"] == "", name
        assert entry["loss_error"] <= entry["loss_limit"] < 1e-4
        assert entry["gradient_error"] <= entry["gradient_limit"] < 1e-4
        assert entry["gradient_norm"] > 0.01


def test_flex_has_the_same_mask_forward():
    """It has no backward pass on a CPU."""
    model = build()
    made = small_batches(model.config, SAMPLES)
    methods = train_methods.masked_methods(2)
    losses = {}
    with torch.no_grad():
        for name in ("dense", "flex"):
            with methods[name].attached(model):
                losses[name] = methods[name].forward(model, made["padded"]).loss.item()
    assert losses["flex"] == pytest.approx(losses["dense"], abs=2e-5)
    assert "no backward pass" in methods["flex"].missing(CPU)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_padding_sees_itself_in_the_dense_mask():
    model = build()
    batch = small_batches(model.config, SAMPLES)["padded"]
    layout = train_methods.layout_of(model, batch)
    mask = train_methods.dense_mask(layout, torch.float32)
    assert torch.equal(mask[:, 0] == 0, layout.materialize() | torch.diag_embed(~batch.real))
    assert mask.stride(-2) % 8 == 0 and set(mask.unique().tolist()) == {0.0, -math.inf}


def test_a_step_trains_all_but_the_vision_tower():
    model = build(checkpointing=True)
    batch = small_batches(model.config, SAMPLES, 1)["packed"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = train_methods.masked_methods(1)["packed"]
    with method.attached(model):
        milliseconds, _ = train_steps.Trainer(model, CPU).step(lambda: method.forward(model, batch))
    assert milliseconds > 0
    for name, parameter in model.named_parameters():
        frozen = "vision_tower" in name
        assert torch.equal(parameter, before[name]) == frozen, name
        assert parameter.grad is None and parameter.requires_grad != frozen


def test_weights_in_bf16_are_updated_through_their_fp32_copies():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8).bfloat16()
    exact = copy.deepcopy(model).float()
    ours = train_methods.Optimizer(model, 1e-5)
    theirs = torch.optim.AdamW(exact.parameters(), lr=1e-5)
    for _ in range(40):  # each by far less than bf16 resolves
        for parameter, twin in zip(model.parameters(), exact.parameters(), strict=True):
            parameter.grad = torch.ones_like(parameter)
            twin.grad = torch.ones_like(twin)
        ours.step()
        theirs.step()
    for parameter, twin in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(parameter, twin.bfloat16()) and parameter.grad is None


def test_the_q_former_reads_its_image_and_all_of_it_is_trained():
    model = build()
    batch = small_batches(model.config, SAMPLES, 1)["query"]
    q_former = QFormerLlava(model, 1, small=True).eval()
    loss = q_former(batch).loss
    loss.backward()
    for name, parameter in q_former.named_parameters():
        assert (parameter.grad is not None) == ("vision_tower" not in name), name
    assert loss.isfinite() and q_former.query.grad.abs().sum() > 0


def test_layers_that_fit_grow_with_the_memory_and_with_checkpointing():
    def layers(gigabytes: int, checkpointing: bool = False) -> int:
        return train_methods.layers_that_fit(
            gigabytes * 10**9, 16 * 1400, checkpointing=checkpointing
        )

    assert 1 == layers(10) < layers(80) < layers(140) < layers(10**4) == 32
    assert layers(140) < layers(140, checkpointing=True) <= 32


# ---- FLOPs


def counted(model, forward) -> int:
    """What torch counts in a forward and backward pass; eager attention is products."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        forward().loss.backward()
    return counter.get_total_flops()


def test_flops_of_a_step():
    model = build()
    config = model.config
    batch = small_batches(config, [SAMPLES[0]])["padded"]
    count = counted(
        model,
        lambda: model(
            input_ids=batch.input_ids, pixel_values=batch.pixel_values, labels=batch.labels
        ),
    )
    tokens = batch.tokens
    ours = flops.training(config, tokens=tokens, pairs=0, labels=tokens, images=1)
    tower = flops.vision_tower(config)
    # Without fused attention its backward pass is twice the forward one: nothing is computed again.
    attention = 2 * 3 * flops.attention(2, 64, 0, tokens**2).full
    assert count == ours - tower.useful + tower.full + attention
    with_pairs = flops.training(config, tokens=tokens, pairs=100, labels=tokens, images=1)
    assert with_pairs - ours == 2 * 7 * flops.attention(2, 64, 100, 100).useful // 2


def test_flops_of_a_q_former():
    model = build()
    q_former = QFormerLlava(model, 1, small=True).eval()
    q_former.q_former.set_attn_implementation("eager")
    batch = small_batches(model.config, [SAMPLES[0]], 1)["query"]
    count = counted(model, lambda: q_former(batch))
    tower, tokens = flops.vision_tower(model.config), batch.tokens
    language = flops.training(model.config, tokens=tokens, pairs=0, labels=tokens, images=0)
    attention = 2 * 3 * flops.attention(2, 64, 0, tokens**2).full
    own = flops.q_former_training(
        q_former.q_former_config, queries=1, features=16, hidden=128, images=1
    )
    # Of two layers one looks at the image; pairs count 7/2 of a forward pass here, and 3 there.
    pairs = flops.attention(2, 32, 2 * 1 + 16, 2 * 1 + 16).useful
    assert count == language + tower.full + attention + own - pairs * 7 // 2 + 3 * pairs


# ---- the whole


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("train") / "train.json"
    answer = CliRunner().invoke(train.app, [*RUN, "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    assert "`masked_attention`, packed" in answer.output and "14,479 s" in answer.output
    return read(out, [FAMILY])


def test_every_method_of_a_cpu_runs(record):
    (case,) = record["cases"]
    rows = {row["name"]: row for row in case["rows"]}
    assert list(rows) == list(train_report.METHODS) and record["finished"]
    assert rows["flex"]["status"] == "unsupported" and "backward" in rows["flex"]["reason"]
    for name in ("dense", "padded", "packed", "q-former"):
        row = rows[name]
        assert row["status"] == "ok" and row["timing"]["repeats"] == 2, name
        assert row["timing"]["p20"] <= row["timing"]["p50"] <= row["timing"]["p80"]
        assert row["tflops"] > 0 and row["tokens_per_s"] > 0 and 0 <= row["padding"] < 1
        assert row["peak_bytes"] is None or row["peak_bytes"] > 1e8
    assert rows["packed"]["padding"] == 0 < rows["padded"]["padding"] == rows["dense"]["padding"]
    assert rows["padded"]["flops"] == rows["packed"]["flops"] == rows["dense"]["flops"]
    for name in ("padded", "packed"):
        check = rows[name]["check"]
        assert check["loss_difference"] <= check["loss_limit"] < 1e-4
        assert check["gradient_norm_ratio"] == pytest.approx(1, abs=1e-4)


def test_a_record_says_what_was_drawn(record):
    settings, (case,) = record["settings"], record["cases"]
    stated = settings["distribution"]
    assert stated["lengths"] == "log-normal" and stated["labels"] == "the last half of each text"
    assert stated["sigma"] == pytest.approx(math.sqrt(2 * math.log(29 / 20)))
    assert len(case["texts"]) == case["samples"] == 4 and case["images"] <= 4
    assert settings["quick"] and record["environment"]["commit"]
    assert settings["peak_memory"] is None or "peak" in settings["peak_memory"]


def test_a_failed_check_has_no_time_and_no_ratio(tmp_path, monkeypatch):
    right = train_methods.masked_forward

    def wrong(model, batch):
        if batch.position_ids is None:
            return right(model, batch)
        # A row whose positions go on: its documents see each other.
        batch.position_ids.copy_(torch.arange(batch.position_ids.shape[1]))
        return right(model, batch)

    monkeypatch.setattr(train_methods, "masked_forward", wrong)
    out = tmp_path / "train.json"
    names = ["--methods", "dense", "--methods", "packed"]
    answer = CliRunner().invoke(train.app, [*RUN, *names, "--out", str(out)])
    assert answer.exit_code == 1
    dense, packed = read(out, [FAMILY])["cases"][0]["rows"]
    assert dense["status"] == "ok" and packed["status"] == "red" and "timing" not in packed
    assert "on a small model: loss error" in packed["reason"]
    line = next(x for x in answer.output.splitlines() if x.startswith("| `masked_attention`, pa"))
    assert line.count("not measured") == 6


def test_without_the_dense_mask_nothing_is_compared(record):
    case = copy.deepcopy(record["cases"][0])
    dense = case["rows"][0]
    dense |= {"status": "red", "reason": "made up"}
    del dense["timing"], dense["tflops"]
    lines = train_report.steps_table(case, list(train_report.METHODS)).splitlines()
    ratios = [line.split(" | ")[2] for line in lines[2:]]
    assert ratios[:4] == ["not measured"] * 4


def test_a_loss_far_from_the_first_is_over_the_limit():
    first = {"loss": 2.0, "gradient_norm": 1.0, "largest_logit": 6.0}
    close = train_steps.compare({**first, "loss": 2.00001}, first, torch.float32)
    far = train_steps.compare({**first, "loss": 2.001}, first, torch.float32)
    nothing = train_steps.compare({**first, "loss": math.nan}, first, torch.float32)
    assert not close["reason"] and far["reason"] and nothing["reason"]
    assert not train_steps.compare({**first, "loss": 2.001}, first, torch.bfloat16)["reason"]


def test_a_spent_budget_skips_what_is_left(tmp_path):
    out = tmp_path / "train.json"
    answer = CliRunner().invoke(train.app, [*RUN, "--budget", "0", "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    record = read(out, [FAMILY])
    reasons = {row["name"]: row["reason"] for row in record["cases"][0]["rows"]}
    assert "the budget of 0 s was spent" in reasons["dense"] and record["finished"]
    assert "the budget of 0 s was spent" in reasons["q-former"]


def test_an_unknown_method_is_wrong_usage(tmp_path):
    answer = CliRunner().invoke(
        train.app, [*RUN, "--methods", "none", "--out", str(tmp_path / "o")]
    )
    assert answer.exit_code == 2


def test_tables_of_the_report(record):
    results = {"train-cpu.json": record}
    text = train_report.tables(results, "cpu")
    assert "commit" in text and "18,672 s" in text and "(`bench/results/train-cpu.json`)" in text
    nothing = train_report.tables(results, "cuda")
    assert nothing.startswith("Not measured yet.") and nothing.count("not measured") > 30
    assert "17.82 GB" in nothing
    tables = report.tables_for(results, report.ROOT / "docs", report.ROOT / "bench" / "results")
    assert tables["train-cpu"]() == text and tables["train"]() == nothing


def test_a_record_that_is_not_one_is_refused(record):
    for change in (
        {"cases": [{"title": "x"}]},
        {"cases": [{**record["cases"][0], "rows": [{"name": "dense"}]}]},
    ):
        with pytest.raises(ValueError, match="expected"):
            FAMILY.check({**record, **change})


def test_lines_of_failures(record):
    broken = copy.deepcopy(record)
    broken["cases"][0]["rows"][1] |= {"status": "failed", "reason": "why"}
    assert FAMILY.failures(record) == []
    assert FAMILY.failures(broken) == ["a small LLaVA flex: failed: why"]


def test_peak_memory_is_of_the_time_since_start():
    memory = train_steps.PeakMemory(CPU)
    memory.start()
    before = memory.read()
    if before is None:
        pytest.skip("the system does not tell")
    block = torch.ones(1 << 26)  # 256 MiB
    assert memory.read() - before >= 0.9 * block.nbytes
    del block
    memory.start()
    assert memory.read() - before < 64 << 20


def test_method_names_are_the_report_s():
    names = [*train_methods.masked_methods(1), Q_FORMER]
    assert names == list(train_report.METHODS)
    assert isinstance(train_methods.Flex.missing, types.FunctionType)
