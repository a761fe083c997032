"""The `Answer:` rule, its window, its normalisation and the fallback to a box."""

from __future__ import annotations

import pytest

from dapo_hpc.reward.math_dapo import extract_answer, normalize_answer, score

CORRECT = [
    ("So it is.\nAnswer: 34", "34"),
    ("answer:34", "34"),
    ("ANSWER  :  34  ", "34"),
    ("Answer: $34$", "34"),
    ("Answer: $\\boxed{34}$", "34"),
    ("Answer: \\boxed{34}", "34"),
    ("Answer: 1,234", "1234"),
    ("Answer: 1234", "1,234"),
    ("Answer: x = 34", "34"),
    ("Answer: 34 degrees", "34"),
    ("Answer: 34^\\circ", "34"),
    ("Answer: 34\\text{ cm}", "34"),
    ("Answer: a square", ""),
    ("Answer: \\frac12", "\\frac{1}{2}"),
    ("Answer: \\sqrt2", "\\sqrt{2}"),
    ("Answer: -7", "-7"),
    ("Answer: 12.\nThat was the first. Answer: 34", "34"),
    ("Answer:\n34", "34"),
    ("Answer: the area is $34$ square meters.", "34"),
]


@pytest.mark.parametrize(("response", "key"), CORRECT)
def test_correct(response: str, key: str) -> None:
    assert score(response, key)
    assert not score(response, key + "5")


WRONG = [
    pytest.param("Answer: 35", "34", id="another-number"),
    pytest.param("Answer: 34.", "34", id="full-stop-is-part-of-it"),
    pytest.param("Answer: 34.0", "34", id="equal-as-number-only"),
    pytest.param("Answer: 034", "34", id="leading-zero"),
    pytest.param("Answer: 34\nAnswer: 35", "34", id="last-one-counts"),
    pytest.param("Answer: 34 or 35", "34", id="two-answers"),
    pytest.param("The answer is 34", "34", id="no-colon"),
    pytest.param("34", "34", id="bare"),
    pytest.param("", "34", id="empty"),
    pytest.param("Answer:", "34", id="nothing-after-it"),
    pytest.param("Answer:", "", id="nothing-is-not-the-empty-key"),
    pytest.param("\\boxed{34}", "34", id="box-without-fallback"),
]


@pytest.mark.parametrize(("response", "key"), WRONG)
def test_wrong(response: str, key: str) -> None:
    assert not score(response, key)


def test_only_the_last_300_characters_are_read() -> None:
    tail = "\n" + "x" * (300 - len("\nAnswer: 34"))
    assert len("Answer: 34" + tail) == 300
    assert score("Answer: 34" + tail, "34")
    assert not score("Answer: 34" + tail + "x", "34")


def test_a_window_that_cuts_the_answer_reads_what_is_left() -> None:
    assert extract_answer("Answer: " + "9" * 400, boxed_fallback=False) is None
    assert extract_answer("Answer: " + "9" * 292, boxed_fallback=False) == "9" * 292


BOXED = [
    pytest.param("so \\boxed{34}", "34", id="plain"),
    pytest.param("\\boxed{12} no, \\boxed{34}", "34", id="last-box-counts"),
    pytest.param("\\boxed{\\frac{1}{2}}", "\\frac12", id="nested-braces"),
    pytest.param("\\boxed{34} done" + "." * 80, "34", id="within-100-characters"),
    pytest.param("\\boxed{1{,}234}", "1234", id="normalised"),
]


@pytest.mark.parametrize(("response", "key"), BOXED)
def test_box_counts_only_with_the_fallback(response: str, key: str) -> None:
    assert score(response, key, boxed_fallback=True)
    assert not score(response, key, boxed_fallback=False)
    assert not score(response, key + "5", boxed_fallback=True)


@pytest.mark.parametrize(
    "response",
    [
        pytest.param("Answer: 12, \\boxed{34}", id="answer-goes-before-box"),
        pytest.param("\\boxed{34", id="never-closed"),
        pytest.param("\\boxed{34}" + "." * 100, id="beyond-100-characters"),
        pytest.param("\\boxed 34", id="no-brace"),
    ],
)
def test_fallback_does_not_accept(response: str) -> None:
    assert not score(response, "34", boxed_fallback=True)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("  34 ", "34"),
        ("1,234,567", "1234567"),
        ("1,234.5", "1,234.5"),
        ("y=2x+1", "2x+1"),
        ("\\text{34}", "34"),
        ("\\textbf{34}", "34"),
        ("\\overline{34}", "34"),
        ("\\mbox{34}", "34"),
        ("34\\%", "34\\%"),
        ("\\$34", "34"),
        ("fracab", "frac{a}{b}"),
        ("\\frac{a}{b}", "\\frac{a}{b}"),
        ("10\\text{ and }12", "1012"),
        ("10,\\text{and}12", "1012"),
        ("5\\mathrm{th}", "5"),
        ("3^{\\circ}", "3"),
        ("an 8", "8"),
        ("12 hours", "12"),
    ],
)
def test_normal_form(answer: str, expected: str) -> None:
    assert normalize_answer(answer) == expected
