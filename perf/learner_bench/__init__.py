"""What the learner benchmark is made of.

    shapes    which model, which batch
    batch     the sequences, the same for everybody
    ours      the learner's own rollout step on its share of a layout
    plain     the same step as a person would write it on transformers and torch
    flops     what a model needs for these sequences, written out
    teams     processes that take turns, a step each
    report    figures, targets, the table

A *team* is one way to do the step: one process, or all ranks of a layout.
"""

from __future__ import annotations

import sys

import kernel_bench

# This tree, installed or not: a GPU machine may have torch and transformers and nothing else.
if str(kernel_bench.ROOT) not in sys.path:
    sys.path.insert(0, str(kernel_bench.ROOT))
