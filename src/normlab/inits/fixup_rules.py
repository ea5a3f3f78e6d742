r"""The weights of a Fixup network: zero where a branch ends, scaled by depth inside it.

Rules 1 and 2 of `normlab.inits.fixup`, for branches of convolutions, linear layers and attention.

Source: H. Zhang, Y. N. Dauphin, T. Ma, "Fixup Initialization: Residual Learning Without
Normalization", 2019, arXiv 1901.09321.

Departs:
    - A branch with one weight layer, for which the exponent is not defined, starts at zero.
    - In a grouped convolution the outputs of one group count, not all: with those of all groups a
      depthwise convolution would let hardly anything pass.
    - Attention outside the branches starts by Xavier's rule, as inside, not scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from normlab.surgery.branches import Branch


def branch_factor(num_branches: int, num_layers: int) -> float:
    r"""Return :math:`L^{-1/(2m-2)}`, by which the weights of a branch are multiplied.

    Args:
        num_branches: The number L of residual branches in the whole network, at least 1.
        num_layers: The number m of weight layers in this branch, at least 1.

    Returns:
        The factor; 1 for m = 1, where the only layer starts at zero.

    Example:
        >>> [round(branch_factor(16, m), 4) for m in (1, 2, 3)]
        [1.0, 0.25, 0.5]
    """
    return 1.0 if num_layers == 1 else num_branches ** (-1 / (2 * num_layers - 2))


def find_branches(
    model: nn.Module, layers_of: Callable[[nn.Module], Sequence[nn.Module] | None]
) -> list[Branch]:
    """Return the residual branches of a model of which one knows the blocks.

    `normlab.surgery.branches.plan_branches` finds them where one does not.

    Args:
        model: Any model.
        layers_of: Returns the weight layers of the branch in order where the module it is given is
            a residual block, otherwise None.

    Returns:
        One `Branch` for each block.

    Example:
        >>> class Block(nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> is_block = lambda module: (module,) if isinstance(module, Block) else None
        >>> [branch.name for branch in find_branches(nn.Sequential(Block(4, 4)), is_block)]
        ['0']
    """
    found = ((name, layers_of(module)) for name, module in model.named_modules())
    return [Branch(name, layers) for name, layers in found if layers]


def fixup_(
    branches: Sequence[Branch],
    *,
    outside: Iterable[nn.Module] = (),
    head: nn.Module | None = None,
    num_branches: int | None = None,
    generator: torch.Generator | None = None,
    linear_: Callable[..., None] | None = None,
) -> None:
    """Initialise the weight layers of a residual network in place, by rules 1 and 2.

    Args:
        branches: The residual branches.
        outside: Layers outside the branches (stem, projections), which start by He's rule.
        head: The readout, which starts at zero.
        num_branches: The number L of branches in the whole network, where ``branches`` are only
            some of them.
        generator: For the draws, on the CPU; torch's own by default.
        linear_: The rule of the branches' linear layers, as `he_normal_`, which is the default;
            `xavier_uniform_` for a Transformer.

    Raises:
        ValueError: There is no branch, or one without layers.
    """
    empty = [branch.name for branch in branches if not branch.layers]
    if not branches or empty:
        raise ValueError(
            "fixup_(branches): expected at least one branch with a weight layer, got "
            f"{empty[0] + ' without' if empty else 'none'}; name the weight layers of each "
            "residual branch"
        )
    total = len(branches) if num_branches is None else num_branches
    for layer in outside:
        if isinstance(layer, nn.MultiheadAttention):
            _start_attention_(layer, 1.0, False, generator)
        else:
            he_normal_(layer, generator=generator)
    for branch in branches:
        factor = branch_factor(total, branch.length)
        for layer in branch.layers:
            last = any(layer is one for one in branch.last)
            if isinstance(layer, nn.MultiheadAttention):
                _start_attention_(layer, factor, last, generator)
            elif last:
                zero_(layer)
            elif linear_ is not None and _is_linear(layer):
                linear_(layer, factor, generator=generator)
            else:
                he_normal_(layer, factor, generator=generator)
    if head is not None:
        zero_(head)


def he_normal_(
    layer: nn.Module, factor: float = 1.0, *, generator: torch.Generator | None = None
) -> None:
    r"""Draw a layer's weight with standard deviation :math:`f \sqrt{2 G / (C_{out} k_h k_w)}`.

    G is the number of groups of a convolution, else 1.

    Args:
        layer: A convolution or linear layer; its bias, if it has one, becomes zero. One of another
            class with a matrix for its weight is asked which axis its outputs are.
        factor: The factor f.
        generator: As in `fixup_`.
    """
    assert isinstance(layer.weight, Tensor)
    shape = layer.weight.shape
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) or _has_outputs_last(layer):
        fan_out = shape[1]
    else:
        fan_out = shape[0] // getattr(layer, "groups", 1)
    deviation = factor * math.sqrt(2 / (fan_out * math.prod(shape[2:])))
    draws = torch.randn(shape, generator=generator)
    zero_(layer)
    with torch.no_grad():
        layer.weight.copy_(deviation * draws)


def xavier_uniform_(
    layer: nn.Module, factor: float = 1.0, *, generator: torch.Generator | None = None
) -> None:
    """Draw a layer's weight by Xavier's uniform rule, as the Transformer form asks; see there.

    Args:
        layer: A layer with a matrix for its weight; its bias, if it has one, becomes zero. Stacked
            query, key and value count as one layer of that many outputs, as in the public code.
        factor: A factor of the weight.
        generator: As in `fixup_`.
    """
    assert isinstance(layer.weight, Tensor)
    drawn = _xavier(layer.weight, factor, generator)
    zero_(layer)
    with torch.no_grad():
        layer.weight.copy_(drawn)


def torch_default_(layer: nn.Module, *, generator: torch.Generator | None = None) -> None:
    """Draw a layer's weight as torch does by default, from a generator of one's own.

    Args:
        layer: A convolution or linear layer.
        generator: As in `fixup_`.
    """
    assert isinstance(layer.weight, Tensor)
    drawn = torch.empty(layer.weight.shape)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    with torch.no_grad():
        layer.weight.copy_(drawn)


def embedding_normal_(embedding: nn.Embedding, *, generator: torch.Generator | None = None) -> None:
    """Draw an embedding of width d with variance 1 / d and padding row zero.

    Args:
        embedding: The embedding.
        generator: As in `fixup_`.
    """
    draws = torch.randn(embedding.weight.shape, generator=generator)
    with torch.no_grad():
        embedding.weight.copy_(draws / math.sqrt(embedding.embedding_dim))
        if embedding.padding_idx is not None:
            embedding.weight[embedding.padding_idx] = 0


def weights_of(layer: nn.Module) -> list[nn.Parameter | None]:
    """Return the weights of a layer, the last one last; None for one that is no parameter of it.

    Args:
        layer: A weight layer; attention has its input projections and the output projection.
    """
    if not isinstance(layer, nn.MultiheadAttention):
        return [layer._parameters.get("weight")]
    stacked = layer._parameters.get("in_proj_weight")
    separate = [layer._parameters.get(f"{x}_proj_weight") for x in "qkv"]
    return [*(separate if stacked is None else [stacked]), layer.out_proj._parameters.get("weight")]


def zero_(layer: nn.Module) -> None:
    """Set a layer's own weight and bias to zero; of attention those of its output projection."""
    layer = layer.out_proj if isinstance(layer, nn.MultiheadAttention) else layer
    for name in ("weight", "bias"):
        parameter = layer._parameters.get(name)
        if parameter is not None:
            nn.init.zeros_(parameter)


def _start_attention_(
    attention: nn.MultiheadAttention, factor: float, last: bool, generator: torch.Generator | None
) -> None:
    with torch.no_grad():
        for weight in weights_of(attention)[:-1]:
            assert weight is not None
            weight.copy_(_xavier(weight, factor, generator))
    bias = attention._parameters.get("in_proj_bias")
    if bias is not None:
        nn.init.zeros_(bias)
    if last:
        zero_(attention.out_proj)
    else:
        xavier_uniform_(attention.out_proj, factor, generator=generator)


def _xavier(weight: Tensor, factor: float, generator: torch.Generator | None) -> Tensor:
    drawn = torch.empty(weight.shape)
    return nn.init.xavier_uniform_(drawn, gain=factor, generator=generator)


def _is_linear(layer: nn.Module) -> bool:
    """Whether it is torch's linear layer or another one with a matrix for its weight."""
    weight = layer._parameters.get("weight")
    return (
        not isinstance(layer, nn.modules.conv._ConvNd) and weight is not None and weight.dim() == 2
    )


@torch.no_grad()
def _has_outputs_last(layer: nn.Module) -> bool:
    """Whether a matrix stands the other way round than in torch's linear layer."""
    weight = layer._parameters.get("weight")
    if isinstance(layer, nn.Linear) or not _is_linear(layer) or weight is None:
        return False
    try:
        return layer(weight.new_zeros(2, weight.shape[0])).shape[-1] == weight.shape[1]
    except (RuntimeError, TypeError, ValueError):
        return False
