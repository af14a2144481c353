"""``SecondPass``: fills the rows of a static cache with prompts, and decodes them together.

The state of a row (its token, its slot, how many tokens are left) is kept on the device. The host
doesn't wait for the step that it has just launched: tokens arrive ``lag`` steps later, and a row that
has ended by then generates nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from voco_kernels.kv.entry import CompactKV
from voco_kernels.kv.load import load_into
from voco_model.engine.clock import StageClock
from voco_model.engine.language import Language
from voco_model.engine.programs import Programs, bucket, length_bucket
from voco_model.engine.row_cache import Step
from voco_model.engine.sampling import choose, uniform

# A row's state, by column.
TOKEN, SLOT, POSITION, LEFT, SEED, DRAWN, ENDS = range(7)
# A prefill's inputs for each row besides its tokens: row, last token, six columns of its state, and
# temperature and top_p as the bits of float64.
_FACTS = 10
# Outputs of a row instead of a token: it has ended, or its logits are NaN or infinite.
NOTHING, BROKEN = -1, -2
# Decoding reads a power of two of slots, at least this many; each is a graph of its own.
_LEAST_SPAN = 128


@dataclass(eq=False)
class Prompt:
    """A prompt that is ready to be read into a row.

    Attributes:
        ids, slots, positions: of the tokens that pass 2 reads; ids are ignored if there are
            ``features``.
        features: None, or embeddings ``[T, H]`` of all tokens, used instead of ids.
        entries, entry_slots, entry_positions: what is loaded first, and where; positions None leaves
            keys as they were rotated.
        next_slot, next_position: of the first new token.
        max_new_tokens, temperature, top_p, seed, ignore_eos: see ``Sampling``.
        owner: the caller's handle for this prompt.
        drawn: number of tokens at the end of ``ids`` that belong to the answer.
    """

    ids: Sequence[int]
    slots: Sequence[int]
    positions: Sequence[int]
    next_slot: int
    next_position: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    ignore_eos: bool
    owner: Any
    drawn: int = 0
    features: Tensor | None = None
    entries: Sequence[CompactKV] = ()
    entry_slots: Sequence[int] = ()
    entry_positions: Sequence[int] | None = None

    @property
    def causal(self) -> bool:
        """Whether its tokens attend only to each other."""
        return not self.entries


@dataclass(eq=False)
class _Row:
    owner: Any
    slots_used: int  # an upper bound: the device may have stopped earlier
    greedy: bool
    left: bool = False  # tokens that still arrive for it are dropped


@dataclass
class _Flight:
    """Tokens on their way to the host, and their rows."""

    tokens: Tensor
    event: torch.cuda.Event | None
    rows: list[_Row | None]


class SecondPass:
    """The key/value cache of pass 2, and the programs that run on it.

    Args:
        language: the language model.
        rows: number of requests that can decode together.
        slots: of a row, for prompt and new tokens.
        stop_ids: tokens that end an answer.
        suppressed: tokens that are never generated.
        lag: number of steps that the host may be behind.
        graphs: whether to record CUDA graphs.
        clock: the engine's.

    Attributes:
        cache: with one more row and one more slot than given.
        programs: also used by pass 1, so that both share a memory pool.
    """

    def __init__(
        self,
        language: Language,
        *,
        rows: int,
        slots: int,
        stop_ids: Sequence[int],
        suppressed: Sequence[int],
        lag: int,
        graphs: bool,
        clock: StageClock,
    ) -> None:
        self._language = language
        self._device = device = language.device
        self._lag = lag
        self._clock = clock
        self._max_rows = rows
        # Every attention kernel accepts masks whose rows start at multiples of 16 elements.
        slots = -(-slots // 16) * 16
        # The last row and the last slot take what is written for padding.
        self.cache = language.new_cache(rows + 1, slots + 1)
        self._scrap_row, self._scrap_slot = rows, slots
        self._state = torch.zeros(rows + 1, 7, dtype=torch.int64, device=device)
        self._floats = torch.zeros(rows + 1, 2, dtype=torch.float32, device=device)
        self._stop_ids = torch.tensor(list(stop_ids) or [NOTHING], device=device)
        self._bias = None
        if suppressed:
            vocabulary = language.model.get_output_embeddings().weight.shape[0]
            self._bias = torch.zeros(vocabulary, device=device)
            self._bias[torch.tensor(list(suppressed), device=device)] = -torch.inf
        self.programs = Programs(device, graphs, (self._state, self._floats))
        self._buffers: dict[Any, Tensor] = {}
        self._rows: list[_Row | None] = [None] * rows
        # Whether a free row is known to contain only finite numbers. A masked slot has no effect unless
        # it contains NaN or infinity.
        self._clean = [True] * rows
        self._flights: deque[_Flight] = deque()

    @property
    def free_rows(self) -> int:
        return self._rows.count(None)

    @property
    def busy(self) -> bool:
        return bool(self._flights) or self.free_rows < self._max_rows

    def owners(self) -> list[Any]:
        """The owners of the occupied rows."""
        return [row.owner for row in self._rows if row is not None]

    # ---- prompts in

    def enter(self, prompts: Sequence[Prompt]) -> None:
        """Loads and reads prompts, and chooses their first tokens.

        Args:
            prompts: with the same ``causal``, and either all or none with ``features``; no more than
                ``free_rows``.

        Raises:
            torch.OutOfMemoryError: the rows are free again.
        """
        taken = [index for index, row in enumerate(self._rows) if row is None][: len(prompts)]
        rows = [_Row(each.owner, each.next_slot, each.temperature == 0) for each in prompts]
        try:
            for index, row in zip(taken, rows, strict=True):
                self._rows[index] = row
                if not self._clean[index]:
                    self.cache.clear_row(index)
                self._clean[index] = False
            self._load(prompts, taken)
            with self._clock("prefill"):
                tokens = self._read(prompts, taken)
            self._send(tokens[: len(prompts)], rows)
        except BaseException:
            for index, row in zip(taken, rows, strict=True):
                row.left = True  # its first token may be on its way
                self._rows[index] = None
            self._state[taken, LEFT] = 0
            raise

    def _load(self, prompts: Sequence[Prompt], rows: Sequence[int]) -> None:
        loaded = [
            (row, prompt) for row, prompt in zip(rows, prompts, strict=True) if prompt.entries
        ]
        if not loaded:
            return
        with self._clock("load"):
            moved = any(prompt.entry_positions is not None for _, prompt in loaded)
            load_into(
                self.cache.views,
                [list(prompt.entries) for _, prompt in loaded],
                rows=[row for row, _ in loaded],
                slots=[list(prompt.entry_slots) for _, prompt in loaded],
                positions=[
                    list(prompt.entry_positions)
                    if prompt.entry_positions is not None
                    else [int(entry.positions[0]) for entry in prompt.entries]
                    for _, prompt in loaded
                ]
                if moved
                else None,
            )

    def _read(self, prompts: Sequence[Prompt], rows: Sequence[int]) -> Tensor:
        count, causal = bucket(len(prompts)), prompts[0].causal
        width = length_bucket(max(len(prompt.slots) for prompt in prompts))
        span = None
        if not causal:
            loaded = max(prompt.next_slot - len(prompt.slots) for prompt in prompts)
            span = min(width + -(-loaded // 16) * 16, self._scrap_slot)
        embedded = prompts[0].features is not None
        greedy = all(prompt.temperature == 0 for prompt in prompts)
        packed = self._buffer(("prefill", count, width), (count, 3 * width + _FACTS), torch.int64)
        packed.copy_(self._pack(prompts, rows, count, width), non_blocking=True)
        embeds = None
        if embedded:
            embeds = self._embeds(count, width)
            embeds.zero_()  # an earlier prompt may have left NaN
            for row, prompt in enumerate(prompts):
                embeds[row, : prompt.features.shape[0]] = prompt.features
        return self.programs.run(
            ("prefill", count, width, span, embedded, greedy),
            lambda: self._prefill(packed, embeds, span, greedy),
        )

    def _pack(
        self, prompts: Sequence[Prompt], rows: Sequence[int], count: int, width: int
    ) -> Tensor:
        """All inputs of a prefill, int64 ``[count, 3 * width + _FACTS]``: ids, slots and positions, then
        row, last token, and the initial state of the row."""
        packed = torch.zeros(count, 3 * width + _FACTS, dtype=torch.int64)
        tokens, rest = packed[:, : 3 * width].view(count, 3, width), packed[:, 3 * width :]
        tokens[:, 1] = self._scrap_slot
        rest[:, 0] = self._scrap_row
        for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            length = len(prompt.slots)
            for line, values in enumerate((prompt.ids, prompt.slots, prompt.positions)):
                tokens[index, line, :length] = torch.tensor(values)
            state = (
                prompt.next_slot - 1,  # choosing the first token adds one
                prompt.next_position - 1,
                prompt.max_new_tokens,
                prompt.seed,
                prompt.drawn,
                not prompt.ignore_eos,
            )
            rest[index, :8] = torch.tensor([row, length - 1, *state])
            floats = torch.tensor([prompt.temperature, prompt.top_p], dtype=torch.float64)
            rest[index, 8:] = floats.view(torch.int64)
        return packed.pin_memory() if self._device.type == "cuda" else packed

    def _prefill(self, packed: Tensor, embeds: Tensor | None, span: int | None, greedy: bool):
        count, width = packed.shape[0], (packed.shape[1] - _FACTS) // 3
        ids, slots, positions = packed[:, : 3 * width].view(count, 3, width).unbind(1)
        rest = packed[:, 3 * width :]
        rows, last = rest[:, 0], rest[:, 1]
        if embeds is None:
            embeds = self._language.embedding(ids)
        hidden = self._language.forward(self.cache, Step(rows, slots, span), embeds, positions)
        ends = hidden[torch.arange(count, device=self._device), last]
        none = torch.zeros_like(last)
        slot, position, left, seed, drawn, heeds = rest[:, 2:8].unbind(1)
        self._state[rows] = torch.stack([none, slot, position, left, seed, drawn, heeds], dim=1)
        self._floats[rows] = rest[:, 8:].contiguous().view(torch.float64).float()
        return self._choose(ends, rows, greedy)

    # ---- tokens out

    def step(self) -> bool:
        """Launches one more token for every occupied row. Returns whether there is one."""
        self._close_ranks()
        taken = [index for index, row in enumerate(self._rows) if row is not None]
        if not taken:
            return False
        count = min(bucket(taken[-1] + 1), self._max_rows)
        used = max(self._rows[index].slots_used for index in taken)
        span = min(bucket(used + 1, _LEAST_SPAN), self._scrap_slot)
        greedy = all(self._rows[index].greedy for index in taken)
        for index in taken:
            row = self._rows[index]
            row.slots_used = min(row.slots_used + 1, self._scrap_slot)
        with self._clock("decode"):
            tokens = self._run_decode(count, span, greedy)
        self._send(tokens, self._rows[:count])
        return True

    def warm_decode(self, rows: int, greedy: bool) -> None:
        """Records decoding of this many rows for every span, while all rows are free."""
        count, span = min(bucket(rows), self._max_rows), _LEAST_SPAN
        while True:
            span = min(span, self._scrap_slot)
            self._run_decode(count, span, greedy)
            if span == self._scrap_slot:
                return
            span *= 2

    def _run_decode(self, count: int, span: int, greedy: bool) -> Tensor:
        return self.programs.run(
            ("decode", count, span, greedy), lambda: self._decode(count, span, greedy)
        )

    def _decode(self, count: int, span: int, greedy: bool) -> Tensor:
        rows = torch.arange(count, device=self._device)
        state = self._state[:count]
        step = Step(rows, state[:, SLOT, None].clone(), span, consecutive=True)
        embeds = self._language.embedding(state[:, TOKEN, None])
        positions = state[:, POSITION, None].clone()
        hidden = self._language.forward(self.cache, step, embeds, positions)
        return self._choose(hidden[:, -1], rows, greedy)

    def _choose(self, hidden: Tensor, rows: Tensor, greedy: bool) -> Tensor:
        """The next token of each row, int64 ``[b]``, or NOTHING or BROKEN. Advances the rows' state."""
        logits = self._language.logits(hidden)
        sound = logits.amax(-1).isfinite()
        if self._bias is not None:
            logits = logits + self._bias
        state = self._state[rows]
        if greedy:
            token = logits.argmax(-1)
        else:
            temperature, top_p = self._floats[rows].unbind(1)
            token = choose(logits, temperature, top_p, uniform(state[:, SEED], state[:, DRAWN]))
        writes = state[:, LEFT] > 0
        ended = (token[:, None] == self._stop_ids).any(1) & (state[:, ENDS] != 0) | ~sound
        moved = writes.long()
        left = torch.where(ended, 0, state[:, LEFT] - moved)
        columns = [torch.where(writes & sound, token, state[:, TOKEN])]
        columns += [state[:, SLOT] + moved, state[:, POSITION] + moved, left]
        columns += [state[:, SEED], state[:, DRAWN] + moved, state[:, ENDS]]
        self._state[rows] = torch.stack(columns, dim=1)
        return torch.where(writes, torch.where(sound, token, BROKEN), NOTHING)

    def _send(self, tokens: Tensor, rows: list[_Row | None]) -> None:
        if self._device.type != "cuda":
            self._flights.append(_Flight(tokens.clone(), None, rows))
            return
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._flights.append(_Flight(host, event, rows))

    def arrived(self) -> list[tuple[Any, int]]:
        """Pairs of owner and token (or BROKEN) that have arrived for occupied rows, oldest first.

        Waits only if the host is more than ``lag`` steps ahead, or has nothing else to do.
        """
        pairs = []
        idle = self.free_rows == self._max_rows
        while self._flights and (idle or len(self._flights) > self._lag or self._ready()):
            flight = self._flights.popleft()
            if flight.event is not None:
                flight.event.synchronize()
            for row, token in zip(flight.rows, flight.tokens.tolist(), strict=True):
                if row is not None and not row.left and token != NOTHING:
                    pairs.append((row.owner, token))
        return pairs

    def _ready(self) -> bool:
        event = self._flights[0].event
        return event is not None and event.query()

    # ---- rows out

    def leave(self, owner: Any, *, sound: bool = False) -> None:
        """Frees the row of an owner, if it has one. ``sound``: all of its logits were finite."""
        for index, row in enumerate(self._rows):
            if row is not None and row.owner is owner:
                row.left = True
                self._rows[index] = None
                self._state[index, LEFT] = 0
                self._clean[index] = sound

    def reset(self) -> None:
        """Frees every row and drops the tokens on their way, whatever state an exception has left them
        in."""
        self._flights.clear()
        self._rows = [None] * self._max_rows
        self._clean = [False] * self._max_rows
        self._state[:, LEFT] = 0

    def _close_ranks(self) -> None:
        """Moves rows to the front if that makes the batch smaller."""
        taken = [index for index, row in enumerate(self._rows) if row is not None]
        if not taken or bucket(len(taken)) >= bucket(taken[-1] + 1):
            return
        for target in range(len(taken)):
            if self._rows[target] is None:
                source = max(index for index, row in enumerate(self._rows) if row is not None)
                row = self._rows[source]
                self.cache.copy_row(source, target, row.slots_used)
                self._state[target] = self._state[source]
                self._floats[target] = self._floats[source]
                self._state[source, LEFT] = 0
                self._rows[target], self._rows[source] = row, None

    def _embeds(self, count: int, width: int) -> Tensor:
        """``[count, width, H]``, at the start of a buffer shared by all shapes."""
        size = self._language.hidden_size
        widest = length_bucket(self._scrap_slot)
        whole = self._buffer(
            "embeds", (bucket(self._max_rows) * widest * size,), self._language.dtype
        )
        return whole[: count * width * size].view(count, width, size)

    def _buffer(self, key: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(shape, dtype=dtype, device=self._device)
        return self._buffers[key]
