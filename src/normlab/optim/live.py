"""One helper of a kind on an optimiser, which goes on from what a checkpoint left.

What acts on an optimiser keeps its progress in ``param_groups[0]``, so that ``state_dict`` holds
it. The entry alone does not tell whether anything acts: it stands there after ``load_state_dict``
and on copies, which torch makes without hooks.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from normlab.optim.wrapper import unwrapped

_LIVE: WeakKeyDictionary[torch.optim.Optimizer, WeakValueDictionary[str, Any]] = WeakKeyDictionary()
"""What acts on which optimiser, by the key of its progress."""


def go_live(helper: Any, optimizer: torch.optim.Optimizer, key: str) -> Any:
    """Note that a helper acts on an optimiser.

    Args:
        helper: What acts; no longer noted once nothing holds it, or after `retire`.
        optimizer: The optimiser, or a wrapper around it.
        key: The entry of the first group under which the helper keeps its progress.

    Returns:
        The progress that stands there already, from a checkpoint or on a copy; None without any.

    Raises:
        ValueError: Another helper with this key acts on the optimiser.

    Example:
        >>> class Counter:
        ...     pass
        >>> optimizer = torch.optim.SGD([torch.zeros(1)])
        >>> first = Counter()
        >>> print(go_live(first, optimizer, "counter"))
        None
        >>> go_live(Counter(), optimizer, "counter")
        Traceback (most recent call last):
            ...
        ValueError: Counter(optimizer): expected an optimiser without a Counter, got SGD with \
one; keep the first, or remove it
    """
    acting = _LIVE.setdefault(unwrapped(optimizer)[-1], WeakValueDictionary())
    name, kind = type(helper).__name__, type(optimizer).__name__
    if acting.get(key) is not None:
        raise ValueError(
            f"{name}(optimizer): expected an optimiser without a {name}, got {kind} with one; "
            "keep the first, or remove it"
        )
    acting[key] = helper
    return optimizer.param_groups[0].get(key)


def retire(optimizer: torch.optim.Optimizer, key: str) -> None:
    """Note that a helper acts no longer, and drop its progress."""
    _LIVE.get(unwrapped(optimizer)[-1], {}).pop(key, None)
    optimizer.param_groups[0].pop(key, None)
