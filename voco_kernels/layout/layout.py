"""``MaskLayout``, the compact representation of the attention mask that all backends share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from voco_kernels.integers import is_integer
from voco_kernels.layout.describe import describe_layout
from voco_kernels.layout.documents import (
    check_markers,
    check_numbered_documents,
    document_positions,
)
from voco_kernels.layout.operator import layout_from_token_ids
from voco_kernels.layout.schedule import (
    KEY_START,
    PREFIX_START,
    PREFIX_STOP,
    START,
    STOP,
    Schedule,
    build_schedule,
)
from voco_kernels.layout.spans import Span, check_size, visibility_from_documents
from voco_kernels.layout.token_ids import check_context, check_padding


@dataclass(frozen=True, eq=False, repr=False)
class MaskLayout:
    """The VoCo attention mask of a batch, stored as two integers per token.

    Query ``i`` sees key ``j`` if and only if ``visible_from[i] <= j <= i`` and
    ``i < visible_until[j]``. With one image this is Eq. 3 of VoCo-LLaMA (arXiv 2406.12275) combined
    with the causal mask: text sees the VoCo tokens and earlier text, but never the image itself.

    Build one per batch with a constructor below; all layers and all backends share it. Its tensors
    depend on each other, so don't write to them.

    Attributes:
        visible_from: int32 ``[B, S]``, the first key that a query may see. ``S`` for padding, which
            sees nothing.
        visible_until: int32 ``[B, S]``, one past the last query that may see this key. 0 for padding,
            which no query sees.
        schedule: the tiles that kernels process, derived from these two (see ``schedule.py``).
    """

    visible_from: Tensor
    visible_until: Tensor
    schedule: Schedule

    @classmethod
    def from_lengths(
        cls,
        vision: int,
        voco: int,
        text: int,
        batch: int = 1,
        *,
        device: torch.device | str | None = None,
    ) -> MaskLayout:
        """Build ``batch`` equal rows of the paper's sequence ``[vision | VoCo | text]`` (Eq. 2).

        Args:
            vision: the number of vision tokens. ``vision=voco=0`` is plain causal attention.
            voco: the number of VoCo tokens.
            text: the number of text tokens.

        Raises:
            ValueError: a length is negative, a row is empty, VoCo tokens have no vision tokens before
                them, or there are more than 2**28 tokens in total.
        """
        spans = [("vision", vision), ("voco", voco), ("text", text)]
        if not is_integer(batch) or batch < 1:
            raise ValueError(f"expected batch >= 1, got {batch!r}; pass the number of equal rows")
        batch = int(batch)
        if all(map(is_integer, (vision, voco, text))):
            check_size(batch, int(vision) + int(voco) + int(text))
        one_row = visibility_from_documents([[spans]], isolated=False, padding_side="right")
        visible_from, visible_until = (rows.expand(batch, -1) for rows in one_row)
        return cls._from_host(visible_from, visible_until, device)

    @classmethod
    def from_spans(
        cls,
        rows: Sequence[Sequence[Span]],
        *,
        isolated: bool = False,
        padding_side: str = "right",
        device: torch.device | str | None = None,
    ) -> MaskLayout:
        """Build a layout from one list of ``(kind, length)`` spans per row.

        Kinds are ``"vision"``, ``"voco"`` and ``"text"``. Vision tokens followed directly by VoCo tokens
        form a *segment* (an image, a tile, a video frame). A row can have any number of segments, with
        or without text between them. Vision tokens with no VoCo tokens after them are treated like
        text. Rows are padded to the length of the longest.

        Args:
            rows: the spans of each row.
            isolated: a segment's vision and VoCo tokens don't see anything before the segment, so its
                cached keys and values don't depend on what precedes it.
            padding_side: ``"right"`` or ``"left"``.

        Raises:
            ValueError: a kind is unknown, a length is negative, a row is empty, VoCo tokens don't
                directly follow vision tokens, or there are more than 2**28 tokens in total.
        """
        documents = [[row] for row in rows]
        return cls._from_host(
            *visibility_from_documents(documents, isolated=isolated, padding_side=padding_side),
            device,
        )

    @classmethod
    def packed(
        cls,
        documents: Sequence[Sequence[Span]],
        *,
        isolated: bool = False,
        device: torch.device | str | None = None,
    ) -> MaskLayout:
        """Pack documents into one row (batch size 1); no document sees another.

        Each document is a list of spans, as in ``from_spans``.
        """
        return cls._from_host(
            *visibility_from_documents([documents], isolated=isolated, padding_side="right"), device
        )

    @classmethod
    def from_input_ids(
        cls,
        input_ids: Tensor,
        *,
        voco_token_id: int,
        image_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        isolated: bool = False,
    ) -> MaskLayout:
        """Build a layout from token ids, on their device, with no host sync on CUDA.

        Consecutive VoCo tokens hide the context that they replace from every later token. For the first
        VoCo tokens of a document, that context is everything before them, including text (as in the
        authors' ``make_voco_mask_llava``; Listing 2 of the supplement). For later ones, it is everything
        since the previous VoCo tokens or, if ``image_token_id`` is given, everything from the first
        image token after those, so that text between images stays visible. A row without VoCo tokens
        is plain causal.

        Args:
            input_ids: integer ``[B, S]``.
            voco_token_id: the id of ``<VoCo>``.
            image_token_id: the id of the image placeholder.
            attention_mask: bool or integer ``[B, S]``, 0 for padding on the left or on the right. Larger
                integers number the documents packed into a row, e.g. ``1 1 2 2 2``.
            position_ids: integer ``[B, S]``, for packed rows: a document starts wherever they don't
                increase by 1, as in Transformers.
            sequence_ids: integer ``[B, S]``, for packed rows: a document starts wherever they change
                (``seq_idx`` in Transformers).
            cu_seqlens: integer ``[documents + 1]``, for packed rows: cumulative lengths from 0 to
                ``B * S``, row after row (``cu_seq_lens_q`` in Transformers). For a single row padded
                on the right, they may end where the padding begins.
            isolated: see ``from_spans``.

        Raises:
            TypeError, ValueError: the arguments are invalid or don't fit together.
            ValueError: on the CPU, outside ``torch.compile``: VoCo tokens have no context before them,
                the attention_mask has holes, or document markers disagree, decrease or don't cover the
                tokens. On CUDA these checks would need a host sync. There, a VoCo token with nothing
                before it counts as text, a hole separates documents, a document starts where either
                attention_mask or position_ids says so, and wrong sequence_ids or cu_seqlens fail an
                assertion on the device.
        """
        if not isinstance(input_ids, Tensor) or not is_integer(voco_token_id):
            raise TypeError(
                "expected input_ids as a tensor and voco_token_id as an int, got "
                f"{type(input_ids).__name__} and {type(voco_token_id).__name__}"
            )
        if image_token_id is not None and not is_integer(image_token_id):
            raise TypeError(
                f"expected image_token_id as an int or None, got {type(image_token_id).__name__}"
            )
        voco_token_id = int(voco_token_id)
        image_token_id = None if image_token_id is None else int(image_token_id)
        if input_ids.dim() != 2 or 0 in input_ids.shape or input_ids.dtype.is_floating_point:
            raise ValueError(
                f"expected integer input_ids [B, S] with B, S >= 1, got {input_ids.dtype} "
                f"{list(input_ids.shape)}"
            )
        check_size(*input_ids.shape)
        check_markers(input_ids, attention_mask, position_ids, sequence_ids, cu_seqlens)
        may_read_values = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if may_read_values and attention_mask is not None:
            check_padding(attention_mask)
            check_numbered_documents(attention_mask, position_ids)
        if sequence_ids is not None or cu_seqlens is not None:
            position_ids = document_positions(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                sequence_ids=sequence_ids,
                cu_seqlens=cu_seqlens,
            )
        *tensors, stray = layout_from_token_ids(
            input_ids, voco_token_id, image_token_id, attention_mask, position_ids, isolated
        )
        if may_read_values:
            check_context(stray, voco_token_id)
        return cls.from_tensors(*tensors)

    @classmethod
    def _from_visibility(cls, visible_from: Tensor, visible_until: Tensor) -> MaskLayout:
        schedule = build_schedule(visible_from, visible_until)
        return cls(visible_from.int().contiguous(), visible_until.int().contiguous(), schedule)

    @classmethod
    def _from_host(
        cls, visible_from: Tensor, visible_until: Tensor, device: torch.device | str | None
    ) -> MaskLayout:
        return cls._from_visibility(visible_from, visible_until).to(device or "cpu")

    @property
    def batch(self) -> int:
        return self.visible_from.shape[0]

    @property
    def length(self) -> int:
        return self.visible_from.shape[1]

    @property
    def device(self) -> torch.device:
        return self.visible_from.device

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the layout, in the order in which ``from_tensors`` takes them."""
        return (self.visible_from, self.visible_until, *self.schedule)

    @classmethod
    def from_tensors(
        cls, visible_from: Tensor, visible_until: Tensor, *schedule: Tensor
    ) -> MaskLayout:
        """Rebuild a layout from the result of ``tensors``; nothing is checked or computed."""
        return cls(visible_from, visible_until, Schedule(*schedule))

    def to(self, device: torch.device | str) -> MaskLayout:
        """Return the layout on ``device``; ``self`` if it is already there."""
        target = torch.device(device)
        if target == self.device:
            return self
        return MaskLayout.from_tensors(*(tensor.to(target) for tensor in self.tensors()))

    def materialize(self) -> Tensor:
        """The dense mask, bool ``[B, S, S]`` (query, key), True where visible.

        For tests and plots only: it takes O(S^2) memory, which everything else here avoids.
        """
        position = torch.arange(self.length, device=self.device)
        query, key = position[:, None], position[None, :]
        return (
            (self.visible_from[:, :, None] <= key)
            & (key <= query)
            & (query < self.visible_until[:, None, :])
        )

    def pairs(self) -> int:
        """The number of visible (query, key) pairs in the batch: the useful work per query head."""
        tiles = self.schedule.host_query_tiles()
        start, stop, key_start = tiles[:, START], tiles[:, STOP], tiles[:, KEY_START]
        rows = stop - start
        contiguous = rows * (start - key_start + 1) + rows * (rows - 1) // 2
        gathered = rows * (tiles[:, PREFIX_STOP] - tiles[:, PREFIX_START])
        padding = key_start >= stop
        return int(torch.where(padding, 0, contiguous + gathered).sum())

    def flops(self, num_heads: int, head_dim: int, *, backward: bool = False) -> int:
        """The useful floating-point operations in one call with ``num_heads`` query heads.

        The forward pass takes ``4 * head_dim * num_heads * pairs`` (two matrix products, each with a
        multiply and an add); with ``backward=True``, the backward pass alone takes 2.5 times that
        (five products).
        """
        forward = 4 * head_dim * num_heads * self.pairs()
        return forward * 5 // 2 if backward else forward

    def plot(self, path: str | PathLike, row: int = 0) -> None:
        """Write a PNG of one row's mask: a row per query, a column per key, colored by kind of key.

        Raises:
            ImportError: matplotlib is not installed.
            IndexError: there is no such row.
        """
        from voco_kernels.layout.plot import plot_row

        if not 0 <= row < self.batch:
            raise IndexError(f"expected a row from 0 to {self.batch - 1}, got {row}")
        plot_row(self.visible_from[row], self.visible_until[row], path)

    def __repr__(self) -> str:
        return describe_layout(self.visible_from, self.visible_until, self.pairs())
