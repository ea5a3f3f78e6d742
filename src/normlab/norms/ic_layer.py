r"""Independent-component layer: batch normalisation, then dropout, in front of every weight layer.

Normalisation is taken from between a weight layer and its activation and put, together with a thin
dropout, at the input of each weight layer, to bring its inputs closer to independent components.
All of batch normalisation's dependence on the batch stays.

Source: G. Chen, P. Chen, Y. Shi, C.-Y. Hsieh, B. Liao, S. Zhang, "Rethinking the Usage of Batch
Normalization and Dropout in the Training of Deep Neural Networks", 2019, arXiv 1905.05928.

What the dropout does to the dependence between neurons: `normlab.norms.ic_statistics`. That it
raises the second moment in training is seen by the next weight layer only: the batch normalisation
after that measures anew.

Departs:
    - The dropped fraction is called ``drop_prob``; the paper's p in the statements is the kept one.
    - Neurons are dropped one by one; a public port drops whole channels
      (``granularity="channel"``: one draw for each sample and channel, at every input rank).
    - What stands after the stem and in front of the readout of a residual network follows from the
      stages; the paper's own networks could not be compared. With ``ic-conv-relu`` a ReLU follows
      the stem.
    - A network's shortcuts keep their kind: zero padding stays where the model has it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.moments import check_channels, check_count, check_momentum
from normlab.norms.ic_rearrange import rearrange
from normlab.surgery.flow import evaluating
from normlab.surgery.residual import ResidualNetwork, find_residual_network
from normlab.surgery.swap import BATCH_NORMS, adopt

STACKINGS = {"A": "relu-ic-conv", "B": "ic-conv-relu", "C": "conv-relu-ic"}
"""The orders of one stage of a residual unit, by letter; the first is the best one of the paper."""


def drop_neurons(
    x: Tensor, drop_prob: float, *, granularity: Literal["element", "channel"] = "element"
) -> Tensor:
    r"""Set neurons to zero at random and scale the others by ``1 / (1 - drop_prob)``.

    Args:
        x: Activations ``(N, C, *)``.
        drop_prob: The expected share of neurons set to zero, at least 0 and below 1.
        granularity: ``"element"`` draws for every value, ``"channel"`` once for each sample and
            channel.

    Returns:
        A tensor like ``x`` with the same expectation.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> drop_neurons(torch.ones(2, 3), 0.0)
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    _check_dropout("drop_neurons", drop_prob, granularity)
    if granularity == "element":
        return nn.functional.dropout(x, drop_prob)
    # torch's dropout2d warns about (N, C) and reads (N, C, L) as one sample.
    channels = x.new_ones((*x.shape[:2], *(1,) * (x.dim() - 2)))
    return x * nn.functional.dropout(channels, drop_prob)


class IndependentComponent(nn.Module):
    """Batch normalisation, then dropout: put it in front of a weight layer, after the activation.

    Args:
        num_features: The number of channels C.
        drop_prob: The share of neurons dropped in training, at least 0 and below 1.
        granularity: As in `drop_neurons`.
        eps: Added to the variance.
        momentum: The weight of the batch in the running statistics.
        affine: Whether batch normalisation learns scale and shift; the next weight layer could do
            the same but for the dropout.
        spatial_dims: The number of spatial axes of the input, 0 to 3.

    Shape:
        Input and output ``(N, C, *)`` with ``spatial_dims`` further axes.

    Raises:
        ValueError: At construction for an option out of range; at the call for input of another
            shape, of integers, or empty, and in training for one value per channel.

    Example:
        >>> layer = IndependentComponent(8)
        >>> layer(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        drop_prob: float = 0.05,
        *,
        granularity: Literal["element", "channel"] = "element",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        _check_dropout("IndependentComponent", drop_prob, granularity)
        check_momentum("IndependentComponent", momentum)
        if spatial_dims not in range(4):
            raise ValueError(
                f"IndependentComponent(spatial_dims={spatial_dims}): expected 0, 1, 2 or 3, got "
                f"{spatial_dims}; give the number of axes after samples and channels"
            )
        self.num_features = num_features
        self.drop_prob = drop_prob
        self.granularity: Literal["element", "channel"] = granularity
        self.spatial_dims = spatial_dims
        norm = BATCH_NORMS[max(spatial_dims, 1) - 1]
        self.norm = norm(num_features, eps=eps, momentum=momentum, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``(N, C, *)``, and drop neurons in training."""
        check_channels("IndependentComponent", x, self.num_features)
        if x.dim() != self.spatial_dims + 2:
            raise ValueError(
                f"IndependentComponent(input): expected {self.spatial_dims} axes after (N, C), got "
                f"shape {tuple(x.shape)}; set spatial_dims={x.dim() - 2}"
            )
        if self.norm.training:
            check_count("IndependentComponent", x)
        x = self.norm(x)
        if self.training and self.drop_prob > 0:
            x = drop_neurons(x, self.drop_prob, granularity=self.granularity)
        return x

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return f"drop_prob={self.drop_prob}, granularity={self.granularity!r}"


class IndependentComponentUnit(nn.Module):
    """A residual unit ``shortcut(x) + stages(x)`` with no activation after the sum.

    Args:
        convolutions: The weight layers of the branch in order: 3x3, 3x3 in a basic unit, 1x1, 3x3,
            1x1 in a bottleneck.
        stacking: The order within a stage: ``"relu-ic-conv"`` (``"A"``), ``"ic-conv-relu"``
            (``"B"``) or ``"conv-relu-ic"`` (``"C"``).
        shortcut: What takes the raw input on the short path, a 1x1 convolution where the shape
            changes; None for the input itself.
        drop_prob: As in `IndependentComponent`.
        granularity: As in `drop_neurons`.

    Shape:
        Input ``(N, C, H, W)``; the output is as the convolutions make it.

    Example:
        >>> unit = IndependentComponentUnit([nn.Conv2d(4, 4, 3, padding=1, bias=False)] * 2)
        >>> [type(layer).__name__ for layer in unit.stages][:3]
        ['ReLU', 'IndependentComponent', 'Conv2d']
    """

    def __init__(
        self,
        convolutions: Iterable[nn.Conv2d],
        *,
        stacking: str = "relu-ic-conv",
        shortcut: nn.Module | None = None,
        drop_prob: float = 0.05,
        granularity: Literal["element", "channel"] = "element",
    ) -> None:
        super().__init__()
        order = _read_stacking("IndependentComponentUnit", stacking).split("-")
        layers: list[nn.Module] = []
        for convolution in convolutions:
            before = order.index("ic") < order.index("conv")
            channels = convolution.in_channels if before else convolution.out_channels
            stage = {
                "relu": nn.ReLU(),
                "ic": IndependentComponent(channels, drop_prob, granularity=granularity),
                "conv": convolution,
            }
            layers += [stage[part] for part in order]
        self.stages = nn.Sequential(*layers)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return ``shortcut(x) + stages(x)``."""
        return self.stages(x) + (x if self.shortcut is None else self.shortcut(x))


def prepare(
    model: nn.Module,
    setting: Setting,
    *,
    stacking: str = "relu-ic-conv",
    drop_prob: float = 0.05,
    granularity: str = "element",
) -> nn.Module:
    """Feed every weight layer but the first by an IC layer.

    A ResNet in the manner of torchvision and nested nn.Sequentials of plain layers are built anew
    in the paper's order; any other model is changed in place (`normlab.norms.ic_rearrange`).

    Args:
        model: The model, whose weight layers are taken over; it is not to be used afterwards.
        setting: The first batch serves to see what the model computes.
        stacking: As in `IndependentComponentUnit`. In a network without shortcuts the three differ
            only where a pool stands in front of a convolution; a model that keeps its own order
            has the first only.
        drop_prob: As in `IndependentComponent`.
        granularity: As in `drop_neurons`.

    Returns:
        A new nn.Sequential, or the model.

    Raises:
        Unsuitable: The model has no place for an IC layer.
        ValueError: An option has no such value.
    """
    stacking = _read_stacking("ic-layer", stacking)
    _check_dropout("ic-layer", drop_prob, granularity)
    dropout = {"drop_prob": drop_prob, "granularity": granularity}
    example = setting.batches[0][0][:2]
    try:
        if isinstance(model, nn.Sequential):
            new = adopt(_chain(model, stacking, dropout), model)
            _check_runs(new, example)
        else:
            network = find_residual_network(model, example, "ic-layer")
            new = adopt(_residual(network, stacking, dropout), model)
    except Unsuitable:
        # Only the paper's default order can be had without building the network anew.
        if stacking != STACKINGS["A"]:
            raise
        return _in_place(model, example, dropout, setting)
    count = sum(isinstance(module, IndependentComponent) for module in new.modules())
    setting.say(f"{count} IC layers stand in front of the weight layers, in the order {stacking}")
    return new


def _in_place(
    model: nn.Module, example: Tensor, dropout: dict[str, Any], setting: Setting
) -> nn.Module:
    def component(num_features: int, spatial_dims: int) -> IndependentComponent:
        return IndependentComponent(num_features, spatial_dims=spatial_dims, **dropout)

    model, count, skipped = rearrange(model, example, component)
    setting.say(f"{count} IC layers stand in front of weight layers, in the model's own order")
    for reason, several in groupby(sorted(skipped, key=skipped.__getitem__), skipped.__getitem__):
        setting.say(f"without one, because {reason}: {', '.join(several)}")
    return model


def _residual(network: ResidualNetwork, stacking: str, dropout: dict[str, Any]) -> nn.Sequential:
    """Build stem, units and readout: every weight layer but the stem is fed by an IC layer."""
    parts: list[tuple[str, nn.Module]] = [("conv1", network.stem)]
    if stacking != "relu-ic-conv":
        parts.append(("relu", nn.ReLU()))
    if stacking == "conv-relu-ic":
        parts.append(("ic", IndependentComponent(network.stem.out_channels, **dropout)))
    if network.stem_pool is not None:
        parts.append(("maxpool", network.stem_pool))
    for stage, blocks in groupby(network.blocks, lambda block: block.name.partition(".")[0]):
        units = OrderedDict()
        for block in blocks:
            name = block.name.partition(".")[2].replace(".", "_") or "0"
            units[name] = IndependentComponentUnit(
                block.convolutions,
                stacking=stacking,
                shortcut=network.bare_shortcut(block),
                **dropout,
            )
        parts.append((stage, nn.Sequential(units)))
    if stacking == "relu-ic-conv":
        parts.append(("relu", nn.ReLU()))
    if stacking != "conv-relu-ic":
        channels = network.blocks[-1].out_channels
        parts.append(("ic", IndependentComponent(channels, **dropout)))
    pool = nn.AdaptiveAvgPool2d(1) if network.pool is None else network.pool
    parts.append(("avgpool", pool))
    parts += [("flatten", nn.Flatten()), ("fc", network.head)]
    return nn.Sequential(OrderedDict(parts))


def _chain(model: nn.Sequential, stacking: str, dropout: dict[str, Any]) -> nn.Sequential:
    """Put an IC layer between every two weight layers, and leave the old normalisers out."""
    result: list[nn.Module] = []
    previous: _ConvNd | nn.Linear | None = None
    for name, layer in _flat("", model):
        if isinstance(layer, BATCH_NORMS):
            continue
        if isinstance(layer, (_ConvNd, nn.Linear)):
            if previous is not None:
                place = len(result)
                # A readout is fed by IC, pool, flatten: the IC layer needs the maps.
                if isinstance(layer, nn.Linear) or stacking == "conv-relu-ic":
                    while _only_pools(result[place - 1]):
                        place -= 1
                result.insert(place, _component_after(previous, dropout))
            previous = layer
        elif not isinstance(layer, nn.PReLU) and any(True for _ in layer.parameters()):
            raise Unsuitable(
                "ic-layer(model): expected a sequence of convolutions, linear layers, batch norms "
                f"and activations, got {name} ({type(layer).__name__}); take it out first"
            )
        result.append(layer)
    if not any(isinstance(layer, IndependentComponent) for layer in result):
        raise Unsuitable(
            "ic-layer(model): expected two weight layers or more, got "
            f"{0 if previous is None else 1}; use a deeper model"
        )
    return nn.Sequential(*result)


def _flat(prefix: str, model: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    # Not named_children, because one activation may stand in several places.
    for name, child in model._modules.items():
        assert child is not None
        if isinstance(child, nn.Sequential):
            yield from _flat(f"{prefix}{name}.", child)
        else:
            yield f"{prefix}{name}", child


def _only_pools(layer: nn.Module) -> bool:
    return type(layer).__module__ in (nn.MaxPool2d.__module__, nn.Flatten.__module__)


def _component_after(layer: _ConvNd | nn.Linear, dropout: dict[str, Any]) -> IndependentComponent:
    if isinstance(layer, nn.Linear):
        return IndependentComponent(layer.out_features, spatial_dims=0, **dropout)
    dims = len(layer.kernel_size)
    return IndependentComponent(layer.out_channels, spatial_dims=dims, **dropout)


def _check_runs(model: nn.Module, example: Tensor) -> None:
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    except ValueError as error:
        raise Unsuitable(
            "ic-layer(model): expected channels on the axis after the samples in front of every "
            f"weight layer, got a model for which {error}; rearrange its axes"
        ) from error


def _read_stacking(operation: str, stacking: str) -> str:
    full = STACKINGS.get(stacking, stacking)
    if full not in STACKINGS.values():
        near = get_close_matches(full, STACKINGS.values(), n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{operation}(stacking={stacking!r}): expected one of "
            f"{', '.join(STACKINGS.values())}, got {stacking!r}; do you mean {near!r}?"
        )
    return full


def _check_dropout(operation: str, drop_prob: float, granularity: str) -> None:
    if not 0 <= drop_prob < 1:
        raise ValueError(
            f"{operation}(drop_prob={drop_prob}): expected at least 0 and below 1, got "
            f"{drop_prob}; use 0.05"
        )
    if granularity not in ("element", "channel"):
        raise ValueError(
            f"{operation}(granularity={granularity!r}): expected 'element' or 'channel', got "
            f"{granularity!r}; use 'element'"
        )


CARD = Card(
    name="ic-layer",
    title="Independent-component layer",
    summary="Puts batch normalisation and a thin dropout in front of every weight layer, after the "
    "activation.",
    room="norms",
    source=Source(
        authors="G. Chen, P. Chen, Y. Shi, C.-Y. Hsieh, B. Liao, S. Zhang",
        title="Rethinking the Usage of Batch Normalization and Dropout in the Training of Deep "
        "Neural Networks",
        year=2019,
        arxiv="1905.05928",
    ),
    batch_statistics=True,
    batch_of_one="needs space",
    eval_differs=True,
    stochastic=True,
    state=("running mean and variance of each IC layer",),
    best_for="Convolutional classifiers with ordinary batch sizes.",
    limits=(
        "All of batch normalisation's dependence on the batch stays: no cure for small batches.",
        "Only ResNets with torchvision's names and sequences of plain layers get the paper's "
        "order; other models keep their own, with IC layers in it.",
        "At zero-mean inputs a drop_prob of 0.05 removes 5 % of each correlation, not all of it.",
    ),
    departures=(
        "Single neurons are dropped; a public port drops channels (granularity=channel).",
        "What follows the stem and what feeds the readout is derived from the order of the stages.",
        "Zero-padding shortcuts stay where the model has them.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare)
