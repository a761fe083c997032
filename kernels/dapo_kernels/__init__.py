"""The two numerical cores of the learner: token log-probs from hidden states, and the DAPO loss.

    hidden, output weight, token ids --linear_logprob--> logprobs, entropy
    logprobs, old_logprobs, advantages, token_weights --dapo_loss--> loss, statistics

`reference` holds the same in a few obvious lines of torch each. Depends on torch only.
"""

from dapo_kernels.logprob import linear_logprob
from dapo_kernels.loss import DapoLossStats, dapo_loss

__all__ = ["DapoLossStats", "dapo_loss", "linear_logprob"]
