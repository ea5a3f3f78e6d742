r"""The gates of stochastic depth: which residual branches are computed in this step.

A gate is a function of seed and step alone, so that a run that was stopped goes on with those it
would have had. Several processes agree once, on the first one's seed and step, and then have the
same gates without talking.

Source: G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger, "Deep Networks with Stochastic Depth",
2016, arXiv 1603.09382.

Departs:
    - The authors' code draws from the one random stream of the run. Here the draws of a step have a
      stream of their own, so that no other draw shifts them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from normlab.moments import group_of_several

Schedule = Literal["linear", "uniform"]
Scaling = Literal["test", "train"]
Mode = Literal["skip", "mask"]

_KEY = "stochastic_depth"


def survival_probs(
    num_blocks: int, survival_prob: float = 0.5, schedule: Schedule = "linear"
) -> tuple[float, ...]:
    r"""Return the probability with which each block survives.

    .. math::
        p_l = 1 - \frac{l}{L} (1 - p_L) \text{ (linear)}, \quad p_l = p_L \text{ (uniform)}

    Args:
        num_blocks: The number L of blocks, at least 1.
        survival_prob: The probability p_L of the last block, from 0 to 1.
        schedule: ``"linear"`` or ``"uniform"``.

    Returns:
        The probabilities of blocks 1 to L.

    Raises:
        ValueError: A value out of its range.

    Example:
        >>> survival_probs(4)
        (0.875, 0.75, 0.625, 0.5)
    """
    if num_blocks < 1:
        raise ValueError(
            f"survival_probs(num_blocks={num_blocks}): expected at least 1, got {num_blocks}; give "
            "the number of residual blocks"
        )
    _check_probability("survival_probs", survival_prob)
    check_choice("survival_probs", "schedule", schedule, get_args(Schedule))
    if schedule == "uniform":
        return (survival_prob,) * num_blocks
    numbers = range(1, num_blocks + 1)
    return tuple(1 - number / num_blocks * (1 - survival_prob) for number in numbers)


def expected_depth(probs: Sequence[float]) -> float:
    r"""Return the number of blocks that a step computes on average, :math:`\sum_l p_l`.

    With the linear schedule this is :math:`L - (1 - p_L)(L + 1) / 2`.

    Args:
        probs: The probability of each block.

    Example:
        >>> expected_depth(survival_probs(54))
        40.25
    """
    return math.fsum(probs)


def draw_gates(probs: Sequence[float], seed: int, step: int) -> tuple[bool, ...]:
    """Return for each block whether it is computed in a step.

    A block is dropped where a uniform draw from [0, 1) is below ``1 - p``, so that a probability of
    1 never drops and 0 always does. All blocks may be dropped.

    Args:
        probs: The probability of each block.
        seed: The seed of the run, the same for all of its processes.
        step: The number of the step.

    Example:
        >>> draw_gates((1.0, 0.0), seed=3, step=7)
        (True, False)
    """
    draws = random.Random(f"stochastic depth {seed} {step}")
    return tuple(draws.random() >= 1 - p for p in probs)


class BlockGates:
    """The gates that the residual blocks of one model share.

    They are drawn in one of three ways: `attach` ties them to an optimiser's steps, `follow` to the
    training forwards of a model, and `draw` does it by hand. A copy of a model has gates of its
    own, which count forwards until they are attached themselves.

    Args:
        probs: The probability of each block, from 0 to 1, in order.
        scaling: ``"test"``: the branch is multiplied by its probability in evaluation. ``"train"``:
            it is divided by it in training instead.
        mode: ``"skip"``: what is dropped is not computed, which is a matter of Python's control
            flow; ``torch.compile`` leaves such blocks as they are in training. ``"mask"``: all is
            computed and the result of a dropped branch replaced by zeros, for compiled blocks and
            CUDA graphs.
        seed: The seed. Several processes take the first one's in `follow` and `attach`; who draws
            by hand gives all of them the same.

    Attributes:
        step: The step whose gates are drawn next.
        open: The gates of this pass; None before the first draw.
        mask: In the mode ``"mask"`` the same as a tensor ``(L,)``, kept at one address.

    Raises:
        ValueError: A value out of its range.

    Example:
        >>> gates = BlockGates((1.0, 0.0))
        >>> gates.draw()
        >>> gates.open
        (True, False)
    """

    def __init__(
        self,
        probs: Sequence[float],
        *,
        scaling: Scaling = "test",
        mode: Mode = "skip",
        seed: int = 0,
    ) -> None:
        for p in probs:
            _check_probability("BlockGates", p)
        check_choice("BlockGates", "scaling", scaling, get_args(Scaling))
        check_choice("BlockGates", "mode", mode, get_args(Mode))
        self.probs = tuple(probs)
        self.scaling = scaling
        self.mode = mode
        self.seed = seed
        self.step = 0
        self.open: tuple[bool, ...] | None = None
        self.mask: Tensor | None = None
        self._attached = False

    def __getstate__(self) -> dict[str, Any]:
        # The optimiser's hooks go on moving this object, not a copy of it.
        return self.__dict__ | {"_attached": False}

    def draw(self, device: torch.device | None = None) -> None:
        """Draw the gates of this step; what they are depends on seed and step alone.

        Args:
            device: Where the mask belongs; None for the CPU.
        """
        self.open = draw_gates(self.probs, self.seed, self.step)
        if self.mode == "mask":
            drawn = torch.tensor(self.open, dtype=torch.float32)
            if self.mask is None or (device is not None and self.mask.device != device):
                self.mask = drawn.to(device)
            else:
                self.mask.copy_(drawn)

    def follow(self, model: nn.Module) -> RemovableHandle:
        """Draw before each training forward of ``model``, and count the forwards as steps.

        Once the gates are attached to an optimiser, that one counts. Several processes take seed
        and step of the first, if their group is there by now: all of them have to call it.

        Where ``torch.utils.checkpoint`` computes a forward again, it sees the gates drawn last.
        They are those of the forward if its backward comes before the next training forward.
        Otherwise attach the gates, or use `normlab.checkpoint_activations`, which notes them.

        Args:
            model: The whole model, in which every block is called at most once a pass.
        """
        self._agree()
        return model.register_forward_pre_hook(self._before_forward)

    def _agree(self) -> None:
        if group_of_several(None) is not None:
            first = [self.seed, self.step]
            distributed.broadcast_object_list(first, src=0)
            self.seed, self.step = first

    def _before_forward(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if model.training and not self._attached:
            uncompiled(self._draw_next)(model)

    def _draw_next(self, model: nn.Module) -> None:
        # A forward inside a backward is one that activation checkpointing computes again.
        if self.open is None or torch._C._current_graph_task_id() == -1:
            self.draw(_device(model))
            self.step += 1

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, freeze_skipped: bool = False
    ) -> None:
        """Draw anew after each step of an optimiser; passes within one step share their gates.

        Seed and step stand in ``optimizer.param_groups[0]["stochastic_depth"]``, so that
        ``optimizer.state_dict()`` holds them and training resumes exactly. Several processes take
        those of the first: all of them have to call it.

        Args:
            model: The model whose blocks these gates belong to.
            optimizer: Its optimiser.
            freeze_skipped: Whether a step leaves the weights of dropped branches where they are.
                Otherwise their gradients are zero, and weight decay and momentum still move them.

        Raises:
            ValueError: The optimiser has gates already.
        """
        first = optimizer.param_groups[0]
        if _KEY in first:
            raise ValueError(
                "stochastic-depth(optimizer): expected an optimiser without gates, got one that "
                "counts steps for gates already; attach them once"
            )
        self._agree()
        first[_KEY] = {"seed": self.seed, "step": self.step}
        self._attached = True

        def renew(optimizer: torch.optim.Optimizer) -> None:
            # Loading a checkpoint replaces the optimiser's groups, so they are read anew.
            now = {"seed": self.seed, "step": self.step}
            state = optimizer.param_groups[0].setdefault(_KEY, now)
            self.seed, self.step = state["seed"], state["step"]
            self.draw(_device(model))

        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            optimizer.param_groups[0].setdefault(_KEY, {"seed": self.seed, "step": self.step})
            optimizer.param_groups[0][_KEY]["step"] += 1
            renew(optimizer)

        def drop_gradients() -> None:
            blocks: list[Any] = [m for m in model.modules() if getattr(m, "gates", None) is self]
            for block in blocks:
                if not self._opened(block.index):
                    for parameter in block.branch_parameters():
                        parameter.grad = None

        def before_step(
            optimizer: torch.optim.Optimizer, args: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            closure = named.get("closure") or next(iter(args[1:]), None)
            if closure is None:
                return drop_gradients()

            def without_dropped() -> Any:
                loss = closure()
                drop_gradients()
                return loss

            return args[:1], named | {"closure": without_dropped}

        renew(optimizer)
        optimizer.register_load_state_dict_post_hook(renew)
        optimizer.register_step_post_hook(after_step)
        if freeze_skipped:
            optimizer.register_step_pre_hook(before_step)

    @contextmanager
    def holding(self, gates: tuple[bool, ...] | None) -> Iterator[None]:
        """Use these gates within the block, whatever was drawn meanwhile."""
        drawn, mask = self.open, self.mask
        try:
            self.open = gates
            if gates is not None and mask is not None:
                self.mask = torch.tensor(gates, dtype=mask.dtype, device=mask.device)
            yield
        finally:
            self.open, self.mask = drawn, mask

    def skips(self, index: int, training: bool) -> bool:
        """Whether the branch of a block is not to be computed.

        Args:
            index: The block's number, from 0.
            training: The block's mode.

        Raises:
            ValueError: No gates were drawn.
        """
        return training and self.mode == "skip" and not self._opened(index)

    def add(
        self,
        index: int,
        training: bool,
        out: Tensor,
        shortcut: Tensor,
    ) -> Tensor:
        """Return the sum that ends a block whose branch was computed.

        Args:
            index: The block's number, from 0.
            training: The block's mode.
            out: What the branch made.
            shortcut: What the short path made.
        """
        p = self.probs[index]
        if not training:
            return torch.add(shortcut, out, alpha=p if self.scaling == "test" else 1)
        factor = 1 / p if self.scaling == "train" and p > 0 else 1
        if self.mode == "mask":
            # Not a product: what is dropped may have overflowed.
            out = torch.where(self.mask_of(index, out.device) > 0, out, 0)
        return torch.add(shortcut, out, alpha=factor)

    def mask_of(self, index: int, device: torch.device) -> Tensor:
        """Return a block's gate as a scalar tensor.

        Args:
            index: The block's number, from 0.
            device: Where the block computes.
        """
        if self.mask is None:
            raise _not_drawn()
        if self.mask.device != device:
            # The model moved since the draw.
            self.mask = self.mask.to(device)
        # A copy, because the next draw is written over this one, perhaps before backward.
        return self.mask[index].clone()

    def _opened(self, index: int) -> bool:
        if self.open is None:
            raise _not_drawn()
        return self.open[index]


def _not_drawn() -> ValueError:
    return ValueError(
        "BlockGates.open: expected gates drawn for this pass, got none; call follow(model) or "
        "attach(model, optimizer) once, or draw() before each pass"
    )


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what calls a function as plain Python also where ``torch.compile`` reads the caller.

    Args:
        function: What the compiler cannot read, or had to read anew for each pattern of gates.
    """
    # A decorator would load the compiler for everyone.
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def _device(model: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in model.parameters()), None)


def _check_probability(operation: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(
            f"{operation}(survival_prob={p}): expected a probability of keeping, from 0 to 1, got "
            f"{p}; use 0.5"
        )


def check_choice(operation: str, name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise a ValueError unless ``value`` is one of the words ``known``."""
    if value not in known:
        words = " or ".join(repr(word) for word in known)
        raise ValueError(
            f"{operation}({name}={value!r}): expected {words}, got {value!r}; use {known[0]!r}"
        )
