"""Find the weight layer that stands directly before each normaliser and serves nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from normlab.norms.cross_iteration_window import is_weight_layer
from normlab.surgery.flow import Call, Flow, Source, Sum


def pair_with_weight_layers(
    flow: Flow, norms: Mapping[str, nn.Module]
) -> tuple[dict[nn.Module, nn.Module], dict[str, str]]:
    """Return which weight layers and BatchNorms may be joined, and why the others may not.

    Args:
        flow: One pass of the model.
        norms: BatchNorm layers by name.

    Returns:
        Weight layer to BatchNorm; and for each other BatchNorm the reason, by name.
    """
    pairs: dict[nn.Module, nn.Module] = {}
    reasons: dict[str, str] = {}
    for name, norm in norms.items():
        reason, layer = _misfit(flow, norm), flow.predecessor(norm)
        if reason or layer is None:
            reasons[name] = reason
        else:
            pairs[layer] = norm
    return pairs, reasons


def _misfit(flow: Flow, norm: nn.Module) -> str:
    """Return why a BatchNorm cannot be joined with what stands before it, or nothing."""
    before = flow.predecessor(norm)
    if getattr(norm, "running_mean", None) is None:
        return "it has no running statistics"
    if len(flow.of(norm)) != 1:
        return f"it is called {len(flow.of(norm))} times in a pass"
    if before is None or not is_weight_layer(before):
        return "no convolution or linear layer stands directly before it"
    (call, *others) = flow.of(before)
    if others:
        return "the weight layer before it is called more than once"
    if isinstance(before, nn.Linear) and len(call.input_shape or ()) != 2:
        return "the linear layer before it takes more than (N, C)"
    if sum(origin is call for origin in _all_origins(flow)) != 1:
        return "something else uses the output of the weight layer before it, too"
    return ""


def _all_origins(flow: Flow) -> Iterator[Source]:
    """Yield where each input of each call, operation and sum was made, once a use."""
    used: list[Source] = [call.source for call in flow.calls if not _is_container(call)]
    used += [origin for operation in flow.operations for origin in operation.sources]
    sums: set[Sum] = set()
    while used:
        origin = used.pop()
        yield origin
        if isinstance(origin, Sum) and origin not in sums:
            sums.add(origin)
            used += origin.terms


def _is_container(call: Call) -> bool:
    # What is handed to a container is used by what the container holds.
    return any(True for _ in call.module.children())
