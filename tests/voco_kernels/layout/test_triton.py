"""Tests of the Triton kernels for ``MaskLayout.from_input_ids``.

They give the same results as the torch code, in Triton's interpreter with chunks of a few tokens and on
a GPU, and they compile for every supported GPU.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voco_kernels import MaskLayout
from voco_kernels.layout import schedule
from voco_kernels.layout.operator import layout_from_token_ids

triton = pytest.importorskip(
    "triton", reason="Triton is not installed: requirements/triton.txt has it"
)

from voco_kernels.layout import triton as triton_layout  # noqa: E402
from voco_kernels.layout import triton_kernels  # noqa: E402

TEXT, IMAGE, VOCO = 5, 2, 1
IDS = {"T": TEXT, "I": IMAGE, "V": VOCO, "_": VOCO}  # padding may hold any id
COMPILER = Path(__file__).parents[2] / "support" / "triton_layout_aot.py"
NAMES = (
    "visible_from",
    "visible_until",
    "query_tiles",
    "key_tiles",
    "counts",
    "kept",
    "readers",
    "stray",
)

interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs Triton's interpreter: TRITON_INTERPRET=1"
)


def batch(*rows: str) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and position ids of rows written as T, I, V and _ (padding). A space
    starts a new document."""
    ids, mask, positions = [], [], []
    for row in rows:
        documents = row.split(" ")
        ids.append([IDS[token] for document in documents for token in document])
        mask.append([int(token != "_") for document in documents for token in document])
        positions.append([place for document in documents for place in range(len(document))])
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(positions)


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    num_query_tiles, num_key_tiles = want[NAMES.index("counts")].tolist()
    specified = {"query_tiles": num_query_tiles, "key_tiles": num_key_tiles}
    for name, ours, theirs in zip(NAMES, got, want, strict=True):
        rows = slice(specified.get(name))
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        assert torch.equal(ours[rows].cpu(), theirs[rows].cpu()), name


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialized memory with 2**31 - 1."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def assert_kernels_equal_torch(arguments: tuple, block: int | None, tile: int) -> None:
    """Run in the interpreter, with tiles of few rows, so that short rows have several."""
    with pytest.MonkeyPatch.context() as patch, poisoned_memory():
        patch.setattr(schedule, "TILE", tile)
        patch.setattr(triton_kernels, "_TILE", triton.language.constexpr(tile))
        want = layout_from_token_ids(*arguments)
        assert_equal(triton_layout.layout_from_token_ids(*arguments, block=block), want)


CATALOGUE = {
    "one token": ("T",),
    "one VoCo token, stray": ("V",),
    "plain causal": ("TTTTTTTTTTT",),
    "one image": ("TIIIIIIVTTTTTTT", "TTIIIIIVVTTTTTT"),
    "nothing after the VoCo tokens": ("IIIIIIIIVV", "TTTTTTIIIV"),
    "images with text between": ("TIIIVVTTIIIVTTTIIIIIIVTTT",),
    "images side by side": ("IIIVIIIVIIIVTT", "IIIIVVIIVVIIVV"),
    "VoCo tokens across chunks": ("IVTTIIVVVVVVVVTTTT",),
    "padded right": ("TIIIVTTT____", "TIIVTTTTTTT_", "____________"),
    "padded left": ("____TIIIVTTT", "_TIIVTTTTTTT", "___________T"),
    "documents": ("TIIIVVTT TTTT IIIV VVTT IIVTIIV", "T T T TTIIIIIIIIIIIIVVVTTTTTTT"),
    "documents, padded": ("IIIIVTT TIIVTTT______", "IIIVTT IIIVTT TTT_____"),
    "stray VoCo tokens": ("VTTVTTVVTT VTTIIVTTVTT",),
    "holes in the mask": ("TIIV__VTT_IIVTT_T",),
}


@interpreted
@pytest.mark.parametrize("block", [8, 32])
def test_interpreted_kernels_read_document_numbers(block):
    """The attention mask's document numbers, alone and with position ids that restart elsewhere."""
    ids, _, positions = batch("TIIVTTTIIIVVTTTIVTT___", "TIIVTTTIIIVV TTTIVTT___")
    numbers = torch.tensor([[1] * 7 + [2] * 5 + [3] * 7 + [0] * 3, [4] * 7 + [5] * 12 + [0] * 3])
    for position_ids in (None, positions):
        assert_kernels_equal_torch((ids, VOCO, IMAGE, numbers, position_ids, False), block, tile=4)


@interpreted
@pytest.mark.parametrize("block", [8, 32])
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("name", CATALOGUE)
def test_interpreted_kernels_equal_torch_on_the_catalogue(name, isolated, block):
    ids, mask, positions = batch(*CATALOGUE[name])
    for image_token_id in (None, IMAGE):
        arguments = (ids, VOCO, image_token_id, mask, positions, isolated)
        assert_kernels_equal_torch(arguments, block, tile=4)


@st.composite
def token_ids(draw) -> tuple:
    """Arguments for ``layout_from_token_ids``: a few rows in which each token can be of any kind."""
    num_rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    runs = st.tuples(st.sampled_from([TEXT, IMAGE, IMAGE, VOCO]), st.integers(1, 9))
    ids, positions = [], []
    for _ in range(num_rows):
        drawn = draw(st.lists(runs, min_size=1, max_size=12))
        row = [token for token, count in drawn for _ in range(count)]
        ids.append((row * length)[:length])
        starts = draw(st.sets(st.integers(0, length - 1), max_size=4))
        places = []
        for token in range(length):
            places.append(0 if token in starts else places[-1] + 1 if places else 3)
        positions.append(places)
    mask = None
    if draw(st.booleans()):
        reals = draw(st.lists(st.integers(0, length), min_size=num_rows, max_size=num_rows))
        rows = [[place < real for place in range(length)] for real in reals]
        mask = torch.tensor(rows).flip(1) if draw(st.booleans()) else torch.tensor(rows)
    position_ids = torch.tensor(positions) if draw(st.booleans()) else None
    image_token_id = draw(st.sampled_from([None, IMAGE]))
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    input_ids = torch.tensor(ids, dtype=dtype)
    return input_ids, VOCO, image_token_id, mask, position_ids, draw(st.booleans())


@interpreted
@given(token_ids(), st.sampled_from([8, 16, 64]))
@settings(max_examples=25, deadline=None)
def test_interpreted_kernels_equal_torch_on_drawn_ids(arguments, block):
    assert_kernels_equal_torch(arguments, block, tile=4)


@interpreted
def test_interpreted_kernels_equal_torch_with_the_shipped_sizes():
    ids, mask, _ = batch("T" * 5 + "I" * 150 + "VV" + "T" * 140, "I" * 200 + "V" + "_" * 96)
    assert_kernels_equal_torch((ids, VOCO, IMAGE, mask, None, False), None, schedule.TILE)


@pytest.mark.parametrize("capability", [80, 90])
def test_layout_kernels_compile_without_spills(capability):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(COMPILER.parents[2])
    done = subprocess.run(
        [sys.executable, COMPILER, str(capability)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 10
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["local_loads"] == 0, f"spills: {kernel}"


def test_opcheck():
    ids, mask, positions = batch("TIIIVVTT TIIV", "IIIVTTTTTTT_")
    torch.library.opcheck(layout_from_token_ids, (ids, VOCO, IMAGE, mask, positions, True))
    torch.library.opcheck(layout_from_token_ids, (ids.T, VOCO, None, None, None, False))


def random_ids(num_rows: int, length: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids with images of 1 to 700 tokens, padding on the right, and documents."""
    choose = random.Random(length)
    ids, mask, positions = [], [], []
    for _ in range(num_rows):
        row, places = [], []
        while len(row) < length:
            piece = [TEXT] * choose.randrange(1, 300)
            piece += [IMAGE] * choose.randrange(700) + [VOCO] * choose.randrange(4)
            start = places[-1] + 1 if places and choose.random() < 0.5 else 0
            row += piece
            places += range(start, start + len(piece))
        real = choose.randrange(length // 2, length + 1)
        ids.append(row[:length])
        positions.append(places[:length])
        mask.append([1] * real + [0] * (length - real))
    return tuple(torch.tensor(rows, device=device) for rows in (ids, mask, positions))


@pytest.mark.gpu
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "length"),
    [(1, 1), (3, 127), (16, 691), (2, 2048), (4, 3000), (1, 60_000), (600, 2100)],
)
def test_kernels_equal_torch_on_a_gpu(num_rows, length, isolated):
    ids, mask, positions = random_ids(num_rows, length, "cpu")
    on_gpu = [rows.cuda() for rows in (ids, mask, positions)]
    for image_token_id in (None, IMAGE):
        for use_mask, use_positions in ((False, False), (True, False), (True, True)):
            want = layout_from_token_ids(
                ids,
                VOCO,
                image_token_id,
                mask if use_mask else None,
                positions if use_positions else None,
                isolated,
            )
            torch.cuda.set_sync_debug_mode("error")
            try:
                got = layout_from_token_ids(
                    on_gpu[0],
                    VOCO,
                    image_token_id,
                    on_gpu[1] if use_mask else None,
                    on_gpu[2] if use_positions else None,
                    isolated,
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert_equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [691, 5000])
def test_a_captured_graph_follows_its_input_ids(length):
    ids, mask, positions = random_ids(4, length, "cuda")

    def make() -> tuple[Tensor, ...]:
        return layout_from_token_ids(ids, VOCO, IMAGE, mask, positions, False)

    make()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = make()
    for shift in (0, 17):
        ids.copy_(ids.roll(shift, dims=1))
        graph.replay()
        want = layout_from_token_ids(ids.cpu(), VOCO, IMAGE, mask.cpu(), positions.cpu(), False)
        assert_equal(captured, want)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_as_one_graph(device):
    ids, mask, positions = random_ids(2, 300, device)

    def make(ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return MaskLayout.from_input_ids(
            ids,
            voco_token_id=VOCO,
            image_token_id=IMAGE,
            attention_mask=mask,
            position_ids=positions,
        ).tensors()

    compiled = torch.compile(make, fullgraph=True, backend="aot_eager")
    stray = torch.zeros(2, 300, dtype=torch.bool)
    assert_equal((*compiled(ids, mask, positions), stray), (*make(ids, mask, positions), stray))
