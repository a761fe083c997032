"""One TOML file is one run: every knob, its bounds, its default and where the default comes from.

`load` reads a file, applies the profile beneath it and `--set` overrides above it, and returns a
frozen RunConfig, or raises ConfigProblems with every problem of the file at once.
"""

from dapo_hpc.config.checks import cross_checks
from dapo_hpc.config.frozen import Frozen
from dapo_hpc.config.loading import ConfigProblems, dump, known_keys, load, parse
from dapo_hpc.config.profiles import PROFILES
from dapo_hpc.config.sections import (
    AdvantageSection,
    BufferSection,
    EvalSection,
    HardwareSection,
    LaunchSection,
    LearnerSection,
    LossSection,
    ModelSection,
    OptimizerSection,
    Profile,
    PromptsSection,
    RewardSection,
    RolloutSection,
    RunConfig,
    RunSection,
    Section,
    SftSection,
    WeightsSection,
)

__all__ = [
    "AdvantageSection",
    "BufferSection",
    "ConfigProblems",
    "EvalSection",
    "Frozen",
    "HardwareSection",
    "LaunchSection",
    "LearnerSection",
    "LossSection",
    "ModelSection",
    "OptimizerSection",
    "PROFILES",
    "Profile",
    "PromptsSection",
    "RewardSection",
    "RolloutSection",
    "RunConfig",
    "RunSection",
    "Section",
    "SftSection",
    "WeightsSection",
    "cross_checks",
    "dump",
    "known_keys",
    "load",
    "parse",
]
