r"""Merge batch normalisation into weight layers of a program that ``torch.export`` made.

The graph says who uses what, so nothing has to be run. Programs are understood as
``torch.export.export`` gives them and after ``run_decompositions``.

Departs:
    - Linear layers take a BatchNorm in as convolutions do; torch's own fusions of exported graphs
      know convolutions only.
    - Graphs within a graph (the branches of ``torch.cond``) are left as they are.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

from normlab.method import Unsuitable
from normlab.surgery.fold import Folded
from normlab.surgery.merge import (
    affine_map,
    merge_norm_after,
    merge_norm_before,
    shift_is_uniform,
)

_aten = torch.ops.aten
_NORMS = {
    _aten.batch_norm.default,
    _aten.native_batch_norm.default,
    _aten._native_batch_norm_legit.default,
    _aten._native_batch_norm_legit.no_stats,
    _aten._native_batch_norm_legit_functional.default,
    _aten._native_batch_norm_legit_no_training.default,
}
_CONVOLUTIONS = {
    _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default,
    _aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding,
    _aten.convolution.default,
}  # fmt: skip
_TRANSPOSED = {
    _aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input,
}  # fmt: skip
_TURNED = {_aten.permute.default, _aten.t.default, _aten.transpose.int}


class FoldedProgram(NamedTuple):
    """The new program, and what was folded and skipped by name."""

    program: ExportedProgram
    report: Folded


def fold_exported(program: ExportedProgram) -> FoldedProgram:
    r"""Return a program whose linear and convolutional weights hold its batch normalisation.

    The equations and the order of preference are those of `fold_batch_norms`.

    Args:
        program: What ``torch.export.export(model.eval(), ...)`` returned, or its
            ``run_decompositions()``; it is not changed. Weights untouched by folding are shared.

    Returns:
        The new program, without the folded layers' parameters and buffers, and the report.

    Raises:
        Unsuitable: The program has no batch normalisation.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()).eval()
        >>> program = torch.export.export(model, (torch.zeros(2, 4),))
        >>> folded, report = fold_exported(program)
        >>> print(report)
        1  folded into '0' before it
        >>> sorted(folded.state_dict)
        ['0.bias', '0.weight']
    """
    draft = _Draft(program)
    norms = draft.norms()
    if not norms:
        raise Unsuitable(
            "fold_exported(program): expected a program with batch normalisation, got one "
            "without any; leave folding out"
        )
    folded: dict[str, str] = {}
    skipped: dict[str, str] = {}
    # A normaliser in front of another one is next to the layer only once that one is gone.
    while norms:
        skipped = {}
        for name, node in norms.items():
            where, reason = draft.fold(node)
            (folded if where else skipped)[name] = where or reason
        if len(skipped) == len(norms):
            break
        norms = {name: norms[name] for name in skipped}
    return FoldedProgram(draft.finish(), Folded(folded, skipped))


@dataclass(frozen=True)
class _Layer:
    """One weight layer: its node, the inputs that hold its weights, and its layout."""

    node: Node
    name: str
    input: Node
    weight: Node
    bias: Node | None
    groups: int
    transposed: bool
    uniform: bool


class _Draft:
    """A program's parts, copied to be changed."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.module: GraphModule = copy.deepcopy(program.graph_module)
        self.graph = self.module.graph
        # A copy renames inputs that are called like a builtin, and the signature goes by name.
        for old, new in zip(program.graph.nodes, self.graph.nodes, strict=True):
            new.name = old.name
        self.signature = copy.deepcopy(program.graph_signature)
        self.state_dict = dict(program.state_dict)
        self.constants = dict(program.constants)
        specs = self.signature.input_specs
        self.targets = {_name(spec): spec.target for spec in specs if spec.target is not None}

    def norms(self) -> dict[str, Node]:
        """Return the nodes that normalise, by the name of their layer."""
        found: dict[str, Node] = {}
        for node in self.graph.nodes:
            if node.target in _NORMS:
                mean = _arguments(node).get("running_mean")
                name = (self._target(mean) or f"{node.name}.").rpartition(".")[0]
                found[f"{name} ({node.name})" if name in found else name] = node
        return found

    def fold(self, node: Node) -> tuple[str, str]:
        """Fold one normaliser; return where it went or ``""``, and the reason if it did not."""
        values = _arguments(node)
        if values.get("training", False):
            return "", "it was exported in training mode: export model.eval()"
        if values.get("running_mean") is None:
            return "", "it has no running statistics"
        fixed = ["running_mean", "running_var", "weight", "bias"]
        tensors = [None if values[key] is None else self._tensor(values[key]) for key in fixed]
        if any(
            t is None and values[key] is not None for t, key in zip(tensors, fixed, strict=True)
        ):
            return "", "its statistics or parameters are computed in the graph"
        output = _output(node)
        if output is None:
            return "", "its statistics are used, too"
        scale, shift = affine_map(tensors[0], tensors[1], tensors[2], tensors[3], values["eps"])

        before = self._layer_before(node, values["input"])
        if isinstance(before, _Layer):
            if self._store(before, merge_norm_after, scale, shift):
                self._remove(node, output, before.node)
                return f"into {before.name!r} before it", ""
            before = f"the weights of {before.name!r} would not be finite"
        after = self._layer_after(output, shift)
        if isinstance(after, _Layer):
            if self._store(after, merge_norm_before, scale, shift):
                self._remove(node, output, values["input"])
                return f"into {after.name!r} after it", ""
            after = f"the weights of {after.name!r} would not be finite"
        return "", f"{before}, and {after}"

    def finish(self) -> ExportedProgram:
        """Return the changed program."""
        self.graph.lint()
        self.module.recompile()
        return ExportedProgram(
            root=self.module,
            graph=self.graph,
            graph_signature=self.signature,
            state_dict=self.state_dict,
            range_constraints=copy.deepcopy(self.program.range_constraints),
            module_call_graph=copy.deepcopy(self.program.module_call_graph),
            example_inputs=self.program.example_inputs,
            constants=self.constants,
            verifiers=self.program.verifiers,
        )

    def _layer_before(self, norm: Node, made: Node) -> _Layer | str:
        layer = self._layer(made)
        if layer is None:
            return f"{_describe(made)} makes its input"
        others = [user for user in made.users if user is not norm]
        if others:
            return f"{_describe(others[0])} takes the output of {layer.name!r}, too"
        return self._unfit(layer, made, norm) or layer

    def _layer_after(self, output: Node, shift: Tensor) -> _Layer | str:
        users = list(output.users)
        layer = self._layer(users[0]) if len(users) == 1 else None
        if layer is None or layer.input is not output:
            return (
                f"{_describe(users[0])} takes its output" if users else "nothing takes its output"
            )
        unfit = self._unfit(layer, layer.input, layer.node)
        if unfit is None and shift.any() and not layer.uniform:
            unfit = f"at the borders of {layer.name!r} its shift would differ"
        return unfit or layer

    def _unfit(self, layer: _Layer, beside: Node, other: Node) -> str | None:
        """Return why a layer's weights cannot be changed, or None.

        Args:
            layer: The layer.
            beside: The tensor between the layer and the normaliser.
            other: A node whose output has another dtype where the graph works in mixed precision.
        """
        for held in (layer.weight, layer.bias):
            if held is not None and (len(held.users) != 1 or self._tensor(held) is None):
                return f"{layer.name!r} shares a parameter, or computes it in the graph"
        # The weight, turned or not, must reach this layer only.
        if any(user is not layer.node and len(user.users) != 1 for user in layer.weight.users):
            return f"{layer.name!r} shares a parameter"
        if beside.meta["val"].dim() != layer.weight.meta["val"].dim():
            return f"its channels are not those of {layer.name!r}"
        if _dtype(other) != beside.meta["val"].dtype:
            return f"its precision is not that of {layer.name!r}"
        return None

    def _layer(self, node: Node) -> _Layer | None:
        if node.op != "call_function":
            return None
        values = _arguments(node)
        groups, uniform = 1, True
        transposed = node.target in _TRANSPOSED or values.get("transposed", False)
        if node.target in _CONVOLUTIONS | _TRANSPOSED:
            source, weight, bias = values["input"], values["weight"], values["bias"]
            groups = values["groups"]
            kernel = weight.meta["val"].shape[2:]
            output_padding = values.get("output_padding", [0])
            uniform = shift_is_uniform(
                kernel, values["stride"], values["padding"], output_padding, transposed
            )
        elif node.target is _aten.linear.default:
            source, weight, bias = values["input"], values["weight"], values["bias"]
        elif node.target is _aten.addmm.default and values["alpha"] == values["beta"] == 1:
            source, weight, bias = values["mat1"], values["mat2"], values["self"]
        elif node.target is _aten.mm.default:
            source, weight, bias = values["self"], values["mat2"], None
        else:
            return None
        if node.target in (_aten.addmm.default, _aten.mm.default):
            if weight.target not in _TURNED:
                return None
            weight = weight.args[0]
        name = (self._target(weight) or f"{node.name}.").rpartition(".")[0]
        return _Layer(node, name, source, weight, bias, groups, transposed, uniform)

    def _store(self, layer: _Layer, merge: Any, scale: Tensor, shift: Tensor) -> bool:
        """Hold merged weights; False, with nothing changed, if they overflow their dtype."""
        old, old_bias = self._tensor(layer.weight), layer.bias and self._tensor(layer.bias)
        assert old is not None
        layout = {"groups": layer.groups, "transposed": layer.transposed}
        new = [x if x is None else x.to(old) for x in merge(old, old_bias, scale, shift, **layout)]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in new if tensor is not None):
            return False
        weight, bias = new
        assert weight is not None
        self._hold(layer.weight, _like(weight, old))
        if bias is not None:
            self._hold(layer.bias or self._add_bias(layer, bias), _like(bias, old))
        return True

    def _hold(self, node: Node, tensor: Tensor) -> None:
        target = self._target(node)
        assert target is not None
        (self.state_dict if target in self.state_dict else self.constants)[target] = tensor

    def _add_bias(self, layer: _Layer, bias: Tensor) -> Node:
        """Give the program one more parameter, and the layer the input that holds it."""
        weight_name = self._target(layer.weight)
        assert weight_name is not None
        name = f"{weight_name.rpartition('.')[0]}.bias".removeprefix(".")
        while name in self.state_dict or name in self.constants:
            name += "_"
        with self.graph.inserting_after(layer.weight):
            node = self.graph.placeholder(f"p_{name.replace('.', '_')}")
        node.target = node.name
        node.meta["val"] = layer.weight.meta["val"].new_empty(bias.shape)
        self.state_dict[name] = bias
        self.targets[node.name] = name
        specs = self.signature.input_specs
        place = next(i for i, spec in enumerate(specs) if _name(spec) == layer.weight.name)
        argument = TensorArgument(name=node.name)
        specs.insert(place + 1, InputSpec(InputKind.PARAMETER, argument, target=name))
        if layer.node.target is _aten.mm.default:
            layer.node.target = _aten.addmm.default
            layer.node.args = (node, *layer.node.args)
        else:
            values = {**_arguments(layer.node), "bias": node}
            layer.node.args = tuple(values.values())
            layer.node.kwargs = {}
        return node

    def _remove(self, norm: Node, output: Node, instead: Node) -> None:
        for spec in self.signature.output_specs:
            if _name(spec) == output.name:
                spec.arg = TensorArgument(name=instead.name)
        output.replace_all_uses_with(instead)
        held = [node for node in norm.all_input_nodes if node.op == "placeholder"]
        mean = _arguments(norm)["running_mean"]
        for node in [*norm.users, norm]:
            self.graph.erase_node(node)
        prefix = (self._target(mean) or "").removesuffix("running_mean")
        counter = f"{prefix}num_batches_tracked"
        inputs = self.graph.find_nodes(op="placeholder")
        held += [node for node in inputs if self._target(node) == counter]
        for node in held:
            target = self._target(node)
            if target is not None and not node.users:
                specs = self.signature.input_specs
                specs[:] = [spec for spec in specs if _name(spec) != node.name]
                self.graph.erase_node(node)
                del self.targets[node.name]
                if all(spec.target != target for spec in specs):
                    self.state_dict.pop(target, None)
                    self.constants.pop(target, None)

    def _target(self, node: Any) -> str | None:
        """Return the qualified name of what an input of the graph holds; None for the user's."""
        return self.targets.get(node.name) if isinstance(node, Node) else None

    def _tensor(self, node: Any) -> Tensor | None:
        target = self._target(node)
        held = self.state_dict.get(target, self.constants.get(target)) if target else None
        return held if isinstance(held, Tensor) else None


def _arguments(node: Node) -> dict[str, Any]:
    """Return an operation's arguments by name, in order, with the defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    declared = node.target._schema.arguments
    values = {one.name: one.default_value for one in declared}
    values.update(zip(values, node.args, strict=False))
    return {**values, **node.kwargs}


def _output(norm: Node) -> Node | None:
    """Return the node of the normalised tensor; None where the other results are used."""
    if norm.target is _aten.batch_norm.default:
        return norm
    taken = {user.args[1]: user for user in norm.users if user.target is operator.getitem}
    only_first = all(not user.users for place, user in taken.items() if place != 0)
    return taken.get(0) if only_first and len(taken) == len(norm.users) else None


def _describe(node: Node) -> str:
    if node.op == "placeholder":
        return "the user"
    return "the program" if node.op == "output" else repr(node.name)


def _dtype(node: Node) -> Any:
    value = node.meta["val"]
    return (value[0] if isinstance(value, (tuple, list)) else value).dtype


def _like(tensor: Tensor, old: Tensor) -> Tensor:
    return nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor


def _name(spec: Any) -> str | None:
    return getattr(spec.arg, "name", None)
