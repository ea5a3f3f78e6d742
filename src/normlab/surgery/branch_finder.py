"""Decide at each sum of a pass whether it closes a residual branch, and of which layers.

The rules stand in `normlab.surgery.branches`, which makes a plan of what is found here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import nn

from normlab.method import Unsuitable
from normlab.surgery.branch_ways import Ways, meet
from normlab.surgery.tensor_graph import Node, TensorGraph


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    Attributes:
        name: For messages, and for `BranchPlan.without`.
        layers: Its weight layers in order: modules with a ``weight``, such as nn.Conv2d and
            nn.Linear, or nn.MultiheadAttention; those of the short path are not among them.
        num_layers: The number m of weights that are multiplied on the way through it, where that
            is not the number of layers: attention has 4 (query, key, value, output), also where
            one layer makes three of them, and of layers side by side the longer way counts. None
            for one a layer, and 4 an nn.MultiheadAttention.
        num_last: How many of the last layers end the branch side by side, at least 1.

    Raises:
        ValueError: ``num_last`` is not between 1 and the number of layers.
    """

    name: str
    layers: Sequence[nn.Module]
    num_layers: int | None = None
    num_last: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.num_last <= max(1, len(self.layers)):
            raise ValueError(
                f"Branch({self.name!r}, num_last={self.num_last}): expected 1 to "
                f"{max(1, len(self.layers))} last layers, got {self.num_last}; a branch that no "
                "layer ends cannot start at zero"
            )

    @property
    def length(self) -> int:
        """The number m of weight layers."""
        if self.num_layers is not None:
            return self.num_layers
        return sum(4 if isinstance(one, nn.MultiheadAttention) else 1 for one in self.layers)

    @property
    def last(self) -> Sequence[nn.Module]:
        """The layers after which no other one comes."""
        return self.layers[len(self.layers) - self.num_last :]


_MIXING = ("lerp", "mean")
_END = "let the branch end in a weight layer, with nothing but norms and gains behind it"
_CALL = "call the layer that holds the weight"
_ADD = "add the branch to the short path as it is"
_NAME = "name the branches yourself (plan_branches(model, inputs, branches=...))"


class Finder:
    """Goes through the graph in order and decides at each sum what it is.

    Args:
        graph: Where a sum closes a branch, its main path will be the short one.
        operation: The name of the method that asks, for messages.
    """

    def __init__(self, graph: TensorGraph, operation: str) -> None:
        self.graph = graph
        self.operation = operation
        self.closing: set[Node] = set()
        self.unclear: dict[Node, tuple[str, str]] = {}
        self.found: list[Branch] = []

    def find(self, strict: bool = True) -> list[Branch]:
        """Return the branches.

        Args:
            strict: Whether sums that cannot be told are refused.

        Raises:
            Unsuitable: There is one, with the reason and what to do.
        """
        constant: set[Node] = set()
        for node in self.graph.nodes:
            if node.operation and constant.issuperset(node.sources):
                constant.add(node)
            given = (source for source in node.sources if source not in constant)
            terms = [term for source in given for term in self._terms(source, node)]
            if node.kind == "sum" and len(set(terms)) > 1 and not node.beside:
                self._decide(node, list(dict.fromkeys(terms)))
        # Readouts that are averaged are a sum of which no term is a short path, too.
        for node in self._readout():
            self.unclear.pop(node, None)
        unclear = [(node, *why) for node, why in self.unclear.items() if not node.beside]
        if unclear and strict:
            node, why, advice = unclear[0]
            raise Unsuitable(
                f"{self.operation}(model): expected each addition to close a residual branch or "
                f"none, got one {self._place(node)} {why}; {advice}"
            )
        return _unique_names(self.found)

    def _terms(self, source: Node, taker: Node) -> tuple[Node, ...]:
        """A sum that could not be told, and that only another sum takes, is a part of that one."""
        if source in self.unclear and source.takers == [taker] and taker.kind == "sum":
            del self.unclear[source]
            return source.sources
        return (source,)

    def _decide(self, node: Node, terms: list[Node]) -> None:
        fork, between = meet(terms)
        if fork is None:
            return
        ways = Ways(fork, between)
        layers = {term: ways.layers(term) for term in terms}
        loose = {term: ways.loose(term) for term in terms}
        if not any(layers.values()) and not any(loose.values()):
            return
        short = [term for term in terms if term is fork]
        short += [term for term in terms if not layers[term] and not loose[term]]
        if node.operation in _MIXING:
            if short:
                self.unclear[node] = f"which mixes both by {node.operation}", _ADD
            return
        if not short:
            one = [term for term in terms if len(layers[term]) == 1 and not loose[term]]
            short = one if len(one) == 1 else []
        if not short:
            each = " and ".join(str(len(layers[term])) for term in terms)
            used = next((place for place in loose.values() if place), "")
            self.unclear[node] = (
                (f"with a term made by {used}", _CALL)
                if used
                else (f"of terms with {each} weight layers, none of them a short path", _NAME)
            )
            return
        made = []
        for term in terms:
            if term is short[0] or (not layers[term] and not loose[term]):
                continue
            ends, why = ways.ends(term)
            if why:
                self.unclear[node] = why, _CALL if loose[term] else _END
                return
            inner = [layer for layer in layers[term] if layer not in ends]
            m = ways.weights[term].total()
            made.append(Branch(self._name([*inner, *ends]), (*inner, *ends), m, len(ends)))
        self.found += made
        self.close(node, (short[0],))

    def close(self, node: Node, short: tuple[Node, ...]) -> None:
        """Take note that a residual branch ends at a sum."""
        self.closing.add(node)
        node.main = short

    def _readout(self) -> list[Node]:
        """Return the last weight layers and what comes behind; none behind a residual branch."""
        seen = [] if self.graph.output is None else [self.graph.output]
        for node in seen:
            if node in self.closing:
                return []
            if node.kind != "weight":
                seen += [one for one in node.main if one not in seen]
        return seen

    def heads(self) -> dict[str, nn.Module]:
        """Return the last weight layers; none where a residual branch ends behind them."""
        inside = {layer for branch in self.found for layer in branch.layers}
        last = [node.module for node in self._readout() if node.kind == "weight" and node.module]
        return {self.graph.names[head]: head for head in last if head not in inside}

    def reason(self) -> str:
        """Why there is no branch."""
        if not any(node.kind == "weight" for node in self.graph.nodes):
            return "no weight layer was seen on the way to its output"
        sums = [n for n in self.graph.nodes if n.kind == "sum" and len(n.sources) > 1]
        if not sums:
            return "nothing is added on the way to its output, so that there is no skip"
        return f"none of its {len(sums)} additions joins a short path with one of weight layers"

    def _name(self, layers: Sequence[nn.Module]) -> str:
        parts = [self.graph.names[layer].split(".") for layer in layers]
        if len(parts) == 1:
            return ".".join(parts[0])
        shared = takewhile(lambda words: len(set(words)) == 1, zip(*parts, strict=False))
        return ".".join(words[0] for words in shared) or "the model"

    def _place(self, node: Node) -> str:
        return f"({' + '.join(str(one) for one in node.sources)})"


def _unique_names(branches: list[Branch]) -> list[Branch]:
    seen: Counter[str] = Counter()
    named = []
    for branch in branches:
        seen[branch.name] += 1
        count = seen[branch.name]
        named.append(replace(branch, name=f"{branch.name}#{count}") if count > 1 else branch)
    return named
