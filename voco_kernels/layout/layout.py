"""``MaskLayout``: which token sees which, as a value that every backend shares."""

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
    """The VoCo attention mask of a batch, two integers a token.

    Query ``i`` sees key ``j`` if and only if ``visible_from[i] <= j <= i`` and
    ``i < visible_until[j]``. With one image this is Eq. 3 of VoCo-LLaMA (arXiv 2406.12275) on top of
    causality: text sees the VoCo tokens and the text before it, never the image behind them.

    Build one with a constructor below, once per batch; all layers and all backends share it. Its
    tensors belong together: don't write to them.

    Attributes:
        visible_from: int32 ``[B, S]``, the first key that a query may see. ``S`` for padding, which
            sees nothing.
        visible_until: int32 ``[B, S]``, one past the last query that may see this key. 0 for padding,
            which is seen by nothing.
        schedule: the tiles that kernels walk, derived from the two (see ``schedule.py``).
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
        """The paper's sequence ``[vision | VoCo | text]`` (Eq. 2), ``batch`` equal rows.

        Args:
            vision: the number of vision tokens. ``vision=voco=0`` is plain causal attention.
            voco: the number of VoCo tokens.
            text: the number of text tokens.

        Raises:
            ValueError: a negative length, an empty row, VoCo tokens with no vision before them, more
                than 2**28 tokens in all.
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
        """One list of ``(kind, length)`` a row; kinds are ``"vision"``, ``"voco"``, ``"text"``.

        A run of vision tokens followed by its run of VoCo tokens is a *segment* (an image, a tile, a
        video frame); any number of segments may stand in a row, with text between them. Vision tokens
        that no VoCo tokens follow are seen like text. Rows of different length are padded.

        Args:
            isolated: a segment's vision and VoCo tokens do not see what stood before the segment, so
                that its cache does not depend on it.
            padding_side: ``"right"`` or ``"left"``.

        Raises:
            ValueError: an unknown kind, a negative length, an empty row, VoCo tokens that do not
                directly follow vision tokens, more than 2**28 tokens in all.
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
        """Documents one after the other in a batch of 1; none sees another. Spans as above."""
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
        """Read the layout off token ids, on their device, with no host sync on CUDA.

        A run of VoCo tokens hides the context it replaces from all that follows. Of a document's first
        run that is everything before it, text included (the authors' ``make_voco_mask_llava``; Listing
        2 of the supplement). Of a later run it is everything since the run before, or, where
        ``image_token_id`` is given, everything from the first image token since: text between images
        stays text. A row without VoCo tokens is plain causal.

        Args:
            input_ids: integer ``[B, S]``.
            voco_token_id: the id of ``<VoCo>``.
            image_token_id: the id of the image placeholder.
            attention_mask: bool or integer ``[B, S]``, 0 for padding on the left or on the right. Other
                integers number the documents packed into a row, ``1 1 2 2 2``.
            position_ids: integer ``[B, S]`` of packed rows: a document starts wherever they don't
                increase by 1, as in Transformers.
            sequence_ids: integer ``[B, S]`` of packed rows: a document starts wherever they change
                (``seq_idx`` in Transformers).
            cu_seqlens: integer ``[documents + 1]`` of packed rows, cumulative lengths from 0 to
                ``B * S``, row after row (``cu_seq_lens_q`` in Transformers). In a single row that is
                padded on the right, they may stop where its padding begins.
            isolated: see ``from_spans``.

        Raises:
            TypeError, ValueError: arguments that don't fit together.
            ValueError: on the CPU, outside ``torch.compile``: VoCo tokens with no context before them,
                an attention_mask with holes, or markers of documents that disagree, don't cover the
                tokens or decrease. On CUDA such a check would need a host sync: there, a VoCo token with
                nothing before it counts as text, a hole divides documents, a document starts where
                either attention_mask or position_ids says so, and wrong sequence_ids or cu_seqlens fail
                an assertion on the device.
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
        """All tensors of this value, in the order in which ``from_tensors`` takes them."""
        return (self.visible_from, self.visible_until, *self.schedule)

    @classmethod
    def from_tensors(
        cls, visible_from: Tensor, visible_until: Tensor, *schedule: Tensor
    ) -> MaskLayout:
        """Put together again what ``tensors`` took apart; nothing is checked or computed."""
        return cls(visible_from, visible_until, Schedule(*schedule))

    def to(self, device: torch.device | str) -> MaskLayout:
        """The same layout on another device; itself where it is there already."""
        target = torch.device(device)
        if target == self.device:
            return self
        return MaskLayout.from_tensors(*(tensor.to(target) for tensor in self.tensors()))

    def materialize(self) -> Tensor:
        """The dense mask, bool ``[B, S, S]`` (query, key), True where visible. Tests and pictures
        only: it takes the S^2 memory that everything else here avoids."""
        position = torch.arange(self.length, device=self.device)
        query, key = position[:, None], position[None, :]
        return (
            (self.visible_from[:, :, None] <= key)
            & (key <= query)
            & (query < self.visible_until[:, None, :])
        )

    def pairs(self) -> int:
        """The number of visible (query, key) pairs of the whole batch: the useful work of one head."""
        tiles = self.schedule.host_query_tiles()
        start, stop, key_start = tiles[:, START], tiles[:, STOP], tiles[:, KEY_START]
        rows = stop - start
        contiguous = rows * (start - key_start + 1) + rows * (rows - 1) // 2
        gathered = rows * (tiles[:, PREFIX_STOP] - tiles[:, PREFIX_START])
        padding = key_start >= stop
        return int(torch.where(padding, 0, contiguous + gathered).sum())

    def flops(self, num_heads: int, head_dim: int, *, backward: bool = False) -> int:
        """Useful floating-point operations of one call with ``num_heads`` query heads.

        Forward ``4 * head_dim * num_heads * pairs`` (two products, a multiply and an add each);
        ``backward=True`` gives the backward pass alone, 2.5 times that (five products).
        """
        forward = 4 * head_dim * num_heads * self.pairs()
        return forward * 5 // 2 if backward else forward

    def plot(self, path: str | PathLike, row: int = 0) -> None:
        """Write a PNG of one row's mask: queries down, keys across, coloured by kind of key.

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
