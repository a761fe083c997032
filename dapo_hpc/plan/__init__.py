"""The plan of a run, from its config and the model's config.json alone: `dapo check`.

    architecture   sizes of the model
    layout         what the learner cannot split so
    parameters     elements on a rank
    activations    what autograd keeps of a forward pass
    passing        what is there for a moment
    memory         a learner's GPU, share by share
    engine         an actor's GPU
    step, disk     counts of a rollout step; what lies on disk
    remedies       the cheapest change that fits
    table          all of it for a person, or as JSON

Nothing here imports torch, so that a login node answers at once. The tests hold the numbers against
tensors of real forward and backward passes.
"""

from dapo_hpc.plan.layout import layout_problems
from dapo_hpc.plan.plan import Plan, make_plan
from dapo_hpc.plan.step import sft_phase
from dapo_hpc.plan.table import as_json, print_plan

__all__ = ["Plan", "as_json", "layout_problems", "make_plan", "print_plan", "sft_phase"]
