"""Learning-rate schedules: the factor on the base rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "steps"]


def rate_factor(step: int, total_steps: int, schedule: Schedule, warmup_steps: int = 0) -> float:
    """Return what the base learning rate is multiplied by at one step.

    Args:
        step: The step about to be taken, from 0.
        total_steps: The number of steps planned, at least 1.
        schedule: ``"constant"``; ``"cosine"`` falls from 1 to 0; ``"steps"`` divides by ten after
            half and after three quarters of the steps.
        warmup_steps: The rate rises linearly over so many steps first.

    Returns:
        A number from 0 to 1.

    Example:
        >>> [rate_factor(step, 100, "steps") for step in (0, 49, 50, 75)]
        [1.0, 1.0, 0.1, 0.01]
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    if schedule == "steps":
        return 1.0 if share < 0.5 else 0.1 if share < 0.75 else 0.01
    return 1.0
