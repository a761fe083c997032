"""Finding the scorer a config names."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from dapo_hpc.config import RewardSection
from dapo_hpc.reward.protocol import resolve


def test_math_dapo_with_its_switch() -> None:
    strict = resolve(RewardSection(scorer="math_dapo"))
    lenient = resolve(RewardSection(scorer="math_dapo", boxed_fallback=True))
    assert strict("Answer: 34", "34") is True
    assert strict("\\boxed{34}", "34") is False
    assert lenient("\\boxed{34}", "34") is True


def test_own_scorer_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "echo_scorer.py").write_text("def same(text, key):\n    return text == key\n")
    monkeypatch.syspath_prepend(tmp_path)
    scorer = resolve(RewardSection(scorer="echo_scorer:same"))
    assert scorer("34", "34") is True
    assert scorer("35", "34") is False


def test_scorer_can_go_to_another_process() -> None:
    scorer = resolve(RewardSection(boxed_fallback=True))
    copied = pickle.loads(pickle.dumps(scorer))
    assert copied("\\boxed{34}", "34") is True


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "math_dpao",
            "'math_dpao' is not known; expected 'math_dapo' or 'package.module:function'",
        ),
        ("json:", "is not known"),
        (":loads", "is not known"),
        ("no_such_package.scorer:score", "cannot import no_such_package.scorer"),
        ("json:no_such_function", "json has no function no_such_function"),
        ("json:__name__", "json has no function __name__"),
    ],
)
def test_refused_with_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match="reward.scorer = ") as caught:
        resolve(RewardSection(scorer=name))
    assert sentence in str(caught.value)
