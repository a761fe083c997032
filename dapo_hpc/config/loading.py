"""From a TOML file to a RunConfig, or to every problem of the file at once."""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import ValidationError

from dapo_hpc.config.checks import cross_checks
from dapo_hpc.config.profiles import PROFILES
from dapo_hpc.config.sections import Profile, RunConfig, Section


class ConfigProblems(ValueError):
    """Everything that is wrong with a config, one sentence each."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


def load(path: str | os.PathLike[str], overrides: list[str] | None = None) -> RunConfig:
    """Read a TOML file. Raises ConfigProblems with every problem found."""
    source = Path(path)
    try:
        table = tomllib.loads(source.read_text())
    except FileNotFoundError:
        raise ConfigProblems(str(path), ["there is no such file."]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigProblems(str(path), [f"not TOML: {error}."]) from None
    problems: list[str] = []
    for text in overrides or []:
        _apply_override(table, text, problems)
    return parse(table, source=source.name, problems=problems)


def parse(
    table: dict[str, Any], *, source: str = "config", problems: list[str] | None = None
) -> RunConfig:
    """Validate a table of a TOML file, profile applied. Raises ConfigProblems."""
    problems = list(problems or [])
    profile = table.get("profile", "default")
    if profile in get_args(Profile):
        table = _with_profile(table, PROFILES[profile])
    try:
        config = RunConfig.model_validate(table)
    except ValidationError as error:
        problems += sentences(error, RunConfig)
        problems += _cross_checks_of_the_rest(table, error)
        raise ConfigProblems(source, problems) from None
    problems += cross_checks(config)
    if problems:
        raise ConfigProblems(source, problems)
    return config


def dump(config: RunConfig) -> str:
    """The resolved config as TOML text; `parse` of it gives the same config."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def known_keys() -> list[str]:
    """Every dotted key a TOML file of a run may set."""
    return keys_of(RunConfig)


def keys_of(root: type[Section]) -> list[str]:
    """Every dotted key of a file with these tables."""
    keys: list[str] = []
    for name, field in root.model_fields.items():
        section = _section_class(field.annotation)
        keys += [f"{name}.{key}" for key in section.model_fields] if section else [name]
    return keys


_REQUIRED: dict[str, dict[str, Any]] = {
    "run": {"name": "unset", "total_steps": 1},
    "model": {"path": "unset"},
    "prompts": {"train": "unset"},
    "sft": {"init": "unset", "pairs": "unset"},
}
"""Stand-ins for required keys that are missing, so that the cross-checks still run."""


def _cross_checks_of_the_rest(table: dict[str, Any], error: ValidationError) -> list[str]:
    """Cross-checks with the faulty keys at their defaults, so that all are seen at once."""
    rest = {k: dict(v) if isinstance(v, dict) else v for k, v in table.items()}
    for item in error.errors():
        target: Any = rest
        for part in item["loc"][:-1]:
            target = target.get(part) if isinstance(target, dict) else None
        if isinstance(target, dict):
            target.pop(item["loc"][-1], None)
    for section, required in _REQUIRED.items():
        if section in rest or section != "sft":
            rest[section] = {**required, **rest.get(section, {})}
    try:
        return cross_checks(RunConfig.model_validate(rest))
    except ValidationError:
        return []


def _section_class(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _with_profile(table: dict[str, Any], profile: dict[str, Any]) -> dict[str, Any]:
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in table.items()}
    for dotted, value in profile.items():
        section, key = dotted.split(".")
        target = merged.setdefault(section, {})
        if isinstance(target, dict):
            target.setdefault(key, value)
    return merged


def _apply_override(table: dict[str, Any], text: str, problems: list[str]) -> None:
    dotted, separator, value = text.partition("=")
    section, dot, key = dotted.strip().partition(".")
    if not (separator and dot):
        problems.append(f"--set {text}: expected section.key=value, as in loss.clip_high=0.28.")
        return
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    table.setdefault(section, {})[key] = parsed


def sentences(error: ValidationError, root: type[Section]) -> list[str]:
    """Every problem of a file with these tables in the house form: what, the value, what was
    expected."""
    return [_sentence(dict(item), root) for item in error.errors()]


def _sentence(error: dict[str, Any], root: type[Section]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}{_suggestion(key, root)}"
    if error["type"] == "missing":
        return f"{key} is missing; it has no default, set it."
    message = error["msg"].removeprefix("Value error, ")
    reason = message[0].lower() + message[1:]
    return f"{key} = {error['input']!r}: {reason}."


def _suggestion(key: str, root: type[Section]) -> str:
    """The closest spelling of the last part, of the same section if there is a choice."""
    known = keys_of(root) if "." in key else list(root.model_fields)
    section, _, leaf = key.rpartition(".")
    leaves = [k.rpartition(".")[2] for k in known]
    near = difflib.get_close_matches(leaf, leaves, n=1)
    found = [k for k, its_leaf in zip(known, leaves, strict=True) if its_leaf in near]
    found.sort(key=lambda k: not k.startswith(section))
    return f"; did you mean {found[0]}?" if found else "; no known key is close to it."
