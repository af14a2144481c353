"""A whole run of bench/attn.py: every shape, heads, direction and peer, into one record.

What matters most is measured first. Peers that compile for each case, or take far longer than they are
worth, are left to a second pass over all cases, and layouts to the end: a run that is cut off has the
rest.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import typer

from bench.attention import measure, peers
from bench.attention.peers import Peer
from bench.attention.report import FAMILY
from bench.attention.shapes import Shape
from bench.harness import machine
from bench.harness.clock import Effort
from bench.harness.guard import first_line
from bench.harness.options import pick, usage_errors
from bench.harness.run import Runner


@dataclass(kw_only=True)
class AttentionRunner(Runner):
    """What to run, and how.

    Attributes:
        storage: one of ``measure.STORAGES``.
        present: peers in the order of the tables; ours first.
        shapes, heads, directions: each combination is a case.
        graph: whether to time replays of a CUDA graph, too.
        layouts: whether to time making the layouts, too.
    """

    family = FAMILY
    dtype: torch.dtype
    head_dim: int
    storage: str
    present: list[Peer]
    shapes: list[Shape]
    heads: list[tuple[int, int]]
    directions: list[str]
    effort: Effort
    graph: bool
    layouts: bool

    def fill(self) -> None:
        cases = [
            (direction, heads, shape)
            for direction in self.directions
            for heads in self.heads
            for shape in self.shapes
        ]
        shapes = self.shapes if self.layouts else []
        done = sum(len(case["rows"]) for case in self.record["cases"])
        total = len(cases) * len(self.present) + len(shapes)
        with self.progress_of(total, done + len(self.record["layouts"])):
            self._measure_ceilings()
            for slow in (False, True):
                for case in cases:
                    self._run_case(*case, slow=slow)
            for shape in shapes:
                self._run_layout(shape)

    def say(self, row: dict) -> str:
        if row["status"] != "ok":
            return super().say(row)
        if "layout" in row:
            return f"{row['layout']['p50']:.4g} ms"
        return f"{super().say(row)}, {row['tflops']:.4g} useful TFLOP/s"

    def _measure_ceilings(self) -> None:
        if self.record["ceilings"]:
            return
        try:
            self.record["ceilings"] = machine.ceilings(self.device, self.dtype, self.effort)
        except RuntimeError as error:  # a table without its ceilings is better than no table
            reason = first_line(error)
            self.record["environment"]["no_ceilings"] = reason
            print(f"no ceilings: {reason}", file=sys.stderr)

    def _run_case(
        self, direction: str, heads: tuple[int, int], shape: Shape, *, slow: bool
    ) -> None:
        entry = self._entry(measure.case_record(shape, heads, self.head_dim, self.dtype, direction))
        done = {row["name"] for row in entry["rows"]}
        todo = [
            peer
            for peer in self.present
            if peer.name not in done and peer.slow(shape, self.device) == slow
        ]
        if not todo:
            return
        rest_of = self._measurement(direction, heads, shape, entry["flops"])
        for peer in todo:
            self.measure(
                f"{direction} {shape.name} {heads[0]}/{heads[1]} {peer.name}",
                measure.row_head(peer),
                partial(rest_of, peer),
                entry["rows"],
                order=[each.name for each in self.present],
            )
        del rest_of
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _measurement(
        self, direction: str, heads: tuple[int, int], shape: Shape, flops: int
    ) -> Callable[[Peer], dict]:
        """The inputs of a case and its truth, as a function that measures a peer on them."""
        if self.spent():
            return lambda peer: {}  # never called
        try:
            case = measure.make_case(
                shape,
                heads,
                self.head_dim,
                self.dtype,
                self.device,
                direction=direction,
                storage=self.storage,
            )
            truth = measure.truth_of(case)
        except Exception as error:  # without a truth nothing is timed; other cases go on
            reason = f"no inputs or no float64 truth: {first_line(error)}"
            return lambda peer: {"status": "failed", "reason": reason}
        return lambda peer: measure.measure_peer(
            peer, case, truth, flops, self.effort, graph=self.graph
        )

    def _entry(self, found: dict) -> dict:
        """The record's case of this shape, heads and direction; ``found`` itself if it is new."""
        keys = ("shape", "direction", "num_heads", "num_kv_heads")
        for known in self.record["cases"]:
            if all(known[key] == found[key] for key in keys):
                return known
        self.record["cases"].append(found)
        return found

    def _run_layout(self, shape: Shape) -> None:
        if shape.name in [entry["shape"] for entry in self.record["layouts"]]:
            return
        compiled = self.device.type == "cuda"
        self.measure(
            f"layout {shape.name}",
            {"shape": shape.name},
            lambda: measure.measure_layout(shape, self.device, self.effort, compiled=compiled),
            self.record["layouts"],
        )


def pick_peers(
    probe: torch.Tensor, backends: list[str], rivals: list[str]
) -> tuple[list[Peer], dict[str, str]]:
    """The peers that this machine has, ours first, and the other ones with their reasons.

    Args:
        probe: a small q, of the device, dtype and head_dim that will be run.
        backends: names of ours; all but the reference if empty.
        rivals: names; all if empty, none if ``["none"]``.

    Raises:
        typer.BadParameter: a name is unknown, or no backend of ours can run.
    """
    device = probe.device
    names = [] if rivals == ["none"] else pick(rivals, list(peers.RIVALS), "rivals")
    with usage_errors():
        chosen = [*peers.ours(probe, backends), *(peers.RIVALS[name] for name in names)]
    if not rivals:  # rivals that run on other devices are only listed if asked for
        chosen = [peer for peer in chosen if peer.device_type in (None, device.type)]
    present, unavailable = [], {}
    for peer in chosen:
        try:
            reason = peer.missing(device)
        except Exception as error:  # a broken package must not end the run; its reason is recorded
            reason = first_line(error)
        if reason is None:
            present.append(peer)
        else:
            unavailable[peer.name] = reason
    if not any(peer.ours for peer in present):
        raise typer.BadParameter(f"no backend of ours can run on {device}: {unavailable}")
    return present, unavailable
