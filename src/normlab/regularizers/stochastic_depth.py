r"""Stochastic depth: in each training step some residual branches are left out at random.

.. math::
    H_l = \mathrm{relu}(b_l f_l(H_{l-1}) + \mathrm{id}(H_{l-1})), \quad
    b_l \sim \mathrm{Bernoulli}(p_l)

with one draw a block and step. A branch that is dropped is not computed, neither forward nor
backward, so training is faster, too. Evaluation computes all of them, times :math:`p_l`.

Source: G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger, "Deep Networks with Stochastic Depth",
2016, arXiv 1603.09382.

Departs:
    - A block that changes shape keeps the model's own shortcut. The paper's averages over the
      stride and appends zeros, the workbench's `average-pool`; its default `zero-pad` takes every
      second pixel, as He et al.
    - Convolutions have no biases, as in the plain network; those of the authors' code start at zero
      and batch normalisation cancels them.
    - Gates are a function of seed and step (see `normlab.regularizers.block_gates`).

Gradients of a dropped branch are zero, as in the authors' code, so weight decay and momentum move
its weights on; with ``freeze_skipped`` they stay. Under DistributedDataParallel all processes have
the same gates: `prepare` and `attach` take the first one's seed and step, if the process group is
there by then. Since the zeros are true gradients, ``find_unused_parameters`` is not needed.

Under ``torch.compile`` a block in the mode ``"skip"`` runs uncompiled in training, and the compiled
graph ends in front of it; a graph for each pattern of gates would soon be too many. With the mode
``"mask"`` all is one graph. Either runs under ``torch.utils.checkpoint``; see `BlockGates.follow`
for what holds without `attach`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Setting, Source
from normlab.regularizers.block_activations import activation_names
from normlab.regularizers.block_gates import (
    BlockGates,
    Mode,
    Scaling,
    Schedule,
    check_choice,
    expected_depth,
    survival_probs,
    uncompiled,
)
from normlab.surgery.residual import ResidualBlock, find_residual_network
from normlab.surgery.swap import swap


class StochasticBlock(nn.Module):
    """A ResNet's block ``relu(shortcut(x) + branch(x))`` whose branch is dropped at random.

    It takes over all that the block holds, under the same names: parameters, buffers, hooks. Its
    activations are those that stand in their places when it is called.

    Args:
        block: The parts of the plain block.
        gates: The gates of the model.
        row: The stochastic blocks of the model in the order of use; this one is appended.

    Shape:
        As the plain block.
    """

    def __init__(self, block: ResidualBlock, gates: BlockGates, row: list[StochasticBlock]) -> None:
        super().__init__()
        self.__dict__.update(block.module.__dict__)
        names = {id(child): name for name, child in self._modules.items()}
        self.gates = gates
        self.index = len(row)
        row.append(self)
        # In a list the other blocks are not children.
        self.row = row
        # By name, because a later surgery may put another module in the place.
        self.layer_names = tuple(
            (names[id(convolution)], None if norm is None else names[id(norm)])
            for convolution, norm in zip(block.convolutions, block.norms, strict=True)
        )
        self.activation_names = activation_names(block)
        self.shortcut_name = None if block.shortcut is None else names[id(block.shortcut)]

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; that of a dropped block is its short path."""
        return _in_python(self, self._forward)(x)

    def _forward(self, x: Tensor) -> Tensor:
        name = self.shortcut_name
        shortcut = x if name is None else self.get_submodule(name)(x)
        last = self._activation(-1)
        if not self.gates.skips(self.index, self.training):
            return last(_branch_and_sum(self, self._branch, self._branch_layers(), x, shortcut))
        parameters = self.branch_parameters()
        if name is None and self._follows_relu() and _is_relu(last):
            # What comes in was made by a ReLU and needs no second one.
            return _with_zero_gradients(shortcut, parameters, copy=False)
        in_place = getattr(last, "inplace", False)
        return last(_with_zero_gradients(shortcut, parameters, copy=in_place))

    def _branch(self, x: Tensor) -> Tensor:
        out = x
        for place, (convolution, norm) in enumerate(self.layer_names):
            out = out if place == 0 else self._activation(place - 1)(out)
            out = self.get_submodule(convolution)(out)
            out = out if norm is None else self.get_submodule(norm)(out)
        return out

    def _activation(self, place: int) -> Callable[[Tensor], Tensor]:
        name = self.activation_names[place]
        return torch.relu if name is None else self.get_submodule(name)

    def _follows_relu(self) -> bool:
        # Of the stem nothing is known here; the first block is dropped least often.
        return self.index > 0 and _is_relu(self.row[self.index - 1]._activation(-1))

    def _branch_layers(self) -> list[nn.Module]:
        return [self.get_submodule(name) for pair in self.layer_names for name in pair if name]

    def branch_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the branch, those of the short path left out."""
        return [p for layer in self._branch_layers() for p in layer.parameters()]

    def replay_forward(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what makes a context in which a forward repeats the one of now."""
        return _replay(self.gates)

    def extra_repr(self) -> str:
        """Return what ``print`` shows of the gate."""
        return f"survival_prob={self.gates.probs[self.index]:.4g}"


class StochasticBranch(nn.Module):
    """A residual branch for models of one's own, dropped at random in training.

    .. math::
        y = b f(x) + s

    Args:
        branch: The branch f; it maps a tensor to the shape of the short path.
        gates: The gates of the model, drawn by ``gates.follow(model)`` or ``gates.attach``.
        index: The block's number, from 0.

    Shape:
        Input ``x`` as the branch takes it, ``shortcut`` and output as it returns it.

    Raises:
        ValueError: There is no gate of this number.

    Example:
        >>> gates = BlockGates(survival_probs(2))
        >>> model = nn.Sequential(*(StochasticBranch(nn.Linear(3, 3), gates, i) for i in (0, 1)))
        >>> _ = gates.follow(model)
        >>> model(torch.ones(1, 3)).shape
        torch.Size([1, 3])
    """

    def __init__(self, branch: nn.Module, gates: BlockGates, index: int) -> None:
        super().__init__()
        if not 0 <= index < len(gates.probs):
            raise ValueError(
                f"StochasticBranch(index={index}): expected 0 to {len(gates.probs) - 1}, got "
                f"{index}; make gates for as many blocks as there are"
            )
        self.branch = branch
        self.gates = gates
        self.index = index

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Return the sum of the short path, ``x`` itself if it is None, and the gated branch."""
        return _in_python(self, self._forward)(x, shortcut)

    def _forward(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        shortcut = x if shortcut is None else shortcut
        if self.gates.skips(self.index, self.training):
            # A copy, because an operation in place may follow a sum.
            return _with_zero_gradients(shortcut, self.branch_parameters(), copy=True)
        return _branch_and_sum(self, self.branch, [self.branch], x, shortcut)

    def branch_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the branch."""
        return list(self.branch.parameters())

    def replay_forward(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what makes a context in which a forward repeats the one of now."""
        return _replay(self.gates)

    def extra_repr(self) -> str:
        """Return what ``print`` shows of the gate."""
        return f"survival_prob={self.gates.probs[self.index]:.4g}"


def _in_python(
    block: StochasticBlock | StochasticBranch, forward: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Return a block's forward as it is to be called under ``torch.compile``.

    Read by the compiler, branches that are skipped make another graph of the whole network for
    each pattern of gates.
    """
    return uncompiled(forward) if block.training and block.gates.mode == "skip" else forward


def _is_relu(activation: Callable[[Tensor], Tensor]) -> bool:
    return activation is torch.relu or type(activation) is nn.ReLU


def _replay(gates: BlockGates) -> Callable[[], AbstractContextManager[None]]:
    now = gates.open
    return lambda: gates.holding(now)


def _branch_and_sum(
    block: StochasticBlock | StochasticBranch,
    branch: Callable[[Tensor], Tensor],
    layers: Sequence[nn.Module],
    x: Tensor,
    shortcut: Tensor,
) -> Tensor:
    gates, index, training = block.gates, block.index, block.training
    if not training or gates.mode == "skip":
        return gates.add(index, training, branch(x), shortcut)
    # A masked branch is computed, but its running statistics must not have seen the batch.
    gate = gates.mask_of(index, shortcut.device)
    buffers = [buffer for layer in layers for buffer in layer.buffers()]
    before = [buffer.clone() for buffer in buffers]
    out = branch(x)
    for buffer, old in zip(buffers, before, strict=True):
        # Past the version counter: batch normalisation lists its running statistics among what
        # backward needs, though in training it does not read them there.
        buffer.data.copy_(torch.where(gate > 0, buffer.data, old))
    return gates.add(index, training, out, shortcut)


class _ZeroGradients(torch.autograd.Function):
    """The identity in its first argument; the others get gradients of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copy: bool, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return x.clone() if copy else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (*gradients, None, *(torch.zeros_like(p) for p in ctx.parameters))


def _with_zero_gradients(x: Tensor, parameters: Sequence[nn.Parameter], copy: bool) -> Tensor:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if trained and torch.is_grad_enabled():
        result = _ZeroGradients.apply(x, copy, *trained)
        assert isinstance(result, Tensor)
        return result
    return x.clone() if copy else x


def prepare(
    model: nn.Module,
    setting: Setting,
    *,
    survival_prob: float = 0.5,
    schedule: Schedule = "linear",
    scaling: Scaling = "test",
    mode: Mode = "skip",
) -> nn.Module:
    """Make the branch of every residual block of a ResNet one that is dropped at random.

    The names in ``state_dict`` stay those of the plain network. Without `attach` the gates count
    the training forwards of the model. Of several processes all have to call it.

    Args:
        model: A ResNet in the manner of torchvision, with the ReLU after the sum; changed in place.
        setting: The first batch serves to see what the model computes; the generator gives the
            seed.
        survival_prob: The probability p_L with which the last block survives.
        schedule: ``"linear"`` or ``"uniform"``, see `survival_probs`.
        scaling: ``"test"`` or ``"train"``, see `BlockGates`.
        mode: ``"skip"`` or ``"mask"``, see `BlockGates`.

    Returns:
        The model.

    Raises:
        Unsuitable: The model has no residual blocks, or blocks of another kind.
        ValueError: An option out of its range.
    """
    # Before anything is drawn or run: the options are checked on one block.
    survival_probs(1, survival_prob, schedule)
    check_choice("stochastic-depth", "scaling", scaling, get_args(Scaling))
    check_choice("stochastic-depth", "mode", mode, get_args(Mode))
    network = find_residual_network(model, setting.batches[0][0][:2], "stochastic-depth")
    probs = survival_probs(len(network.blocks), survival_prob, schedule)
    seed = int(torch.randint(2**31, (), generator=setting.generator))
    gates = BlockGates(probs, scaling=scaling, mode=mode, seed=seed)
    row: list[StochasticBlock] = []
    blocks: dict[nn.Module, nn.Module] = {
        block.module: StochasticBlock(block, gates, row) for block in network.blocks
    }
    model = swap(model, blocks)
    gates.follow(model)
    depth = expected_depth(probs)
    computed = "computed" if mode == "skip" else "kept (all are computed, and masked)"
    setting.say(f"a training step has {depth:g} of {len(probs)} residual branches {computed}")
    changing = sum(block.shortcut is not None for block in network.blocks)
    if changing:
        setting.say(f"{changing} blocks that change shape keep the model's own shortcut")
    return model


def gates_of(model: nn.Module) -> BlockGates:
    """Return the gates of a prepared model.

    Args:
        model: The model, or what wraps it.

    Raises:
        ValueError: It has none.
    """
    blocks = (StochasticBlock, StochasticBranch)
    found = next((m.gates for m in model.modules() if isinstance(m, blocks)), None)
    if found is None:
        raise ValueError(
            "stochastic-depth(model): expected a model with stochastic residual blocks, got "
            f"{type(model).__name__} without any; prepare it first, and last of several methods"
        )
    return found


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    *,
    freeze_skipped: bool = False,
) -> None:
    """Draw the gates by the optimiser's steps; see `BlockGates.attach`."""
    gates_of(model).attach(model, optimizer, freeze_skipped=freeze_skipped)


CARD = Card(
    name="stochastic-depth",
    title="Stochastic depth",
    summary="Leaves residual branches out at random during training, later ones more often, and "
    "does not compute them.",
    room="regularizers",
    source=Source(
        authors="G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger",
        title="Deep Networks with Stochastic Depth",
        year=2016,
        arxiv="1603.09382",
        venue="ECCV 2016",
    ),
    batch_of_one="as the model",
    eval_differs=True,
    stochastic=True,
    state=("the seed and the step counter of the gates",),
    best_for="Very deep residual networks: it regularises, and saves about a fifth of the "
    "training time.",
    limits=(
        "Finds the blocks of ResNets with torchvision's names and a ReLU after each sum, and "
        "refuses other models; these take StochasticBranch in their own code.",
        "Other activations are put in after it: stochastic-depth+elu.",
        "Under torch.compile blocks run uncompiled in training; mode=mask compiles whole but "
        "computes every branch.",
        "Shallow residual networks lose more by missing branches than they gain.",
    ),
    departures=(
        "Blocks that change shape keep the model's own shortcut.",
        "Gates are a function of seed and step, those of the first process on all.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare, attach=attach)
