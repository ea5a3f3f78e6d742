"""The ways on which a residual branch leads from its fork to its end, and the layers on them."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from torch import nn

from normlab.surgery.tensor_graph import Node

# A branch that starts at zero must end at zero, and still learn.
_NOT_KEEPING_ZERO = ("sigmoid", "softmax", "softplus")
_ONE_AT_ZERO = ("exp", "logsumexp", "cos", "rsub")
_FLAT_AT_ZERO = ("relu", "relu6", "threshold")


def meet(terms: Sequence[Node]) -> tuple[Node | None, list[Node]]:
    """Return the last node that all terms come from, and what lies behind it, latest first."""
    everyone = (1 << len(terms)) - 1
    masks = dict.fromkeys(terms, 0)
    for bit, term in enumerate(terms):
        masks[term] |= 1 << bit
    heap = [(-node.index, node) for node in masks]
    heapq.heapify(heap)
    between = []
    while heap:
        node = heapq.heappop(heap)[1]
        if masks[node] == everyone:
            return node, between
        between.append(node)
        for source in node.main:
            if source not in masks:
                masks[source] = 0
                heapq.heappush(heap, (-source.index, source))
            masks[source] |= masks[node]
    return None, []


class Ways:
    """The ways from a fork to the terms of a sum."""

    def __init__(self, fork: Node, between: list[Node]) -> None:
        self.fork = fork
        # How often each layer's weight is multiplied in; ways beside the fork do not count.
        self.weights: dict[Node, Counter[nn.Module | str]] = {fork: Counter()}
        for node in reversed(between):
            ways = [self.weights[source] for source in node.main if source in self.weights]
            if not ways:
                continue
            if node.kind == "product":
                weights = sum(ways, Counter())
            else:
                weights = max(ways, key=lambda way: sum(way.values()))
            if node.kind == "weight" and node.module is not None:
                own = 4 if isinstance(node.module, nn.MultiheadAttention) else 1
                weights = weights.copy()
                weights[node.module] += own
            if node.loose:
                weights = weights + Counter(node.loose)
            self.weights[node] = weights

    def _back(self, term: Node, stop: Callable[[Node], bool]) -> list[Node]:
        """Return the nodes from which ``term`` was made, itself included, back to the fork."""
        seen, stack = {term}, [term]
        while stack:
            node = stack.pop()
            sources = [] if node is self.fork or stop(node) else self._sources(node)
            stack += [one for one in sources if one not in seen]
            seen.update(sources)
        return sorted(seen, key=lambda node: node.index)

    def _sources(self, node: Node) -> list[Node]:
        return [source for source in node.main if source in self.weights]

    def layers(self, term: Node) -> list[nn.Module]:
        """Return the weight layers on the ways to ``term``, in order, each once."""
        if term not in self.weights:
            return []
        back = self._back(term, lambda node: False)
        found = [n.module for n in back if n.kind == "weight" and n is not self.fork and n.module]
        return list(dict.fromkeys(found))

    def loose(self, term: Node) -> str:
        """Return where a weight is used on the ways to ``term`` without its layer, or nothing."""
        back = self._back(term, lambda node: False) if term in self.weights else []
        return next((_loose(node) for node in back if node.loose and node is not self.fork), "")

    def ends(
        self, term: Node, among: Collection[nn.Module] | None = None
    ) -> tuple[list[nn.Module], str]:
        """Return the layers which, when zero, make ``term`` zero, or the reason why none do.

        Args:
            term: A term of the sum.
            among: The only layers that may be zero; None for any.
        """
        found, stack, seen = [], [term], {term}
        while stack:
            node = stack.pop()
            why = self._obstacle(node, among)
            if why:
                return [], why
            if node.kind == "weight":
                found.append(node.module)
                continue
            sources = self._sources(node)
            if node.kind == "product" and len(set(sources)) > 1:
                layers, why = self._ends_of_product(node, sources, among)
                if why:
                    return [], why
                found += reversed(layers)
                continue
            stack += [one for one in sources if one not in seen]
            seen.update(sources)
        return list(dict.fromkeys(reversed(found))), ""

    def _ends_of_product(
        self, node: Node, factors: list[Node], among: Collection[nn.Module] | None
    ) -> tuple[list[nn.Module], str]:
        """One factor that is zero is enough, except in attention: there it must be the value."""
        reason = ""
        weighed = [one for one in dict.fromkeys(factors) if self.weights[one].total()] or factors
        if node.operation == "scaled_dot_product_attention":
            weighed = weighed[-1:]
        for factor in reversed(weighed):
            layers, why = self.ends(factor, among)
            if not why:
                return layers, ""
            reason = reason or why
        return [], reason

    def _obstacle(self, node: Node, among: Collection[nn.Module] | None) -> str:
        if node is self.fork:
            return "of a branch in which a way without any weight layer leads to its end"
        if node.loose:
            return f"of a branch that ends in {_loose(node)}"
        word = node.operation or type(node.module).__name__.lower()
        if node.kind == "weight":
            barred = among is not None and node.module not in among
            return f"of a branch that ends in {node.name}" if barred else ""
        if word in _ONE_AT_ZERO or any(part in word for part in _NOT_KEEPING_ZERO):
            return f"of a branch that ends in {node}, which does not map zero to zero"
        if word.rstrip("_") in _FLAT_AT_ZERO:
            return f"of a branch that ends in {node}, which lets no gradient pass at zero"
        return ""


def _loose(node: Node) -> str:
    return f"{node}, which uses {node.loose[0]} though its layer is not called"
