"""How many groups will be informative: of those under way, and of prompts not yet dispatched.

Groups are told apart by how many of their responses finished and were correct. One with both
outcomes is informative for certain. For one whose k finished responses are all alike, and for a new
prompt (k = 0), the share of informative ones among past groups that began like it is the chance.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

PRIOR_GROUPS = 8.0
"""Weight, in groups, of what is assumed before anything is measured."""
SAFETY = 2.0
"""Standard deviations of the number of informative groups that are kept in reserve. Too little
costs a second round of sampling while engines idle, too much costs surplus tokens."""
MAX_OPEN = 10
"""Open groups for each one needed, at most; a policy that fails everywhere must not use up all
prompts at once."""


@dataclass(slots=True)
class Tally:
    """The open groups, counted by what is known of them."""

    mixed: int = 0
    """With both outcomes among their finished responses."""
    alike: Counter[tuple[int, bool]] = field(default_factory=Counter)
    """By (number finished, are all of them correct); (0, False) when none has finished."""

    @property
    def num_groups(self) -> int:
        return self.mixed + self.alike.total()

    def add(self, num_finished: int, num_correct: int, amount: int) -> None:
        if 0 < num_correct < num_finished:
            self.mixed += amount
        else:
            self.alike[num_finished, num_correct > 0] += amount


@functools.lru_cache(maxsize=8)
def prior(group_size: int) -> tuple[float, ...]:
    """[G + 1] shares by number of correct responses, if nothing is known of the pass rates.

    C(2c, c) C(2(G - c), G - c) / 4^G: pass rates from Beta(1/2, 1/2), Jeffreys' prior, which
    expects many prompts to be too easy or too hard. For G = 16, 72 % of the groups are informative.
    """
    return tuple(
        math.comb(2 * c, c) * math.comb(2 * (group_size - c), group_size - c) / 4**group_size
        for c in range(group_size + 1)
    )


@dataclass(frozen=True)
class Outlook:
    """What past groups say about coming ones."""

    weights: tuple[float, ...]
    """[G + 1] past groups by number of correct responses, the prior's included."""

    @classmethod
    def of(cls, group_size: int, *measured: Sequence[float]) -> Outlook:
        """From histograms by number of correct responses; another group size says nothing."""
        weights = [PRIOR_GROUPS * share for share in prior(group_size)]
        for histogram in measured:
            if len(histogram) == len(weights):
                weights = [a + b for a, b in zip(weights, histogram, strict=True)]
        return cls(tuple(weights))

    @property
    def rate(self) -> float:
        """Expected share of informative groups."""
        return sum(self.weights[1:-1]) / sum(self.weights)

    @functools.cached_property
    def _chances(self) -> dict[bool, list[float]]:
        places = range(len(self.weights) - 1)
        return {
            True: [_chance(self.weights, k) for k in places],
            False: [_chance(self.weights[::-1], k) for k in places],
        }

    def chance(self, num_alike: int, is_correct: bool) -> float:
        """P(informative) of a group whose first `num_alike` responses are all (in)correct.

        With w_c past groups of c correct responses of G, in which the first k would have been all
        correct with probability C(c, k) / C(G, k):

            sum_{0 < c < G} w_c C(c, k) / sum_{c} w_c C(c, k)

        and the same with G - c in place of c when they are incorrect. A group that was begun under
        a larger group size counts as if one response were missing.
        """
        chances = self._chances[is_correct]
        return chances[min(num_alike, len(chances) - 1)]


def _chance(weights: Sequence[float], num_alike: int) -> float:
    begun = [weight * math.comb(c, num_alike) for c, weight in enumerate(weights)]
    return sum(begun[1:-1]) / sum(begun)


@dataclass(frozen=True, slots=True)
class Expected:
    """Informative groups that are still to come, before any new prompt."""

    num_open: int
    certain: int
    mean: float
    """The certain ones included."""
    variance: float

    @classmethod
    def of(cls, tally: Tally, outlook: Outlook) -> Expected:
        mean, variance = float(tally.mixed), 0.0
        for (num_alike, is_correct), num_groups in tally.alike.items():
            if num_groups:
                chance = outlook.chance(num_alike, is_correct)
                mean += num_groups * chance
                variance += num_groups * chance * (1 - chance)
        return cls(tally.num_groups, tally.mixed, mean, variance)


def new_prompts(needed: int, expected: Expected, outlook: Outlook, safety: float = SAFETY) -> int:
    """The fewest new prompts after which `needed` informative groups will very likely come.

    The smallest W with

        mean + W q - safety sqrt(variance + W q (1 - q)) >= needed,

    where q is the rate of new prompts. The sum of many independent groups is close to normal, so
    that 2 standard deviations are enough 98 times in 100; with 0 it is a mean.
    """
    if expected.certain >= needed:
        return 0
    rate = outlook.rate
    most = max(0, MAX_OPEN * needed - expected.num_open)

    def is_enough(num_new: int) -> bool:
        variance = expected.variance + num_new * rate * (1 - rate)
        return expected.mean + num_new * rate - safety * math.sqrt(variance) >= needed - 1e-9

    return bisect.bisect_left(range(most), True, key=is_enough)
