"""What a scorer is, and how the one named in the config is found."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from dapo_hpc.config import RewardSection
from dapo_hpc.reward import math_dapo

Scorer = Callable[[str, str], bool]
"""(response text, ground truth) -> is_correct. Runs in a worker process under a time limit; the
reward of +1 or -1 is made elsewhere (overlong.shaped_reward)."""


def resolve(config: RewardSection) -> Scorer:
    """The scorer named by reward.scorer; it can be sent to another process.

    Raises:
        ValueError: nothing callable has that name; the sentence says which part is missing.
    """
    if config.scorer == "math_dapo":
        return functools.partial(math_dapo.score, boxed_fallback=config.boxed_fallback)
    module_name, colon, function_name = config.scorer.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(
            f"reward.scorer = {config.scorer!r} is not known; expected 'math_dapo' or "
            "'package.module:function'."
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"reward.scorer = {config.scorer!r}: cannot import {module_name} ({error}). Install "
            "it where the actors run, or put its folder on PYTHONPATH."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(
            f"reward.scorer = {config.scorer!r}: {module_name} has no function {function_name}; "
            "expected one that takes (response text, ground truth) and returns a bool."
        )
    scorer: Scorer = function
    return scorer
