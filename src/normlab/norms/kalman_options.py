"""Which options of a Kalman normaliser go together."""

from __future__ import annotations

from typing import Any

MOST_FULL = 64
"""The largest number of channels whose full covariance may be carried."""


def check_options(layer: Any, learn_gain: bool) -> None:
    """Refuse options of a `BatchKalmanNorm` that are out of range.

    Args:
        layer: The layer, with its options set.
        learn_gain: Whether its gain is to be learnt.

    Raises:
        ValueError: With the option's name.
    """

    def check(holds: bool, name: str, value: Any, expected: str, advice: str) -> None:
        if not holds:
            call = f"BatchKalmanNorm({name}={value!r})"
            raise ValueError(f"{call}: expected {expected}, got {value!r}; use {advice}")

    gain, share, ratio = layer.gain, layer.momentum, layer.max_ratio
    valid = share is None or 0 <= share <= 1
    check(valid, "momentum", share, "a number from 0 to 1, or None", "0.1")
    valid = 0 < gain < 1 if learn_gain else 0 <= gain <= 1
    ends = "a number between 0 and 1, ends excluded" if learn_gain else "a number from 0 to 1"
    check(valid, "gain", gain, ends, "0.1 for batches up to 4, else 0.95")
    valid = ratio is None or ratio > 0
    check(valid, "max_ratio", ratio, "a number above 0, or None", "100")
    valid = layer.transition in ("linear", "propagate")
    check(valid, "transition", layer.transition, "'linear' or 'propagate'", "'linear'")
    allowed = ["diagonal"]
    if layer.transition == "linear" and layer.num_features <= MOST_FULL:
        allowed.append("full")
    expected = f"{' or '.join(map(repr, allowed))} for {layer.num_features} channels and a "
    expected += f"{layer.transition} transition"
    check(layer.covariance in allowed, "covariance", layer.covariance, expected, "'diagonal'")
