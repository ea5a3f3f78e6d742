"""Find what the input of a normaliser is made of, back along the data path to the ones before it.

From one pass that `normlab.surgery.flow` traced come the nodes of `normlab.norms.kalman_chain`,
which tells in words what is found behind which layers and functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from normlab.norms.kalman_propagation import AVERAGE_POOLS, MAX_POOLS, can_propagate
from normlab.surgery.flow import Call, Flow, Operation, Source, Sum

_JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack"}
_KEEP_MOMENTS = {
    "flatten", "view", "reshape", "contiguous", "clone", "to", "float", "pad", "__getitem__",
}  # fmt: skip


class Node(NamedTuple):
    """Something in the forward pass whose moments are known, or follow from other nodes.

    Attributes:
        channels: The number of its channels.
        inputs: The nodes it is made of; none for what a normaliser posts.
        pads: For a sum: the zero channels before and after each term.
        layers: For propagated moments: the layers between, in the order of the data path.
        space: The spatial size in front of these layers, as far as the trace showed it.
    """

    channels: int
    inputs: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()
    layers: tuple[nn.Module, ...] = ()
    space: tuple[int, ...] | None = None


class _Found(NamedTuple):
    """A node, and the calls of normalisers that it depends on."""

    node: int
    calls: frozenset[Call]


class DataPath:
    """Finds the node of any tensor of a pass; the same structure gives the same node."""

    def __init__(
        self,
        flow: Flow,
        norms: set[nn.Module],
        pads: dict[tuple[int, int], set[tuple[int, int]]],
        propagating: bool,
        apply_affine: bool,
    ) -> None:
        self.nodes: list[Node] = []
        self.posted: dict[tuple[nn.Module, bool], int] = {}
        self._position = {call: i for i, call in enumerate(flow.calls)}
        self._calls: dict[nn.Module, list[Call]] = {}
        self._takers: dict[Source, Call] = {}
        for call in flow.calls:
            if call.module in norms:
                self._calls.setdefault(call.module, []).append(call)
                self._takers.setdefault(call.source, call)
        self._norms, self._pads = norms, pads
        self._propagating, self._apply_affine = propagating, apply_affine
        self._known: dict[Source, _Found | None] = {None: None}
        self._nodes: dict[Any, int] = {}
        self._made: dict[tuple[nn.Module, torch.Size | None], nn.Module | None] = {}
        self._relu = nn.ReLU()
        # In the order of the pass what lies further back is found already: no deep recursion.
        for call in flow.calls:
            if call.module in norms:
                self._find(call.source)

    def priors(self) -> dict[nn.Module, int]:
        """Return the node of each normaliser's prior, where it is known and the same each time."""
        result = {}
        for norm, calls in self._calls.items():
            nodes = {self._prior(call) for call in calls}
            node = nodes.pop()
            if node is not None and not nodes:
                result[norm] = node
        return result

    def _prior(self, call: Call) -> int | None:
        found = self._find(call.source)
        if found is None:
            return None
        for made in found.calls:
            # The board holds what a layer posted last.
            latest = [one for one in self._calls[made.module] if self._before(one, call)]
            if latest[-1:] != [made]:
                return None
        assert call.input_shape is not None
        fits = self.nodes[found.node].channels == call.input_shape[1]
        return found.node if fits or not self._propagating else None

    def _before(self, one: Call, other: Call) -> bool:
        return self._position[one] < self._position[other]

    def needed(self, nodes: Iterable[int]) -> set[int]:
        """Return the nodes given and all that they are made of."""
        found: set[int] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += self.nodes[node].inputs
        return found

    def _add(self, key: Any, node: Node) -> int:
        if key not in self._nodes:
            self._nodes[key] = len(self.nodes)
            self.nodes.append(node)
        return self._nodes[key]

    def _find(self, source: Source) -> _Found | None:
        if source not in self._known:
            if isinstance(source, Call) and source.module in self._norms:
                self._known[source] = self._post(source, self._propagating and self._apply_affine)
            elif isinstance(source, Call):
                self._known[source] = self._behind_call(source)
            elif isinstance(source, Sum):
                self._known[source] = self._behind_sum(source)
            else:
                assert isinstance(source, Operation)
                self._known[source] = self._behind_operation(source)
        return self._known[source]

    def _post(self, call: Call, output: bool) -> _Found:
        assert call.input_shape is not None
        node = Node(call.input_shape[1], space=tuple(call.input_shape[2:]))
        index = self._add((call.module, output), node)
        self.posted[call.module, output] = index
        return _Found(index, frozenset([call]))

    def _behind_call(self, call: Call) -> _Found | None:
        if not self._propagating:
            holds_norm = any(module in self._norms for module in call.module.modules())
            passes = _takes_one_argument(call.module) and not holds_norm
            return self._find(call.source) if passes else None
        key = (call.module, call.input_shape)
        if key not in self._made:
            self._made[key] = _plain_layer(call)
        layer, base = self._made[key], self._find(call.source)
        if layer is None or base is None:
            return None
        space = None if call.input_shape is None else tuple(call.input_shape[2:])
        return self._carried(base, layer, space)

    def _behind_operation(self, operation: Operation) -> _Found | None:
        given = [source for source in operation.sources if source is not None]
        if operation.name in _JOINS or not given:
            return None
        found = [self._find(source) for source in given]
        first = found[0]
        same = all(
            one is not None and first is not None and one.node == first.node for one in found
        )
        if first is None or not same:
            return None
        calls = frozenset[Call]().union(*(one.calls for one in found if one is not None))
        if not self._propagating:
            return _Found(first.node, calls)
        if operation.name.rstrip("_") == "relu":
            return self._carried(first, self._relu, None)
        keeps = operation.name in _KEEP_MOMENTS or operation.name == "identity"
        return first if keeps else None

    def _behind_sum(self, total: Sum) -> _Found | None:
        terms = [self._term(term, total) for term in total.terms]
        known = [term for term in terms if term is not None]
        if not known or len(known) < len(terms):
            return None
        channels = [self.nodes[term.node].channels for term in known]
        pads = [self._pad(count, max(channels)) for count in channels]
        fitting = [pad for pad in pads if pad is not None]
        if len(fitting) < len(pads):
            return None
        inputs = tuple(term.node for term in known)
        space = next((self.nodes[i].space for i in inputs if self.nodes[i].space), None)
        node = Node(max(channels), inputs, tuple(fitting), space=space)
        index = self._add(("sum", inputs, node.pads), node)
        return _Found(index, frozenset[Call]().union(*(term.calls for term in known)))

    def _term(self, term: Source, total: Sum) -> _Found | None:
        """Return what is known of a term: an earlier normaliser may have measured it itself."""
        taker = None if term is None else self._takers.get(term)
        if taker is not None and self._position[taker] < self._last_call(total):
            return self._post(taker, False)
        return self._find(term)

    def _last_call(self, source: Source) -> int:
        """Return the place of the latest call whose output goes into ``source``; -1 for none."""
        if isinstance(source, Call):
            return self._position[source]
        inputs = source.terms if isinstance(source, Sum) else getattr(source, "sources", ())
        # A sum of sums is as late as its latest term that is a call: enough to be on the safe side.
        return max((self._last_call(one) for one in inputs if not isinstance(one, Sum)), default=-1)

    def _pad(self, channels: int, wanted: int) -> tuple[int, int] | None:
        seen = self._pads.get((channels, wanted), set())
        if channels == wanted:
            return (0, 0)
        if len(seen) == 1:
            return next(iter(seen))
        # Without a pad, something between has more outputs than inputs.
        return None if seen or self._propagating else (0, wanted - channels)

    def _carried(
        self, base: _Found, layer: nn.Module, space: tuple[int, ...] | None
    ) -> _Found | None:
        before = self.nodes[base.node]
        channels = _channels_behind(layer, before.channels)
        if channels is None:
            return None
        inputs, layers = (base.node,), (layer,)
        if before.layers:
            inputs, layers = before.inputs, (*before.layers, layer)
            keeps_space = all(isinstance(one, nn.ReLU) for one in before.layers)
            space = before.space or (space if keeps_space else None)
        else:
            space = before.space or space
        index = self._add(("layers", inputs, layers), Node(channels, inputs, (), layers, space))
        return _Found(index, base.calls)


class ChannelPads(TorchFunctionMode):
    """Sees where zero channels are added, which a trace of the data path does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[int, int], set[tuple[int, int]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is nn.functional.pad:
            x = args[0] if args else kwargs["input"]
            pad = args[1] if len(args) > 1 else kwargs["pad"]
            at = 2 * (x.dim() - 2)
            if len(pad) >= at + 2 and any(pad[at : at + 2]):
                change = (x.shape[1], result.shape[1])
                self.seen.setdefault(change, set()).add((pad[at], pad[at + 1]))
        return result


def _takes_one_argument(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty]
    return len(needed) == 1 and needed[0].kind is not needed[0].VAR_POSITIONAL


def _plain_layer(call: Call) -> nn.Module | None:
    """Return the layer in a form that `propagate` knows; adaptive pools get their window."""
    module, name = call.module, type(call.module).__name__
    if can_propagate(module):
        return module
    if name.startswith(("AdaptiveAvgPool", "AdaptiveMaxPool")) and call.input_shape is not None:
        size = tuple(call.input_shape[2:])
        wanted: Any = module.output_size
        wanted = wanted if isinstance(wanted, tuple) else (wanted,) * len(size)
        wanted = [one if want is None else want for one, want in zip(size, wanted, strict=True)]
        if all(one % want == 0 for one, want in zip(size, wanted, strict=True)):
            pool: Any = (AVERAGE_POOLS if "Avg" in name else MAX_POOLS)[len(size) - 1]
            return pool(tuple(one // want for one, want in zip(size, wanted, strict=True)))
    return None


def _channels_behind(layer: nn.Module, channels: int) -> int | None:
    """Return the number of channels behind a layer, None where its weights do not fit."""
    if isinstance(layer, _ConvNd):
        return layer.out_channels if layer.in_channels == channels else None
    if isinstance(layer, nn.Linear):
        return layer.out_features if layer.in_features % channels == 0 else None
    return channels
