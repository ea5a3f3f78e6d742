"""What a surgery touched and what it left: the difference between a snapshot and the model now."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normlab.surgery.normalisers import Normaliser
from normlab.surgery.snapshot import Snapshot


@dataclass(frozen=True)
class Change:
    """One place of a model that a conversion touched.

    Attributes:
        name: The qualified name, ``""`` for the root.
        old: The class that stood there; empty where nothing did.
        new: The class that stands there; empty where nothing does.
        kept: Parameters and buffers that are as they were, by name within the module.
        changed: Those whose values changed.
        added: Those that are new.
        dropped: Those that are gone.
    """

    name: str
    old: str
    new: str
    kept: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The change in one line."""
        what = self.new or "(nothing)"
        if self.old != self.new:
            what = f"{self.old or '(nothing)'} -> {what}"
        parts = [
            f"{word} {', '.join(names)}"
            for word in ("kept", "changed", "added", "dropped")
            if (names := getattr(self, word))
        ]
        return f"{self.name or '(the model)'}: {what}" + (f"; {'; '.join(parts)}" if parts else "")


@dataclass(frozen=True)
class Plan:
    """What a conversion touched and what it left, with reasons.

    Attributes:
        changes: Every place that was touched.
        skipped: Every normaliser that was left, by name, with the reason.
        notes: What the method said about its work.
    """

    changes: tuple[Change, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The plan, one line a place; equal changes are counted together."""
        lines = [*self.notes]
        alike: dict[str, list[str]] = {}
        for change in self.changes:
            alike.setdefault(str(change).partition(": ")[2], []).append(change.name)
        for what, names in alike.items():
            lines.append(f"{_few(names)}: {what}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"left {_few(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines) or "nothing to do"


def _few(names: list[str]) -> str:
    """The first names of a list, and how many there are."""
    shown = [name or "(the model)" for name in names]
    return ", ".join(shown) if len(shown) <= 4 else f"{', '.join(shown[:3])}, ... ({len(shown)})"


def differences(snapshot: Snapshot, converted: nn.Module) -> list[Change]:
    """Return the places at which a module is another one, or holds other values."""
    after = dict(converted.named_modules(remove_duplicate=False))
    changes, beneath = [], []
    for name in list(dict.fromkeys([*snapshot.modules, *after])):
        if any(name.startswith(f"{above}.") or not above for above in beneath):
            continue
        old, new = snapshot.modules.get(name), after.get(name)
        if old is not new:
            beneath.append(name)
            changes.append(_change(snapshot, name, old, new))
        elif old is not None:
            kind = type(old).__name__
            now = _own_tensors(old.__dict__)
            then = _own_tensors(snapshot.attributes_of(old))
            kept, *other = _compare(snapshot, then, now)
            if any(other):
                changes.append(Change(name, kind, kind, kept, *other))
    return changes


def _change(snapshot: Snapshot, name: str, old: nn.Module | None, new: nn.Module | None) -> Change:
    then, now = {}, {}
    for place, module in snapshot.modules.items():
        if old is not None and (place == name or place.startswith(f"{name}." if name else "")):
            own = _own_tensors(snapshot.attributes_of(module))
            inner = place[len(name) :].lstrip(".")
            then.update((f"{inner}.{key}".lstrip("."), tensor) for key, tensor in own.items())
    if new is not None:
        now = {**dict(new.named_parameters()), **dict(new.named_buffers())}
    was, became = ("" if module is None else type(module).__name__ for module in (old, new))
    return Change(name, was, became, *_compare(snapshot, then, now))


def _own_tensors(attributes: dict[str, Any]) -> dict[str, Tensor]:
    both = {**attributes.get("_parameters", {}), **attributes.get("_buffers", {})}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def _compare(
    snapshot: Snapshot, then: dict[str, Tensor], now: dict[str, Tensor]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    kept, changed = [], []
    for name in then.keys() & now.keys():
        values = snapshot.values_of(then[name])
        alike = values is None or (
            values.shape == now[name].shape and torch.equal(values, now[name].to(values))
        )
        (kept if alike else changed).append(name)
    added, dropped = now.keys() - then.keys(), then.keys() - now.keys()
    return tuple(sorted(kept)), tuple(sorted(changed)), tuple(sorted(added)), tuple(sorted(dropped))


def skipped(
    left: dict[str, Normaliser], converted: nn.Module, reasons: dict[str, str]
) -> dict[str, str]:
    """Return the normalisers that are still there, with the reason.

    Args:
        left: The normalisers before, by name.
        converted: The model after.
        reasons: The reasons that are known.
    """
    present = set(converted.modules())
    return {
        name: reasons.get(name) or found.obstacle or "the method leaves it"
        for name, found in left.items()
        if found.module in present
    }
