"""Floating-point operations of a LLaVA's parts, counted from its config.

The product of ``[m, k]`` and ``[k, n]`` takes 2 m n k operations, a multiplication and an addition each.
Everything else (norms, softmax, activations, biases, embedding lookups) is left out, as in
``torch.utils.flop_counter``. There are two counts:

* ``full``: what torch's counter finds in Transformers' own forward pass, whose attention multiplies all
  queries with all keys and whose vision tower runs all of its layers;
* ``useful``: only visible pairs of a query and a key (masked work earns no credit), and the vision tower
  only up to the layer whose features are used.

Neither includes the engine's padding. For training steps only useful operations are counted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flops:
    """Operations for one sequence or one image; the module's docstring defines both counts."""

    useful: int
    full: int

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.useful + other.useful, self.full + other.full)

    def __mul__(self, count: int) -> Flops:
        return Flops(self.useful * count, self.full * count)

    __rmul__ = __mul__


def product(m: int, k: int, n: int) -> Flops:
    """The product of ``[m, k]`` and ``[k, n]``."""
    return Flops(2 * m * k * n, 2 * m * k * n)


def attention(num_heads: int, head_dim: int, visible_pairs: int, all_pairs: int) -> Flops:
    """Scores and weighted values: 2 head_dim operations each, per pair and head."""
    per_pair = 4 * num_heads * head_dim
    return Flops(per_pair * visible_pairs, per_pair * all_pairs)


def head_dim_of(text) -> int:
    """Elements of a key, from a language model's config."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def vision_tower(config, tiles: int = 1) -> Flops:
    """CLIP's vision transformer (Radford et al. 2021, arXiv 2103.00020, section 2.4) on the tiles of an
    image.

    Args:
        config: a LLaVA's.
    """
    vision = config.vision_config
    hidden, inner = vision.hidden_size, vision.intermediate_size
    patches = patches_of(config)
    tokens = patches + 1  # and the class token
    # The patch embedding is a convolution with stride = kernel: a product.
    embedding = product(patches, vision.num_channels * vision.patch_size**2, hidden)
    heads = vision.num_attention_heads
    layer = (
        4 * product(tokens, hidden, hidden)  # q, k, v and the output
        + attention(heads, hidden // heads, tokens**2, tokens**2)
        + product(tokens, hidden, inner)
        + product(tokens, inner, hidden)
    )
    layers = vision.num_hidden_layers
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else chosen
    # Hidden states are the embedding's, then one per layer: layers + 1, indexed from either end.
    needed = max(index % (layers + 1) for index in chosen)
    one = Flops(
        embedding.useful + needed * layer.useful,
        embedding.full + layers * layer.full,
    )
    return tiles * one


def projector(config, tiles: int = 1) -> Flops:
    """The two linear layers between vision tower and language model (LLaVA-1.5, arXiv 2310.03744,
    section 3.3), on every patch of every tile."""
    chosen = config.vision_feature_layer
    states = 1 if isinstance(chosen, int) else len(chosen)
    hidden = config.text_config.hidden_size
    tokens = tiles * (patches_of(config) + (config.vision_feature_select_strategy == "full"))
    features = states * config.vision_config.hidden_size
    return product(tokens, features, hidden) + product(tokens, hidden, hidden)


def patches_of(config) -> int:
    """Patches of one tile."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def decoder_layer(text, new: int, past: int = 0) -> Flops:
    """One layer of a language model, causal (Llama, arXiv 2302.13971, section 2.2: gated MLP;
    grouped-query attention, arXiv 2305.13245).

    Args:
        text: the language model's config.
        new: tokens computed.
        past: tokens before them, whose keys and values are in a cache.
    """
    hidden, inner, head_dim = text.hidden_size, text.intermediate_size, head_dim_of(text)
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    visible = new * past + new * (new + 1) // 2
    return (
        2 * product(new, hidden, queries)  # q and the output
        + 2 * product(new, hidden, keys)
        + attention(text.num_attention_heads, head_dim, visible, new * (past + new))
        + 3 * product(new, hidden, inner)  # gate, up, down
    )


def language(config, new: int, past: int = 0) -> Flops:
    """All layers of a LLaVA's language model; see ``decoder_layer``."""
    text = config.text_config
    # Positions times frequencies: the angles of the rotary embedding, computed once for all layers.
    angles = product(head_dim_of(text) // 2, 1, new)
    return text.num_hidden_layers * decoder_layer(text, new, past) + angles


def head(config, tokens: int = 1) -> Flops:
    """Logits. The engine and ``generate`` compute them for a prompt's last token only."""
    return product(tokens, config.text_config.hidden_size, config.text_config.vocab_size)


def see(config, tiles: int = 1) -> Flops:
    """An image's embeddings: tower and projector."""
    return vision_tower(config, tiles) + projector(config, tiles)


def first_token(config, new: int, past: int = 0) -> Flops:
    """A prompt's forward pass up to the logits of its first new token; with ``new=1``, a decoding
    step."""
    return language(config, new, past) + head(config)


def training(config, *, tokens: int, pairs: int, labels: int, images: int) -> int:
    """Useful operations of a LLaVA's forward and backward pass, its vision tower frozen.

    A trained product costs two more of its size in the backward pass, the gradients of both factors; the
    projector's first product costs one more, because the frozen tower's features need no gradient.
    Backward, attention costs 2.5 times its forward pass (five products instead of two). Logits count
    where there is a label; recomputation by gradient checkpointing doesn't count.

    Args:
        tokens: in all sequences, without padding.
        pairs: visible pairs of a query and a key.
        labels: tokens with a label.
        images: images of one tile each.
    """
    text = config.text_config
    hidden, heads = text.hidden_size, text.num_attention_heads
    head_dim = head_dim_of(text)
    layer = (
        2 * product(tokens, hidden, heads * head_dim)
        + 2 * product(tokens, hidden, text.num_key_value_heads * head_dim)
        + 3 * product(tokens, hidden, text.intermediate_size)
    ).useful
    attended = attention(heads, head_dim, pairs, pairs).useful
    seen = images * patches_of(config)
    features = product(seen, config.vision_config.hidden_size, hidden).useful
    return (
        images * vision_tower(config).useful
        + (2 * features + 3 * product(seen, hidden, hidden).useful if images else 0)
        + text.num_hidden_layers * (3 * layer + attended * 7 // 2)
        + product(head_dim // 2, 1, tokens).useful
        + 3 * head(config, labels).useful
    )


def q_former_training(config, *, queries: int, features: int, hidden: int, images: int) -> int:
    """Useful operations of the forward and backward pass of a Q-Former and the linear layer after it
    (BLIP-2, arXiv 2301.12597, section 3.1), on frozen features.

    Args:
        config: a ``Blip2QFormerConfig``.
        queries: learned queries of the Q-Former.
        features: the vision tower's features per image.
        hidden: width of the language model.
    """
    own, heads = config.hidden_size, config.num_attention_heads

    def attend(keys: int) -> int:
        return attention(heads, own // heads, queries * keys, queries * keys).useful * 7 // 2

    each = (
        3 * (4 * product(queries, own, own) + 2 * product(queries, own, config.intermediate_size))
    ).useful + attend(queries)
    crossing = (
        3 * 2 * product(queries, own, own).useful  # q and the output
        + 2 * 2 * product(features, config.encoder_hidden_size, own).useful  # k and v
        + attend(features)
    )
    layers = config.num_hidden_layers
    crossings = -(-layers // config.cross_attention_frequency)
    return images * (
        layers * each + crossings * crossing + 3 * product(queries, own, hidden).useful
    )
