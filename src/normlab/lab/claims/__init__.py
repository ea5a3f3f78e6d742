"""Claims of papers, one a file, each put to the test with thresholds fixed beforehand."""

from __future__ import annotations

from difflib import get_close_matches

from normlab.lab.claims import (
    batch_kalman_norm,
    batch_layer_norm,
    batch_norm,
    batchless_norm,
    bn_init,
    bn_preconditioning,
    cross_iteration_bn,
    elu,
    filter_response_norm,
    fixup,
    fixup_mixup,
    gradinit,
    gradmax,
    ic_layer,
    inception,
    micro_batches,
    recalibration,
    spectral_norm,
    stochastic_depth,
    target_space,
    weight_norm,
    weight_rescaling,
)
from normlab.lab.claims.claim import Claim

CLAIMS: tuple[Claim, ...] = (
    batch_norm.CLAIM,
    ic_layer.CLAIM,
    fixup.CLAIM,
    filter_response_norm.CLAIM,
    weight_rescaling.CLAIM,
    bn_init.CLAIM,
    batch_layer_norm.CLAIM,
    batch_kalman_norm.CLAIM,
    cross_iteration_bn.CLAIM,
    batchless_norm.CLAIM,
    micro_batches.CLAIM,
    recalibration.CLAIM,
    weight_norm.CLAIM,
    bn_preconditioning.CLAIM,
    gradmax.CLAIM,
    fixup_mixup.CLAIM,
    target_space.CLAIM,
    gradinit.CLAIM,
    stochastic_depth.CLAIM,
    spectral_norm.CLAIM,
    elu.CLAIM,
    inception.CLAIM,
)
"""Every claim, once."""


def find_claim(name: str) -> Claim:
    """Return the claim of that name.

    Args:
        name: The name of a claim: that of the method it is about, or of what it is about in it.

    Raises:
        ValueError: An unknown name; the nearest is named.

    Example:
        >>> find_claim("fixup").paper
        'H. Zhang, Y. N. Dauphin, T. Ma, Fixup Initialization: ... 2019, arXiv 1901.09321'
    """
    claims = {claim.name: claim for claim in CLAIMS}
    if name not in claims:
        near = get_close_matches(name, claims, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"reproduce({name!r}): expected one of {', '.join(claims)}, got {name!r}; "
            f"do you mean {near!r}?"
        )
    return claims[name]
