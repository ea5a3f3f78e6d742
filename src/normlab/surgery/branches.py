"""Find the residual branches of any network from the tensors of one forward pass.

An addition closes a residual branch where its terms come from one common tensor, the fork, and one
of them came the short way: it is the fork itself, or what pools, pads, activations and at most one
weight layer (a projection) made of it, while the others went through more weight layers. Names and
classes play no part, so that activations may stand before or after the addition, and be functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from normlab.method import Unsuitable
from normlab.surgery.branch_finder import Branch, Finder
from normlab.surgery.named_branches import closing_of
from normlab.surgery.tensor_graph import TensorGraph, trace_graph

__all__ = ["Branch", "BranchPlan", "plan_branches"]


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
        inputs: What the model was given then.
    """

    branches: tuple[Branch, ...]
    outside: dict[str, nn.Module]
    heads: dict[str, nn.Module]
    beside: dict[str, nn.Module]
    norms: dict[str, nn.Module]
    graph: TensorGraph = field(repr=False, compare=False)
    inputs: tuple[Any, ...] = field(default=(), repr=False, compare=False)

    @property
    def unheld(self) -> tuple[str, ...]:
        """Names of weights that the pass used but no layer of the plan holds.

        They were handed to a function, belong to a recurrent layer, or to layers that the (first)
        output does not come from. Nobody changes them.
        """
        parts = (self.outside, self.heads, self.beside)
        layers = [layer for part in parts for layer in part.values()]
        layers += [layer for branch in self.branches for layer in branch.layers]
        held = {
            f"{self.graph.names[x]}.{name}".lstrip(".") for x in layers for name in x._parameters
        }
        return tuple(name for name in self.graph.loose if name not in held)

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
        return replace(self, **_around(self.graph, kept, self.heads))

    def with_branch(self, branch: Branch) -> BranchPlan:
        """Return the plan with one more branch, or with another one of the same name.

        Raises:
            ValueError: A layer is not one of the model's weight layers, lies in another branch or
                in no branch at all, or the last layers do not make the branch zero.
        """
        kept = tuple(one for one in self.branches if one.name != branch.name)
        ended = closing_of(self.graph, branch, kept, "with_branch")
        if ended is not None:
            ended[0].main = ended[1]
        return replace(self, **_around(self.graph, (*kept, branch), self.heads))

    def keep_norm(self, name: str) -> BranchPlan:
        """Return the plan with a normaliser that stays.

        Raises:
            ValueError: There is none of that name, or it stands between the last layer of a branch
                and the addition, where it would normalise zeros.
        """
        if name not in self.norms:
            raise ValueError(
                f"keep_norm({name!r}): expected the name of a normaliser, got {name!r}; "
                f"the normalisers are {', '.join(self.norms) or 'none'}"
            )
        ends = {layer: branch.name for branch in self.branches for layer in branch.last}
        stack = [node for node in self.graph.nodes if node.module is self.norms[name]]
        while stack:
            node = stack.pop()
            if node.kind == "weight" and node.module in ends:
                raise ValueError(
                    f"keep_norm({name!r}): expected a normaliser that does not end a branch, got "
                    f"one behind the last layer of {ends[node.module]}, which starts at zero; let "
                    "it go"
                )
            stack += [] if node.kind in ("weight", "sum") else node.main
        return replace(self, norms={n: norm for n, norm in self.norms.items() if n != name})

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
            ("weights of no layer here, left as they are", self.unheld),
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
        ValueError: A named branch is none, as `BranchPlan.with_branch` tells.

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
        weights of no layer here, left as they are: none
        normalisers that go (0): none
    """
    graph = trace_graph(model, *inputs)
    modules = set(graph.norms.values())
    for node in graph.nodes:
        if node.kind == "weight":
            assert node.module is not None
            if nn.utils.parametrize.is_parametrized(node.module):
                raise Unsuitable(
                    f"{operation}(model): expected plain weights, got {node.name} with a "
                    "re-parametrisation; remove it first"
                )
        elif node.kind == "norm" and node.module not in modules:
            raise Unsuitable(
                f"{operation}(model): expected normalisers that are modules, got {node}; write "
                "it as a module, so that it can be taken out"
            )
    finder = Finder(graph, operation)
    if branches is not None:
        finder.find(strict=False)
        found = _named(finder, model, branches)
    else:
        found = finder.find()
    if not found and branches is None:
        raise Unsuitable(
            f"{operation}(model): expected a ResNet with residual blocks or another network with "
            f"residual branches, got {type(model).__name__} without any ({finder.reason()}); use "
            "a residual network"
        )
    parts = _around(graph, tuple(found), finder.heads())
    return BranchPlan(norms=graph.norms, graph=graph, inputs=inputs, **parts)


def _named(
    finder: Finder, model: nn.Module, branches: Iterable[tuple[str, Sequence[str]]]
) -> list[Branch]:
    modules = dict(model.named_modules())
    made: list[Branch] = []
    for name, layers in branches:
        unknown = [layer for layer in layers if layer not in modules]
        if unknown:
            raise ValueError(
                f"plan_branches(branches=[({name!r}, ...)]): expected names of weight layers, got "
                f"{unknown[0]!r}; take them from model.named_modules()"
            )
        if name in [branch.name for branch in made]:
            raise ValueError(
                f"plan_branches(branches=[({name!r}, ...)]): expected a name of its own for each "
                f"branch, got {name!r} twice; rename one"
            )
        branch = Branch(name, tuple(modules[layer] for layer in layers))
        ended = closing_of(finder.graph, branch, made, "plan_branches")
        if ended is not None and ended[0] not in finder.closing:
            finder.close(*ended)
        made.append(branch)
    finder.found = made
    return made


def _around(
    graph: TensorGraph, branches: tuple[Branch, ...], heads: dict[str, nn.Module]
) -> dict[str, Any]:
    """Return the branches and the weight layers around them."""
    inside = {layer for branch in branches for layer in branch.layers} | set(heads.values())
    weights = [node for node in graph.nodes if node.kind == "weight" and node.module not in inside]
    names = graph.names
    main = {n.module: names[n.module] for n in weights if n.module and not n.beside}
    side = {n.module: names[n.module] for n in weights if n.module and n.beside}
    return {
        "branches": branches,
        "outside": {name: module for module, name in main.items()},
        "heads": heads,
        "beside": {name: module for module, name in side.items() if module not in main},
    }
