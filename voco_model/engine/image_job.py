"""``ImageJob``: an image on its way to its entry, shared by the requests that wait for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from voco_kernels.kv.entry import CompactKV
from voco_model.engine.first_pass import Pixels
from voco_model.engine.plan import ImageSlot
from voco_model.engine.request import RequestError

_ABANDONED = (
    "the thread that was looking up or decoding this image for another request was interrupted; submit "
    "this request again"
)


@dataclass(eq=False)
class ImageJob:
    """An image in one kind of place in a prompt; shared by all requests that have it there.

    Attributes:
        key: of its entry; an entry without one is not stored.
        slot: the token ids around it.
        pixels: input of pass 1, if that has to read the image.
        entry: the result; for a plain LLaVA ``features``, its embeddings ``[tokens, H]``.
        error: why there is no result.
        prepared: whether its creator has found the entry, the pixels or an error.
        from_store: whether the entry was in the store.
    """

    key: str
    slot: ImageSlot
    pixels: Pixels | None = None
    entry: CompactKV | None = None
    features: Tensor | None = None
    error: RequestError | None = None
    prepared: bool = False
    from_store: bool = False

    @property
    def ready(self) -> bool:
        return self.entry is not None or self.features is not None

    @property
    def missing(self) -> bool:
        """Whether pass 1 still has to read the image."""
        wanted = self.prepared and self.pixels is not None
        return wanted and not self.ready and self.error is None

    @property
    def failure(self) -> RequestError | None:
        """``error``, or that the creator was interrupted and left nothing."""
        if self.error is None and self.prepared and self.pixels is None and not self.ready:
            return RequestError("interrupted", _ABANDONED)
        return self.error
