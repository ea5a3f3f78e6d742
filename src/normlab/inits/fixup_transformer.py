r"""Fixup for the Transformer: encoder and decoder layers without layer normalisation.

Every residual branch is ``x + scale * dropout(F(x + shift))`` with scalars for shift and scale.
With E encoder and D decoder layers there are :math:`L = 2E + 3D` branches. A feed-forward branch
has m = 2 weight layers, attention m = 4 (query, key, value, output): the first ones start by
Xavier's uniform rule times :math:`L^{-1/(2m-2)}`, the last one at zero.

Source: H. Zhang, Y. N. Dauphin, T. Ma, "Fixup Initialization: Residual Learning Without
Normalization", 2019, arXiv 1901.09321.

Departs:
    - Shifts are added; the public code subtracts them, which is the same function.
    - L is 2E + 3D for every branch; the public code builds the decoder's cross-attention with 12,
      which is taken for an oversight.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from normlab.inits.fixup_blocks import FixupClassifier, ScalarBias, ScalarScale
from normlab.inits.fixup_rules import branch_factor, embedding_normal_, xavier_uniform_, zero_


class FixupAttention(nn.Module):
    """A residual attention branch, on the sequence itself or on a memory.

    Args:
        embed_dim: The width d.
        num_heads: The number of heads, a divisor of ``embed_dim``.
        dropout: The share dropped from the branch's output.

    Shape:
        Input and output ``(N, length, embed_dim)``, memory ``(N, memory length, embed_dim)``.

    Raises:
        ValueError: ``num_heads`` does not divide ``embed_dim``.

    Example:
        >>> FixupAttention(8, 2)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"FixupAttention(embed_dim={embed_dim}, num_heads={num_heads}): expected a number "
                f"of heads that divides {embed_dim}, got {num_heads}; change one of the two"
            )
        self.num_heads = num_heads
        self.shift = ScalarBias()
        # Query, key and value stacked: Xavier's rule sees 3 d outputs, as in the public code.
        self.input_projection = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.output_projection = nn.Linear(embed_dim, embed_dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scale = ScalarScale()

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return ``x`` plus what is attended to.

        Args:
            x: The sequence.
            memory: Where keys and values come from; None for the sequence itself.
            mask: Two axes or more that broadcast to ``(N, heads, length, memory length)``: True
                where attention is allowed, or numbers added to the scores.
            is_causal: Whether a position sees only itself and those before it.

        Returns:
            A tensor like ``x``.
        """
        shifted = self.shift(x)
        source = shifted if memory is None else memory
        query_weight, key_weight, value_weight = self.input_projection.weight.chunk(3)
        query = self._heads(nn.functional.linear(shifted, query_weight))
        key = self._heads(nn.functional.linear(source, key_weight))
        value = self._heads(nn.functional.linear(source, value_weight))
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal
        )
        out = self.output_projection(attended.transpose(1, 2).flatten(2))
        return x + self.scale(self.dropout(out))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class FixupFeedForward(nn.Module):
    """A residual feed-forward branch of two linear layers.

    Args:
        embed_dim: The width d.
        hidden_dim: The width between the layers.
        dropout: The share dropped after the activation and from the branch's output.

    Shape:
        Input and output ``(N, length, embed_dim)``.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.shift1 = ScalarBias()
        self.linear1 = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.shift2 = ScalarBias()
        self.relu = nn.ReLU()
        self.dropout1 = nn.Dropout(dropout)
        self.shift3 = ScalarBias()
        self.linear2 = nn.Linear(hidden_dim, embed_dim, bias=False)
        self.dropout2 = nn.Dropout(dropout)
        self.scale = ScalarScale()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the branch's output."""
        out = self.relu(self.shift2(self.linear1(self.shift1(x))))
        out = self.linear2(self.shift3(self.dropout1(out)))
        return x + self.scale(self.dropout2(out))


class FixupEncoderLayer(nn.Module):
    """Self-attention, then feed-forward: two branches.

    Args:
        embed_dim: The width d.
        num_heads: The number of heads.
        hidden_dim: The width inside the feed-forward branch.
        dropout: As in the branches.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, hidden_dim: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.self_attention = FixupAttention(embed_dim, num_heads, dropout)
        self.feed_forward = FixupFeedForward(embed_dim, hidden_dim, dropout)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the layer's output; ``mask`` as in `FixupAttention`."""
        return self.feed_forward(self.self_attention(x, mask=mask))


class FixupDecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder, feed-forward: three branches.

    Args:
        embed_dim: The width d.
        num_heads: The number of heads.
        hidden_dim: The width inside the feed-forward branch.
        dropout: As in the branches.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, hidden_dim: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.self_attention = FixupAttention(embed_dim, num_heads, dropout)
        self.cross_attention = FixupAttention(embed_dim, num_heads, dropout)
        self.feed_forward = FixupFeedForward(embed_dim, hidden_dim, dropout)

    def forward(self, x: Tensor, memory: Tensor, *, memory_mask: Tensor | None = None) -> Tensor:
        """Return the layer's output; ``memory_mask`` is the mask of the cross-attention."""
        x = self.self_attention(x, is_causal=True)
        return self.feed_forward(self.cross_attention(x, memory, mask=memory_mask))


class FixupEncoder(nn.Module):
    """Encoder layers, then one more shift and scale.

    Args:
        layers: The layers.

    Shape:
        Input and output ``(N, length, embed_dim)``.
    """

    def __init__(self, layers: Iterable[FixupEncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.shift = ScalarBias()
        self.scale = ScalarScale()

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the memory for a decoder; ``mask`` as in `FixupAttention`."""
        for layer in self.layers:
            x = layer(x, mask=mask)
        return self.scale(self.shift(x))


class FixupDecoder(nn.Module):
    """Decoder layers, then one more shift in front of the output embedding.

    Args:
        layers: The layers.

    Shape:
        Input and output ``(N, length, embed_dim)``, memory ``(N, memory length, embed_dim)``.
    """

    def __init__(self, layers: Iterable[FixupDecoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.shift = ScalarBias()

    def forward(self, x: Tensor, memory: Tensor, *, memory_mask: Tensor | None = None) -> Tensor:
        """Return the features for the output embedding."""
        for layer in self.layers:
            x = layer(x, memory, memory_mask=memory_mask)
        return self.shift(x)


def fixup_transformer_(
    model: nn.Module,
    output: nn.Linear | None = None,
    *,
    generator: torch.Generator | None = None,
) -> None:
    """Initialise a Transformer of Fixup branches in place.

    L is the number of `FixupAttention` and `FixupFeedForward` modules in ``model``. Every embedding
    becomes normal with variance 1 / d and padding row zero.

    Args:
        model: Holds the embeddings, the encoder and the decoder.
        output: The output embedding, which becomes zero; where its weight is that of an
            embedding of the model it stays what that one is. Like all linear layers of this form
            it has no bias; that of a `FixupClassifier` belongs to the scalars.
        generator: For the draws, on the CPU; torch's own by default.

    Raises:
        ValueError: The model has no Fixup branches, or the output embedding is an nn.Linear with
            bias.
    """
    attentions = [m for m in model.modules() if isinstance(m, FixupAttention)]
    feed_forwards = [m for m in model.modules() if isinstance(m, FixupFeedForward)]
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    total = len(attentions) + len(feed_forwards)
    if not total:
        raise ValueError(
            "fixup_transformer_(model): expected FixupAttention or FixupFeedForward modules, got "
            f"{type(model).__name__} without any; build it from FixupEncoderLayer"
        )
    own = None if output is None or isinstance(output, FixupClassifier) else output.bias
    if own is not None:
        raise ValueError(
            "fixup_transformer_(model, output): expected an output embedding without bias, got "
            f"{type(output).__name__} with one, which would not be among the scalars; give "
            "bias=False, as all linear layers of this form have it, or a FixupClassifier"
        )
    for branch in attentions:
        xavier_uniform_(branch.input_projection, branch_factor(total, 4), generator=generator)
        nn.init.zeros_(branch.output_projection.weight)
    for branch in feed_forwards:
        xavier_uniform_(branch.linear1, branch_factor(total, 2), generator=generator)
        nn.init.zeros_(branch.linear2.weight)
    for embedding in embeddings:
        embedding_normal_(embedding, generator=generator)
    if output is not None and all(output.weight is not one.weight for one in embeddings):
        zero_(output)
