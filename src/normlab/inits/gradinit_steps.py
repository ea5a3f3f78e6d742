"""What a step of GradInit is made of: halves of batches, passes with scaled tensors, scale updates.

A pass runs the model by `torch.func.functional_call`, with tensors in place of its parameters and
copies in place of its buffers, so that nothing of the model changes, running statistics included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from normlab.moments import wide
from normlab.surgery.flow import evaluating, normalises_by_batch

Half = tuple[Any, Any]
"""Inputs and targets: tensors, or tuples and dictionaries of tensors, samples first."""

Kind = Literal["objective", "constraint"]


def halves_of(batches: Iterable[Half], skip: int = 0) -> Iterator[Half]:
    """Cut each batch into two half-batches, in order, and begin anew when all are seen.

    Args:
        batches: Batches ``(inputs, targets)``. An iterator is passed through once; what can be
            iterated again, such as a list or a loader, has no end. A batch of one sample is a half.
        skip: How many halves to leave out first: `GradInit.num_halves` to go on where a run was
            stopped.

    Yields:
        Halves ``(inputs, targets)``.

    Example:
        >>> halves = halves_of([(torch.arange(4), torch.arange(4))])
        >>> [next(halves)[0].tolist() for _ in range(3)]
        [[0, 1], [2, 3], [0, 1]]
    """
    again = True
    while again:
        again = False
        for batch in batches:
            again = not isinstance(batches, Iterator)
            leaves, structure = tree_flatten(tuple(batch))
            if len(batch) != 2 or not all(isinstance(leaf, Tensor) for leaf in leaves):
                raise ValueError(
                    "halves_of(batches): expected pairs (inputs, targets) of tensors, got "
                    f"{type(batch).__name__} of {len(batch)}; yield such pairs"
                )
            size = len(leaves[0])
            cuts = [slice(size // 2), slice(size // 2, None)] if size > 1 else [slice(None)]
            for cut in cuts:
                skip -= 1
                if skip < 0:
                    inputs, targets = tree_unflatten([leaf[cut] for leaf in leaves], structure)
                    yield inputs, targets


def joined(first: Half, second: Half) -> Half:
    """Return the batch of two halves.

    Raises:
        ValueError: They do not fit together.
    """
    (ones, structure), (others, other_structure) = (
        tree_flatten(tuple(first)),
        tree_flatten(tuple(second)),
    )
    try:
        if structure != other_structure:
            raise RuntimeError(f"{structure} and {other_structure}")
        parts = [torch.cat(pair) for pair in zip(ones, others, strict=True)]
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            "GradInit.step(batches): expected half-batches that differ in the number of samples "
            f"only, got {str(error).splitlines()[0]}; pad them to one shape"
        ) from None
    inputs, targets = tree_unflatten(parts, structure)
    return inputs, targets


@contextmanager
def learning_mode(
    model: nn.Module, normalisers: tuple[type[nn.Module], ...] = ()
) -> Iterator[None]:
    """Evaluation mode, but with batch statistics and with gradients; modes are restored.

    Layers by the batch are in training mode: BatchNorm and its subclasses, whatever owns a buffer
    ``running_mean``, classes that say ``batch_statistics = True``, and ``normalisers``. Attention
    runs in the form that can be differentiated twice, and autocast is off.
    """
    kind = next((p.device.type for p in model.parameters()), "cpu")
    with (
        evaluating(model),
        sdpa_kernel(SDPBackend.MATH),
        torch.autocast(kind, enabled=False),
        torch.enable_grad(),
    ):
        for module in model.modules():
            if normalises_by_batch(module) or isinstance(module, normalisers):
                module.training = True
        yield


def run_loss(
    model: nn.Module,
    tensors: dict[str, Tensor],
    batch: Half,
    loss: Callable[[Any, Any], Tensor],
) -> Tensor:
    """Return the loss of the model with ``tensors`` in place of its parameters.

    Half precisions are computed in float32.
    """
    device = next(iter(tensors.values())).device

    def placed(value: Any) -> Any:
        return wide(value.to(device)) if isinstance(value, Tensor) else value

    inputs, targets = tree_map(placed, batch)
    args = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    args, named = ((), inputs) if isinstance(inputs, dict) else (tuple(args), {})
    state = {name: wide(one.detach()) for name, one in model.named_parameters()}
    state |= tensors
    # Fresh copies at every pass: what a pass does to the statistics is not seen by the next one.
    state |= {name: wide(one.detach().clone()) for name, one in model.named_buffers()}
    return loss(functional_call(model, state, args, named), targets)


def gradients(
    value: Tensor, tensors: Sequence[Tensor], *, create_graph: bool = False
) -> list[Tensor]:
    """Return the gradient at each tensor, zeros where nothing depends on it.

    Raises:
        ValueError: An operation cannot be differentiated, or not twice.
    """
    if not value.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    try:
        found = torch.autograd.grad(value, tensors, create_graph=create_graph, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _undifferentiable(str(error).splitlines()[0]) from error
    pairs = zip(found, tensors, strict=True)
    return [torch.zeros_like(tensor) if one is None else one for one, tensor in pairs]


def check_twice_differentiable(value: Tensor) -> None:
    """Refuse a value, made of gradients, behind which a function forbids a second derivative.

    torch marks the place in the graph, but raises only where the mark lies on the way to what is
    asked for; elsewhere it leaves the function's share out without a word.

    Raises:
        ValueError: There is such a function.
    """
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("::Error"):
            raise _undifferentiable("a function marked once_differentiable")
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]


def _undifferentiable(what: str) -> ValueError:
    return ValueError(
        f"GradInit.step(model): expected a model that can be differentiated twice, got: {what}; "
        "write that layer with plain operations of torch, give the model before it is compiled, or "
        "for recurrent layers on a GPU turn cuDNN off, torch.backends.cudnn.flags(enabled=False)"
    )


def total_norm(tensors: Sequence[Tensor], order: int) -> Tensor:
    """Return the l1 or l2 norm over all tensors together."""
    norms = torch.stack([torch.linalg.vector_norm(tensor, order) for tensor in tensors])
    return torch.linalg.vector_norm(norms, order)


class ScaleAdam:
    r"""Adam over one number per tensor, with averages of their own for the two kinds of step.

    .. math::
        \mu_k \leftarrow \beta_1 \mu_k + (1 - \beta_1) g, \quad
        \nu \leftarrow \beta_2 \nu + (1 - \beta_2) g^2, \quad
        m \leftarrow m - \eta_m \frac{\mu_k / (1 - \beta_1^{t_k})}
        {\sqrt{\nu / (1 - \beta_2^{t})} + \epsilon}

    with k the kind of step, :math:`t_k` the steps of that kind and t all steps. The result is
    clipped to the bounds. A scale that reached 0 stays there.

    Args:
        lowest: The lower bound of each scale ``(M,)``.
        highest: The upper bound of all.
        lr: The rate of the scales.
        betas: The two decay rates.
        eps: Added to the root of the second moment.
        shared_second_moment: Whether both kinds share one second moment; otherwise each has its
            own, corrected by its own number of steps.
    """

    def __init__(
        self,
        lowest: Tensor,
        highest: float,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        shared_second_moment: bool,
    ) -> None:
        self._lowest, self._highest = lowest, highest
        self._lr, self._betas, self._eps = lr, betas, eps
        self._shared = shared_second_moment
        self.scales = torch.ones_like(lowest)
        self._means = lowest.new_zeros(2, len(lowest))
        self._squares = lowest.new_zeros(2, len(lowest))
        self.counts = (0, 0)

    def step(self, slopes: Tensor, kind: Kind) -> None:
        """Move the scales against their slopes ``(M,)``."""
        row = ("objective", "constraint").index(kind)
        square_row = 0 if self._shared else row
        self.counts = (self.counts[0] + 1 - row, self.counts[1] + row)
        square_count = sum(self.counts) if self._shared else self.counts[row]
        one, two = self._betas
        moves = self.scales != 0
        mean = one * self._means[row] + (1 - one) * slopes
        square = two * self._squares[square_row] + (1 - two) * slopes.square()
        size = (square / (1 - two**square_count)).sqrt() + self._eps
        moved = self.scales - self._lr * mean / (1 - one ** self.counts[row]) / size
        moved = moved.maximum(self._lowest).clamp_max(self._highest)
        self._means[row] = torch.where(moves, mean, self._means[row])
        self._squares[square_row] = torch.where(moves, square, self._squares[square_row])
        self.scales = torch.where(moves, moved, self.scales)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of scales, averages and numbers of steps."""
        return {
            "scales": self.scales.clone(),
            "means": self._means.clone(),
            "squares": self._squares.clone(),
            "counts": self.counts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        like = self.scales
        self.scales, self._means, self._squares = (
            state[name].to(like, copy=True) for name in ("scales", "means", "squares")
        )
        self.counts = tuple(state["counts"])
