"""ReLU and the smooth or leaky activations that are tried in its place, one method each.

Each method puts torch's own module wherever the model has an element-wise activation module of
these kinds. Normalisers stay; ``none+elu`` takes BatchNorm out as well. Functions that squash
(sigmoid, tanh, softmax) stay, because they may be gates.

Sources: see the cards. ELU: D.-A. Clevert, T. Unterthiner, S. Hochreiter, 2015, arXiv 1511.07289.

Departs: nothing is computed in place, whatever the model's own activations did.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch import nn

from normlab.activations.srelu import SReLU
from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.surgery.flow import trace_flow
from normlab.surgery.swap import modules_of, swap

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, SReLU)
"""The modules that are replaced, by exact class."""

_NAMES = ("relu", "relu_", "leaky_relu", "elu", "selu", "gelu", "silu")


def swap_activations(
    model: nn.Module, make: Callable[[], nn.Module], setting: Setting, operation: str
) -> nn.Module:
    """Replace every element-wise activation module by what ``make()`` returns.

    One that evaluation does not call, such as those of a head for training alone, is replaced as
    well, but not counted.

    Args:
        model: The model, changed in place.
        make: Makes the new activation.
        setting: Its first batch shows which activations the model calls, as modules and functions.
        operation: The name of the method that asks, for messages.

    Returns:
        The model.

    Raises:
        Unsuitable: The model calls no such module; activations called as functions are named.

    Example:
        >>> import torch
        >>> setting = Setting(batches=((torch.zeros(2, 4), torch.zeros(2)),))
        >>> swap_activations(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.ELU, setting, "elu")
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ELU(alpha=1.0)
        )
    """
    modules = modules_of(model, ACTIVATIONS)
    flow = trace_flow(model, setting.batches[0][0][:2])
    functions = ", ".join(
        dict.fromkeys(
            f"{one.name} in {one.owner or type(model).__name__}"
            for one in flow.operations
            if one.name in _NAMES
        )
    )
    idle = [name for name, module in modules.items() if not flow.of(module)]
    uncalled = ", ".join(idle)
    if len(idle) == len(modules):
        raise Unsuitable(
            f"{operation}(model): expected an activation as a module "
            f"({', '.join(kind.__name__ for kind in ACTIVATIONS)}), got none"
            f"{f' that is called, only {uncalled}' if idle else ''}"
            f"{f' and these called as functions: {functions}' if functions else ''}; write "
            "each activation as a module of its own"
        )
    new = {module: make() for module in modules.values()}
    fused = _fast_path_code(make())
    for layer in model.modules():
        # In evaluation this layer computes what it noted at its making, not what it holds.
        if isinstance(layer, nn.TransformerEncoderLayer) and layer.activation in new:
            layer.activation_relu_or_gelu = fused
    model = swap(model, new)
    setting.say(f"{len(new) - len(idle)} activations became {make()}")
    if idle:
        setting.say(f"and some that evaluation does not call: {uncalled}")
    if functions:
        setting.say(f"activations called as functions stay: {functions}")
    return model


def _fast_path_code(activation: nn.Module) -> int:
    if type(activation) is nn.ReLU:
        return 1
    return 2 if type(activation) is nn.GELU and activation.approximate == "none" else 0


def prepare_relu(model: nn.Module, setting: Setting) -> nn.Module:
    """Make every activation a ReLU."""
    return swap_activations(model, nn.ReLU, setting, "relu")


def prepare_leaky_relu(
    model: nn.Module, setting: Setting, *, negative_slope: float = 0.01
) -> nn.Module:
    """Make every activation a leaky ReLU with a slope from 0 to below 1 for negative values."""
    if not 0 <= negative_slope < 1:
        raise ValueError(
            f"leaky-relu(negative_slope={negative_slope}): expected a number of at least 0 and "
            f"below 1, got {negative_slope}; use 0.01"
        )
    return swap_activations(model, lambda: nn.LeakyReLU(negative_slope), setting, "leaky-relu")


def prepare_elu(model: nn.Module, setting: Setting, *, alpha: float = 1.0) -> nn.Module:
    r"""Make every activation an exponential linear unit.

    .. math::
        f(x) = x \;(x > 0), \quad \alpha (e^x - 1) \;(x \le 0)
    """
    if not 0 < alpha < math.inf:
        raise ValueError(
            f"elu(alpha={alpha}): expected a number above 0, got {alpha}; use 1, or the method relu"
        )
    return swap_activations(model, lambda: nn.ELU(alpha), setting, "elu")


def prepare_selu(model: nn.Module, setting: Setting) -> nn.Module:
    """Make every activation a scaled exponential linear unit."""
    return swap_activations(model, nn.SELU, setting, "selu")


def prepare_gelu(
    model: nn.Module, setting: Setting, *, approximate: Literal["none", "tanh"] = "none"
) -> nn.Module:
    """Make every activation a Gaussian error linear unit, exact or by tanh."""
    if approximate not in ("none", "tanh"):
        raise ValueError(
            f"gelu(approximate={approximate!r}): expected 'none' or 'tanh', got {approximate!r}; "
            "use 'none' for the exact function"
        )
    return swap_activations(model, lambda: nn.GELU(approximate), setting, "gelu")


def prepare_silu(model: nn.Module, setting: Setting) -> nn.Module:
    """Make every activation x times its sigmoid."""
    return swap_activations(model, nn.SiLU, setting, "silu")


_FUNCTIONS = "Activations that a model calls as functions stay as they are."

RELU = Method(
    card=Card(
        name="relu",
        title="ReLU",
        summary="Makes every activation max(0, x), the reference for the others.",
        room="activations",
        source=Source(
            authors="V. Nair, G. E. Hinton",
            title="Rectified Linear Units Improve Restricted Boltzmann Machines",
            year=2010,
            venue="ICML 2010",
        ),
        batch_of_one="as the model",
        best_for="Comparing activations: what most networks have anyway.",
        limits=(_FUNCTIONS,),
    ),
    prepare=prepare_relu,
)

LEAKY_RELU = Method(
    card=Card(
        name="leaky-relu",
        title="Leaky ReLU",
        summary="A ReLU with a small slope for negative values.",
        room="activations",
        source=Source(
            authors="A. L. Maas, A. Y. Hannun, A. Y. Ng",
            title="Rectifier Nonlinearities Improve Neural Network Acoustic Models",
            year=2013,
            venue="ICML 2013 Workshop on Deep Learning for Audio, Speech, and Language Processing",
        ),
        batch_of_one="as the model",
        best_for="Networks in which units with ReLU fall silent for good.",
        limits=(_FUNCTIONS,),
    ),
    prepare=prepare_leaky_relu,
)

ELU = Method(
    card=Card(
        name="elu",
        title="ELU",
        summary="Saturates at -alpha for negative values, so that mean activations come near zero.",
        room="activations",
        source=Source(
            authors="D.-A. Clevert, T. Unterthiner, S. Hochreiter",
            title="Fast and Accurate Deep Network Learning by Exponential Linear Units (ELUs)",
            year=2015,
            arxiv="1511.07289",
        ),
        batch_of_one="as the model",
        best_for="Deep networks without BatchNorm (none+elu).",
        limits=("Costs an exponential; little gain beside BatchNorm.", _FUNCTIONS),
        departures=(
            "Initial weights stay those of the model; the signal grows a little faster "
            "with depth than ReLU's.",
        ),
    ),
    prepare=prepare_elu,
)

SELU = Method(
    card=Card(
        name="selu",
        title="SELU",
        summary="An ELU scaled so that zero mean and unit variance are a fixed point.",
        room="activations",
        source=Source(
            authors="G. Klambauer, T. Unterthiner, A. Mayr, S. Hochreiter",
            title="Self-Normalizing Neural Networks",
            year=2017,
            arxiv="1706.02515",
        ),
        batch_of_one="as the model",
        best_for="Fully connected networks without normalisers (none+selu).",
        limits=(
            "The fixed point needs weights of variance 1 / fan-in, half of what ReLU is given.",
            _FUNCTIONS,
        ),
        departures=("Initial weights and dropout stay those of the model.",),
    ),
    prepare=prepare_selu,
)

GELU = Method(
    card=Card(
        name="gelu",
        title="GELU",
        summary="x times the probability that a standard normal value lies below x.",
        room="activations",
        source=Source(
            authors="D. Hendrycks, K. Gimpel",
            title="Gaussian Error Linear Units (GELUs)",
            year=2016,
            arxiv="1606.08415",
        ),
        batch_of_one="as the model",
        best_for="Transformers, and convolutional networks in their manner.",
        limits=(_FUNCTIONS,),
    ),
    prepare=prepare_gelu,
)

SILU = Method(
    card=Card(
        name="silu",
        title="SiLU",
        summary="x times its sigmoid, also called swish.",
        room="activations",
        source=Source(
            authors="S. Elfwing, E. Uchibe, K. Doya",
            title="Sigmoid-Weighted Linear Units for Neural Network Function Approximation in "
            "Reinforcement Learning",
            year=2017,
            arxiv="1702.03118",
        ),
        batch_of_one="as the model",
        best_for="Convolutional networks made for small devices, and their kin.",
        limits=(_FUNCTIONS,),
    ),
    prepare=prepare_silu,
)

METHODS: tuple[Method, ...] = (RELU, LEAKY_RELU, ELU, SELU, GELU, SILU)
"""All of them."""
