"""The numerical core of the learner: token log-probs and the DAPO loss, fused, vocab-parallel.

    logits, token ids ------------logprob-----------> log-probs, entropy
    hidden, weight, token ids ----linear_logprob----> log-probs, entropy; logits in chunks only
    log-probs, old, advantages ---dapo_loss---------> loss, statistics
    hidden, weight, all of these -linear_dapo_loss--> loss, statistics, gradients in the forward

Triton on a GPU, torch elsewhere: `backend` has the rule, `reference` the operations in obvious
torch, `triton_ops` the kernels. Depends on torch and Triton only.
"""

from dapo_kernels.checks import checked_values
from dapo_kernels.linear import linear_logprob
from dapo_kernels.linear_loss import linear_dapo_loss
from dapo_kernels.logits import logprob
from dapo_kernels.loss import dapo_loss
from dapo_kernels.terms import DapoLossStats

__all__ = [
    "DapoLossStats",
    "checked_values",
    "dapo_loss",
    "linear_dapo_loss",
    "linear_logprob",
    "logprob",
]
