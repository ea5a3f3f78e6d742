"""Find the activation modules of a residual block by the places that they have in it."""

from __future__ import annotations

import torch
from torch import nn

from normlab.surgery.flow import Call, Source, Sum, trace_flow
from normlab.surgery.residual import ResidualBlock


def activation_names(block: ResidualBlock) -> tuple[str | None, ...]:
    """Return the name of the activation behind each convolution of a block.

    The last one is that behind the sum. The block is run once, on noise.

    Args:
        block: A block in the plain form, so that each of these activations is a ReLU.

    Returns:
        Names in the block; None for a ReLU that is called as a function. One module may stand in
        several places.
    """
    weight = block.convolutions[0].weight
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, block.in_channels, 8, 8, generator=generator).to(weight)
    flow = trace_flow(block.module, noise)
    inner = [flow.of(convolution)[0].source for convolution in block.convolutions[1:]]
    behind_sum = [call for call in flow.calls if isinstance(_maker(call.source), Sum)]
    last = next((call for call in behind_sum if type(call.module) is nn.ReLU), None)
    names = {id(module): name for name, module in block.module.named_modules()}
    makers = [_maker(source) for source in (*inner, last)]
    return tuple(
        names[id(maker.module)]
        if isinstance(maker, Call) and type(maker.module) is nn.ReLU
        else None
        for maker in makers
    )


def _maker(source: Source) -> Source:
    while isinstance(source, Call) and type(source.module) is nn.Identity:
        source = source.source
    return source
