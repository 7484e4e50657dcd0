"""Strict settings: every misunderstanding is refused by name."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from modeling_moshi_ttt.common.settings import ABOVE_ZERO, check_entries, check_numbers, describe, load_settings, to_dict


@dataclass
class Optim:
    lr: float = 1e-3
    steps: int = 10


@dataclass
class Run:
    name: str
    mode: Literal["lora", "ttt"] = "lora"
    optim: Optim = field(default_factory=Optim)
    sources: list[str] = field(default_factory=list)
    resume: str | None = None
    seed: int = 0
    fast: bool = False
    extra: dict[str, float] = field(default_factory=dict)


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_file_and_overrides(tmp_path):
    path = write(tmp_path, "name: a\noptim:\n  lr: 1e-4\nsources: [x, y]\nextra: {b: 2}\n")
    run = load_settings(Run, path, ["optim.steps=20", "mode=ttt", "resume=last", "fast=true"])
    assert run == Run("a", "ttt", Optim(1e-4, 20), ["x", "y"], "last", 0, True, {"b": 2.0})
    assert to_dict(run)["optim"] == {"lr": 1e-4, "steps": 20}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nsede: 1", "unknown key 'sede'; did you mean 'seed'"),
        ("name: a\noptim: {lrr: 1}", "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        ("name: a\nseed: 1.5", "seed is 1.5 .float., it must be a whole number"),
        ("name: a\nseed: true", "seed is True .bool., it must be a whole number"),
        ("name: 3", "name is 3 .int., it must be a text"),
        ("name: a\nmode: lroa", "mode is 'lroa', it must be one of 'lora', 'ttt'"),
        ("name: a\noptim: 3", "optim is 3 .int., it must be a group of settings"),
        ("name: a\nsources: x", "sources is 'x' .str., it must be a list"),
        ("name: a\nsources: [1]", r"sources\[0\] is 1"),
        ("name: a\nfast: 1", "fast is 1 .int., it must be true or false"),
        ("name: a\noptim: {lr: fast}", "optim.lr is 'fast' .str., it must be a number"),
        ("seed: 1", "missing 'name'"),
        ("- a", "must hold `key: value` lines"),
        ("a: [", "not valid YAML"),
        ("[" * 5000, "not valid YAML: it is nested too deep"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_settings(Run, write(tmp_path, text))


@dataclass
class Part:
    share: float = 0.5
    sizes: list[int] = field(default_factory=lambda: [1])
    most: int | None = None

    def __post_init__(self):
        check_numbers(self, share=(0, 1), sizes=ABOVE_ZERO, most=1)
        check_entries("sizes", self.sizes)


@dataclass
class Whole:
    part: Part = field(default_factory=Part)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("part: {share: 1.5}", r"run\.yaml: part\.share is 1\.5, it must be between 0 and 1\."),
        ("part: {share: .nan}", r"run\.yaml: part\.share is nan, it must be between 0 and 1\."),
        ("part: {sizes: [1, 0]}", r"run\.yaml: part\.sizes\[1\] is 0, it must be more than 0\."),
        ("part: {most: 0}", r"run\.yaml: part\.most is 0, it must be at least 1\."),
        ("part: {most: .inf}", r"run\.yaml: part\.most is inf \(float\), it must be a whole number"),
        (f"part: {{most: -{10**400}}}", r"run\.yaml: part\.most is -10+, it must be at least 1\."),
        ("part: {sizes: []}", r"run\.yaml: part\.sizes is empty; name at least one\."),
        ("part: {sizes: [3, 3]}", r"run\.yaml: part\.sizes holds 3 twice; name it once\."),
    ],
)
def test_a_group_s_own_checks_name_the_file_and_the_field(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_settings(Whole, write(tmp_path, text))


@pytest.mark.parametrize("override", ["seed", "=1", "optim.=1", "name.x=1"])
def test_wrong_overrides(tmp_path, override):
    with pytest.raises(ValueError, match="override"):
        load_settings(Run, write(tmp_path, "name: a"), [override])


def test_a_missing_file_is_named_with_those_that_are_there(tmp_path):
    (tmp_path / "demo.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match=r"nope\.yaml: there is no such settings file; .* holds demo\.yaml"):
        load_settings(Run, tmp_path / "nope.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        load_settings(Run, tmp_path)


def test_help_says_key_type_and_default_of_every_setting():
    @dataclass
    class Part:
        """One of several."""

        size: int
        kind: Literal["a", "b"] | None = None

    @dataclass
    class Whole:
        """All of it."""

        name: str
        lr: float | None = None
        sources: list[str] = field(default_factory=list)
        part: Part = field(default_factory=lambda: Part(1))
        parts: list[Part] = field(default_factory=lambda: [Part(3)])
        other: Part | None = None

    assert describe(Whole) == (
        "settings: All of it.\n  name: str, needed\n  lr: float | null = null\n  sources: list of str = []\n  part: group\n"
        '  parts: list of group = [{"size": 3, "kind": null}]\n  other: group | null = null\n\n'
        "part: One of several.\n  part.size: int, needed\n  part.kind: a | b | null = null\n\n"
        "parts[]: One of several.\n  parts[].size: int, needed\n  parts[].kind: a | b | null = null\n\n"
        "other: One of several.\n  other.size: int, needed\n  other.kind: a | b | null = null"
    )
