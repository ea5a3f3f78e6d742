"""Batch Kalman normalisation at micro-batches does what batch normalisation does at large ones.

Source: G. Wang, J. Peng, P. Luo, X. Wang, L. Lin, "Batch Kalman Normalization: Towards Training
Deep Neural Networks with Micro-Batches", 2018, arXiv 1802.03133.
"""

from __future__ import annotations

from normlab.lab.claims.claim import Claim
from normlab.lab.claims.small_batches import DEPARTS, bounds, part

BOUNDS = bounds(
    "batch Kalman normalisation",
    ahead="The later version reports 3.4 points less error than batch normalisation for ResNet-50 "
    "at batch 4. Small networks of ten classes have less to lose, so the order alone is asked for.",
    near="The paper claims an accuracy comparable to that of batch normalisation at batches 64 "
    "times as large, without a figure that could be read. Two points are less than the 3.4 that it "
    "gains over batch normalisation at batch 4, so that not to do better would not pass there.",
)

CLAIM = Claim(
    name="batch-kalman-norm",
    method="batch-kalman-norm",
    statement="Filtering the statistics of a few samples with a prediction from the layer before "
    "leaves batch normalisation behind at micro-batches, and comes near to what that reaches at "
    "large ones.",
    budget={
        "small": "30 trials of 5,000 samples and 15 searches: about 7 minutes on one core",
        "paper": "25 trials and 15 searches of 100 epochs of CIFAR-10, most in batches of 2 and 4: "
        "weeks on one GPU",
    },
    departs={
        "small": (
            *DEPARTS["small"],
            "Batches of 2 and 4 are held against 32, not against 128; they are whole batches, not "
            "parts of one.",
        ),
        "paper": (
            *DEPARTS["paper"],
            "Batches of 2 and 4 are held against 32, not against 128; they are whole batches, not "
            "parts of one.",
            "100 epochs, not 400.",
        ),
    },
    parts=(part("batch-kalman-norm", BOUNDS),),
)
