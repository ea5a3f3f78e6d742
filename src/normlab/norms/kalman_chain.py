r"""Thread the posteriors of Kalman normalisers through any model, whatever its control flow.

A normaliser of `normlab.norms.batch_kalman_norm` takes the posterior of the one before it. In a
model that somebody wrote for BatchNorm there is no place for that second value, so each layer
posts its posterior to a board, the `KalmanChain`, and finds its prior there. Who comes before whom
is read once from a forward pass, back along the data path from each normaliser's input:

- a normaliser found there gives its posterior;
- a residual sum adds the moments of its terms; a term that an earlier normaliser took as its input
  has that one's posterior, a term with fewer channels is padded with zeros, where the model pads;
- layers and functions in between are absorbed by the transition matrix or, if moments are
  propagated, carried through; within a sum, the transition takes them for the identity;
- behind concatenations, at the stem, and behind whatever else has unknown moments there is no
  prior.

The board belongs to one forward pass: it is cleared before and after each call of the model, and
never copied or saved. It holds no tensor of the model, and no layer holds another normaliser, so
that deepcopy, pickle and ``state_dict`` work as for any model. Layers called more than once have a
prior if it is the same at each call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from normlab.norms.kalman_filter import Posterior, add_moments
from normlab.norms.kalman_path import ChannelPads, DataPath, Node
from normlab.norms.kalman_propagation import check_propagation, propagate
from normlab.surgery.flow import trace_flow


class KalmanChain:
    """The board on which the normalisers of one model post and find moments."""

    def __init__(self, nodes: Iterable[Node], propagation: Any = "analytic") -> None:
        self.nodes = tuple(nodes)
        self.propagation = propagation
        self.values: dict[int, Posterior] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "values": {}}

    def post(self, node: int, moments: Posterior) -> None:
        """Take the moments of a node, in place of those of an earlier call."""
        if node in self.values:
            for other in list(self.values):
                if other > node and self.nodes[other].inputs:
                    del self.values[other]
        self.values[node] = moments

    def moments(self, node: int) -> Posterior | None:
        """Return the moments of a node; None where a normaliser in front was not called."""
        if node not in self.values:
            found = self.nodes[node]
            inputs = [self.moments(one) for one in found.inputs]
            known = [one for one in inputs if one is not None]
            if not known or len(known) < len(inputs):
                return None
            if found.layers:
                self.values[node] = propagate(
                    known[0], found.layers, propagation=self.propagation, space=found.space or ()
                )
            else:
                self.values[node] = add_moments(known, found.pads)
        return self.values[node]

    def clear(self, *_: Any) -> None:
        """Forget the forward pass; any arguments are taken, so that it serves as a hook."""
        self.values.clear()


class ChainedNorm(nn.Module):
    """A Kalman normaliser in a model: finds its prior on the board, and returns ``y`` alone.

    Args:
        norm: Maps ``(x, prior)`` to ``(y, posterior)``.
        chain: The model's board.
        prior: The node of its prior; None for a layer without.
        posterior: The node of its posterior; None if nobody asks for it.
        output: The node of its output's moments, which ``norm.output_moments()`` returns; None if
            nobody asks for them.
    """

    def __init__(
        self,
        norm: Any,
        chain: KalmanChain,
        prior: int | None = None,
        posterior: int | None = None,
        output: int | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm
        self._chain = chain
        self._prior, self._posterior, self._output = prior, posterior, output

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``(N, C, *)``."""
        prior = None
        if self._prior is not None and self.norm.training:
            prior = self._chain.moments(self._prior)
        y, posterior = self.norm(x, prior)
        if self._posterior is not None:
            self._chain.post(self._posterior, posterior)
        if self._output is not None:
            self._chain.post(self._output, self.norm.output_moments())
        return y

    def extra_repr(self) -> str:
        """Return whether the layer has a prior, for ``print``."""
        return f"has_prior={self._prior is not None}"


class ChainPlan:
    """Which normaliser takes its prior from where; made before anything is changed.

    Args:
        model: The model, run once in evaluation mode.
        example: Two of its inputs.
        norms: The normalisers to be chained.
        operation: The name of the method that asks, for messages.
        transition: ``"linear"`` or ``"propagate"``.
        propagation: As in `propagate`.
        apply_affine: Whether propagation starts from what scale and shift make of normalised
            features; else from the posterior, before normalisation.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        norms: Iterable[nn.Module],
        operation: str,
        *,
        transition: str = "linear",
        propagation: str = "analytic",
        apply_affine: bool = True,
    ) -> None:
        check_propagation(operation, propagation)
        with ChannelPads() as pads:
            flow = trace_flow(model, example)
        self.flow = flow
        path = DataPath(flow, set(norms), pads.seen, transition == "propagate", apply_affine)
        self._priors = path.priors()
        asked = path.needed(self._priors.values())
        self._posted = {key: node for key, node in path.posted.items() if node in asked}
        self.chain = KalmanChain(path.nodes, propagation)

    def prior_features(self, norm: nn.Module) -> int:
        """Return the number of channels of a normaliser's prior; 0 where it has none."""
        node = self._priors.get(norm)
        return 0 if node is None else self.chain.nodes[node].channels

    def chained(self, old: nn.Module, new: nn.Module) -> ChainedNorm:
        """Return ``new`` as the layer that takes the place of ``old`` in the model."""
        return ChainedNorm(
            new,
            self.chain,
            prior=self._priors.get(old),
            posterior=self._posted.get((old, False)),
            output=self._posted.get((old, True)),
        )

    def start(self, model: nn.Module) -> nn.Module:
        """Let each call of ``model`` be a forward pass of its own; returns ``model``."""
        model.register_forward_pre_hook(self.chain.clear)
        model.register_forward_hook(self.chain.clear, always_call=True)
        return model
