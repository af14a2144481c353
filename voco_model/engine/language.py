"""``Language``: the language model's layers, run on embeddings with a ``RowCache``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from voco_model.engine.row_cache import RowCache, RowLayer, Step
from voco_model.vlm.caches import CACHE_ARGUMENT

# Every shape is compiled once. Layers differ only in their index, which must not cause a recompilation.
_DYNAMO = {
    "allow_unspec_int_on_nn_module": True,
    "recompile_limit": 4096,
    "accumulated_recompile_limit": 4096,
}


class Language:
    """An enabled model's language model, with its embedding and head.

    Args:
        model: enabled, in eval mode, on one device.
        compiled: whether to run layers through ``torch.compile``, as one program for all of them.
            Without it, a layer of a decoding step takes seven products and about thirty small kernels
            (docs/tuning.md).

    Raises:
        ValueError: a language model that does more than run layers and a norm, as Llama's does.
    """

    def __init__(self, model, compiled: bool) -> None:
        text = model.config.text_config
        self.model = model
        self.num_layers: int = text.num_hidden_layers
        self.kv_heads: int = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self.head_dim: int = (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )
        self.hidden_size: int = text.hidden_size
        self.embedding = model.get_input_embeddings()
        self.device: torch.device = self.embedding.weight.device
        self.dtype: torch.dtype = self.embedding.weight.dtype
        decoder = model.model.language_model
        missing = [name for name in ("layers", "norm", "rotary_emb") if not hasattr(decoder, name)]
        if missing:
            raise ValueError(
                f"expected a language model with layers, norm and rotary_emb, got a "
                f"{type(decoder).__name__} without {', '.join(missing)}; use voco_model.generate"
            )
        self._layers = list(decoder.layers)
        self._norm, self._rotary = decoder.norm, decoder.rotary_emb
        self._run_layer = _run_layer
        self._check_forward(decoder)
        if compiled:
            program = torch.compile(_run_layer, fullgraph=True, dynamic=False)
            self._run_layer = torch._dynamo.config.patch(_DYNAMO)(program)

    @torch.no_grad()
    def _check_forward(self, decoder: nn.Module) -> None:
        # Some models also scale embeddings, for instance, while Llama's only runs its layers.
        ids = torch.arange(1, 5, device=self.device)[None]
        embeds, positions = self.embedding(ids), ids - 1
        ours = self.forward(
            self.new_cache(1, 4),
            Step(torch.zeros_like(ids[0, :1]), positions, None),
            embeds,
            positions,
        )
        theirs = decoder(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device),
            use_cache=False,
            voco_causal=True,
        ).last_hidden_state
        apart = (ours - theirs).abs().max() / theirs.abs().max()
        if not apart < 1e-2:
            raise ValueError(
                f"expected a language model that runs its layers and its norm and nothing else, got a "
                f"{type(decoder).__name__}, whose output differs; use voco_model.generate"
            )

    def new_cache(self, rows: int, slots: int) -> RowCache:
        """A cache of zeros with this many rows and slots in every layer."""
        return RowCache(
            self.num_layers, rows, self.kv_heads, slots, self.head_dim, self.dtype, self.device
        )

    def forward(self, cache: RowCache, step: Step, embeds: Tensor, positions: Tensor) -> Tensor:
        """Hidden states ``[b, T, H]`` of embeddings ``[b, T, H]`` at positions int64 ``[b, T]``."""
        cache.step = step
        mask = None
        if step.span is not None:
            seen = torch.arange(step.span, device=self.device)
            mask = seen <= step.slots[:, None, :, None]  # bool [b, 1, T, span]
        rotary = self._rotary(embeds, position_ids=positions)
        hidden = embeds
        for layer, cached in zip(self._layers, cache.layers, strict=True):
            hidden = self._run_layer(layer, cached, hidden, mask, rotary, positions)
        return self._norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 ``[b, V]`` of hidden states ``[b, H]``."""
        return self.model.lm_head(hidden).float()


def _run_layer(
    layer: nn.Module,
    cached: RowLayer,
    hidden: Tensor,
    mask: Tensor | None,
    rotary: tuple[Tensor, Tensor],
    positions: Tensor,
) -> Tensor:
    # A layer only calls its cache's update(), which a RowLayer has.
    return layer(
        hidden,
        attention_mask=mask,
        position_embeddings=rotary,
        position_ids=positions,
        use_cache=True,
        voco_causal=mask is None,
        **{CACHE_ARGUMENT: cached},
    )
