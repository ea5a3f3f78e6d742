"""No normalisation: each BatchNorm becomes the bias that the layer before it would have had.

The baseline of every comparison: what the network does by itself.

Departs:
    - A BatchNorm is not simply left out (``nn.Identity``). Networks drop the bias of a convolution
      that a BatchNorm follows, because the BatchNorm's own shift replaces it; leaving both out
      would compare with a network that cannot shift a channel at all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Setting
from normlab.moments import check_channels, per_channel
from normlab.surgery.swap import swap_batch_norms


class ChannelBias(nn.Module):
    """Adds one learnt number per channel, zero at the start: ``y = x + bias``.

    Args:
        num_features: The number of channels C.

    Shape:
        Input and output ``(N, C, *)``.

    Raises:
        ValueError: At the call for input of another number of channels, of integers, or empty.

    Example:
        >>> ChannelBias(2)(torch.tensor([[3.0, -4.0]])).tolist()
        [[3.0, -4.0]]
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.bias = nn.Parameter(torch.empty(num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the bias to zero."""
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Shift ``x`` of shape ``(N, C, *)``."""
        check_channels("ChannelBias", x, self.num_features)
        return x + per_channel(self.bias, x).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return f"{self.num_features}"


def prepare(model: nn.Module, setting: Setting) -> nn.Module:
    """Replace each BatchNorm by a `ChannelBias` that starts at zero."""

    def bias(name: str, norm: nn.Module) -> ChannelBias:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        return ChannelBias(norm.num_features)

    model = swap_batch_norms(model, bias, "none")
    count = sum(isinstance(module, ChannelBias) for module in model.modules())
    setting.say(f"{count} BatchNorm layers became channel biases")
    return model


CARD = Card(
    name="none",
    title="No normalisation",
    summary="Takes the normalisers away and leaves one learnt shift per channel.",
    room="norms",
    source=None,
    best_for="Seeing what a method gains over the bare network.",
    limits=(
        "Deep networks may not train at all without normalisation or a careful initialisation.",
    ),
    departures=(
        "Each BatchNorm becomes a bias, not an identity: convolutions before a BatchNorm have no "
        "bias of their own, so with an identity the network could not shift a channel.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare)
