"""Find the residual branches of any network from the tensors of one forward pass.

An addition closes a residual branch where its terms come from one common tensor, the fork, and one
of them came the short way: it is the fork itself, or what pools, pads, activations and at most one
weight layer (a projection) made of it, while the others went through more weight layers. Names and
classes play no part, so that activations may stand before or after the addition, and be functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from torch import nn

from normlab.method import Unsuitable
from normlab.surgery.branch_ways import Ways, meet
from normlab.surgery.tensor_graph import Node, TensorGraph, is_weight_layer, trace_graph


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
        num_last: How many of the last layers end the branch side by side.
    """

    name: str
    layers: Sequence[nn.Module]
    num_layers: int | None = None
    num_last: int = 1

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


@dataclass(frozen=True)
class BranchPlan:
    """The residual branches of a model and what lies around them.

    Attributes:
        branches: The branches; their number is L.
        outside: The weight layers outside: stem, projections, transitions; by name.
        heads: The readout, the last weight layer; several where outputs are averaged; none where
            the model ends in a residual block.
        beside: The weight layers of side products (squeeze and excitation), which are let be.
        norms: The normalisers, which will go.
        graph: The pass from which this was read.
    """

    branches: tuple[Branch, ...]
    outside: dict[str, nn.Module]
    heads: dict[str, nn.Module]
    beside: dict[str, nn.Module]
    norms: dict[str, nn.Module]
    graph: TensorGraph = field(repr=False, compare=False)

    def without(self, name: str) -> BranchPlan:
        """Return the plan without a branch; its layers lie outside then.

        Raises:
            ValueError: There is no branch of that name.
        """
        gone = [branch for branch in self.branches if branch.name == name]
        if not gone:
            known = ", ".join(branch.name for branch in self.branches)
            raise ValueError(
                f"without({name!r}): expected the name of a branch, got {name!r}; "
                f"the branches are {known or 'none'}"
            )
        kept = tuple(branch for branch in self.branches if branch.name != name)
        return _around(self.graph, kept, self.heads)

    def with_branch(self, branch: Branch) -> BranchPlan:
        """Return the plan with one more branch, or with another one of the same name.

        Raises:
            ValueError: A layer is not one of the model's weight layers, or lies in another branch.
        """
        kept = tuple(one for one in self.branches if one.name != branch.name)
        _check_branch(self.graph, kept, branch)
        return _around(self.graph, (*kept, branch), self.heads)

    def __str__(self) -> str:
        """The plan as a table."""
        names = self.graph.names
        rows = [("branch", "m", "weight layers, the zero ones in brackets")]
        for branch in self.branches:
            layers = [f"[{names[x]}]" if x in branch.last else names[x] for x in branch.layers]
            rows.append((branch.name, str(branch.length), ", ".join(layers)))
        wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{one:<{wide[0]}}  {two:>{wide[1]}}  {three}" for one, two, three in rows]
        plural = "" if len(self.branches) == 1 else "es"
        lines.insert(0, f"{len(self.branches)} residual branch{plural}")
        for title, layers in (
            ("outside", self.outside),
            ("readout", self.heads),
            ("left as they are, beside the path", self.beside),
            (f"normalisers that go ({len(self.norms)})", self.norms),
        ):
            lines.append(f"{title}: {', '.join(layers) or 'none'}")
        return "\n".join(lines)


def plan_branches(
    model: nn.Module,
    *inputs: Any,
    branches: Iterable[tuple[str, Sequence[str]]] | None = None,
    operation: str = "plan_branches",
) -> BranchPlan:
    """Find the residual branches of a model, or take those that the caller names.

    Args:
        model: Any module; nothing in it is changed.
        inputs: What its forward takes; two samples are enough.
        branches: Name and names of the weight layers, in order, of each branch; None to look for
            them.
        operation: The name of the method that asks, for messages.

    Returns:
        The plan; print it to see it.

    Raises:
        Unsuitable: There is no residual branch, an addition whose short path cannot be told, or a
            branch that cannot start at zero; with the addition and the reason.

    Example:
        >>> import torch
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.two(self.one(x).relu())
        >>> print(plan_branches(nn.Sequential(Block(), nn.Linear(4, 2)), torch.zeros(2, 4)))
        1 residual branch
        branch  m  weight layers, the zero ones in brackets
        0       2  0.one, [0.two]
        outside: none
        readout: 1
        left as they are, beside the path: none
        normalisers that go (0): none
    """
    graph = trace_graph(model, *inputs)
    for node in graph.nodes:
        if node.kind == "weight":
            assert node.module is not None
            if nn.utils.parametrize.is_parametrized(node.module):
                raise Unsuitable(
                    f"{operation}(model): expected plain weights, got {node.name} with a "
                    "re-parametrisation; remove it first"
                )
        elif node.kind == "norm" and node.module not in set(graph.norms.values()):
            raise Unsuitable(
                f"{operation}(model): expected normalisers that are modules, got {node}; write "
                "it as a module, so that it can be taken out"
            )
    if branches is not None:
        return _named(graph, model, branches)
    finder = _Finder(graph, operation)
    found = finder.find()
    if not found:
        raise Unsuitable(
            f"{operation}(model): expected a ResNet with residual blocks or another network with "
            f"residual branches, got {type(model).__name__} without any ({finder.reason()}); use "
            "a residual network"
        )
    heads = finder.heads()
    return _around(graph, tuple(_unique_names(found)), heads)


def _named(
    graph: TensorGraph, model: nn.Module, branches: Iterable[tuple[str, Sequence[str]]]
) -> BranchPlan:
    modules = dict(model.named_modules())
    made: list[Branch] = []
    for name, layers in branches:
        unknown = [layer for layer in layers if layer not in modules]
        if unknown or not layers:
            raise ValueError(
                f"plan_branches(branches=[({name!r}, ...)]): expected names of weight layers, got "
                f"{unknown[0] if unknown else 'none'!r}; take them from model.named_modules()"
            )
        branch = Branch(name, tuple(modules[layer] for layer in layers))
        _check_branch(graph, made, branch)
        made.append(branch)
    finder = _Finder(graph, "plan_branches")
    finder.find(strict=False)
    inside = {layer for branch in made for layer in branch.layers}
    heads = {name: head for name, head in finder.heads().items() if head not in inside}
    return _around(graph, tuple(made), heads)


def _check_branch(graph: TensorGraph, others: Iterable[Branch], branch: Branch) -> None:
    taken = {layer: other.name for other in others for layer in other.layers}
    for layer in branch.layers:
        if layer not in graph.names or not is_weight_layer(layer) or layer in taken:
            place = f" of the branch {taken[layer]}" if layer in taken else ""
            name = graph.names.get(layer, "a module of another model")
            raise ValueError(
                f"with_branch({branch.name!r}): expected weight layers of the model that lie in no "
                f"other branch, got {name} ({type(layer).__name__}){place}; name the others only"
            )


def _around(
    graph: TensorGraph, branches: tuple[Branch, ...], heads: dict[str, nn.Module]
) -> BranchPlan:
    inside = {layer for branch in branches for layer in branch.layers} | set(heads.values())
    weights = [node for node in graph.nodes if node.kind == "weight" and node.module not in inside]
    names = graph.names
    main = {n.module: names[n.module] for n in weights if n.module and not n.beside}
    side = {n.module: names[n.module] for n in weights if n.module and n.beside}
    outside = {name: module for module, name in main.items()}
    beside = {name: module for module, name in side.items() if module not in main}
    return BranchPlan(branches, outside, heads, beside, graph.norms, graph)


def _unique_names(branches: list[Branch]) -> list[Branch]:
    seen: Counter[str] = Counter()
    named = []
    for branch in branches:
        seen[branch.name] += 1
        count = seen[branch.name]
        named.append(replace(branch, name=f"{branch.name}#{count}") if count > 1 else branch)
    return named


class _Finder:
    """Goes through the graph in order and decides at each sum what it is."""

    def __init__(self, graph: TensorGraph, operation: str) -> None:
        self.graph = graph
        self.operation = operation
        self.closing: set[Node] = set()
        self.unclear: dict[Node, str] = {}
        self.found: list[Branch] = []

    def find(self, strict: bool = True) -> list[Branch]:
        for node in self.graph.nodes:
            terms = [term for source in node.sources for term in self._terms(source, node)]
            if node.kind == "sum" and len(set(terms)) > 1 and not node.beside:
                self._decide(node, list(dict.fromkeys(terms)))
        # Readouts that are averaged are a sum of which no term is a short path, too.
        for node in self._readout():
            self.unclear.pop(node, None)
        unclear = [(node, why) for node, why in self.unclear.items() if not node.beside]
        if unclear and strict:
            node, why = unclear[0]
            raise Unsuitable(
                f"{self.operation}(model): expected each addition to close a residual branch or "
                f"none, got one {self._place(node)} {why}; name the branches yourself "
                "(plan_branches(model, inputs, branches=...))"
            )
        return self.found

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
        counts = [len(ways.layers(term)) for term in terms]
        if not any(counts):
            return
        short = [term for term in terms if term is fork]
        short += [term for term, n in zip(terms, counts, strict=True) if n == 0]
        if not short and counts.count(1) == 1:
            short = [term for term, n in zip(terms, counts, strict=True) if n == 1]
        if not short:
            each = " and ".join(map(str, counts))
            self.unclear[node] = f"of terms with {each} weight layers, none of them a short path"
            return
        made = []
        for term in terms:
            if term is short[0] or not ways.layers(term):
                continue
            ends, why = ways.ends(term)
            if why:
                self.unclear[node] = why
                return
            layers = [one for one in ways.layers(term) if one not in ends]
            m = sum(ways.weights[term].values())
            made.append(Branch(self._name([*layers, *ends]), (*layers, *ends), m, len(ends)))
        self.found += made
        self.closing.add(node)
        node.main = (short[0],)

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
