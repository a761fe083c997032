r"""The paper's rule for mathematics: the last `Answer:` of a response must equal the answer key.

Answers are compared as strings after normalisation. Which words and LaTeX fragments that removes,
and in which order, follows the Minerva rule (arXiv 2206.14858, appendix) as verl's math_dapo
applies it, so that accuracies are comparable.
"""

from __future__ import annotations

import re

ANSWER_WINDOW_CHARS = 300
"""Only so many characters at the end are searched for `Answer:`. Source: verl."""
BOXED_WINDOW_CHARS = 100
r"""The same for \boxed{}. Source: verl."""

_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
_BOXED = "\\boxed{"

_REWRITES = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
)
_UNITS = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots"),
    *("sue", "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds"),
    *("meters", "meals", "edges", "students", "childrentickets", "multiples"),
)
_FRAGMENTS = (
    *(r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}"),
    *(r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
)
_UNWRAPS = tuple(
    re.compile(pattern)
    for pattern in (r"\\text\{(.*?)\}", r"\\textbf\{(.*?)\}", r"\\overline\{(.*?)\}")
)
_FIRST_FORMULA = re.compile(r".*?\$(.*?)\$.*")
_WIDEST_BOX = re.compile(r"\\boxed\{(.*)\}")
_SHORT_FRACTION = re.compile(r"frac([^{])(.)")
_SHORT_ROOT = re.compile(r"sqrt([^{])")


def score(response_text: str, ground_truth: str, *, boxed_fallback: bool = False) -> bool:
    r"""Whether the last `Answer:` within the last 300 characters equals the answer key.

    Source: DAPO, arXiv 2503.14476, Eq. 7; verl's math_dapo.

    Args:
        response_text: the response, decoded.
        ground_truth: the answer key.
        boxed_fallback: where there is no `Answer:`, take the last \boxed{} within the last 100
            characters.
    """
    answer = extract_answer(response_text, boxed_fallback=boxed_fallback)
    return answer is not None and normalize_answer(answer) == normalize_answer(ground_truth)


def extract_answer(response_text: str, *, boxed_fallback: bool) -> str | None:
    """The text given as the answer, not normalised; None if there is none."""
    answers = _ANSWER.findall(response_text[-ANSWER_WINDOW_CHARS:])
    if answers:
        return str(answers[-1])
    return _last_boxed(response_text[-BOXED_WINDOW_CHARS:]) if boxed_fallback else None


def normalize_answer(answer: str) -> str:
    """A form in which equal answers are mostly equal strings: no units, no LaTeX dressing."""
    answer = answer.rpartition("=")[2]
    for old, new in _REWRITES:
        answer = answer.replace(old, new)
    for unwanted in (*_UNITS, *_FRAGMENTS):
        answer = answer.replace(unwanted, "")
    answer = _FIRST_FORMULA.sub(r"$\1$", answer)
    for wrapper in (*_UNWRAPS, _WIDEST_BOX):
        answer = wrapper.sub(r"\1", answer)
    answer = _SHORT_FRACTION.sub(r"frac{\1}{\2}", answer)
    answer = _SHORT_ROOT.sub(r"sqrt{\1}", answer).replace("$", "")
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer.strip()


def _last_boxed(text: str) -> str | None:
    r"""Inside of the last \boxed{}, braces balanced; None if there is none or it never closes."""
    before, found, inside = text.rpartition(_BOXED)
    if not found:
        return None
    depth = 1
    for index, character in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return inside[:index]
    return None
