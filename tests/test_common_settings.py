"""Strict settings: every misunderstanding is refused by name."""

import dataclasses
from dataclasses import field
from typing import Annotated, Any, Literal, get_type_hints

import pytest

from modeling_moshi_ttt import MoshiTTTError
from modeling_moshi_ttt.common.settings import (
    DISTINCT,
    Bounds,
    Count,
    Flag,
    Number,
    Positive,
    Seed,
    Share,
    Whole,
    check_entries,
    describe,
    load_settings,
    settings_group,
    to_dict,
)
from modeling_moshi_ttt.evaluation.evaluate import EvaluateSettings
from modeling_moshi_ttt.evaluation.recall import RecallSettings
from modeling_moshi_ttt.training.run_config import RunConfig


@settings_group
class Optim:
    lr: Number = 1e-3
    steps: Whole = 10


@settings_group
class Run:
    name: str
    mode: Literal["lora", "ttt"] = "lora"
    optim: Optim = field(default_factory=Optim)
    sources: list[str] = field(default_factory=list)
    resume: str | None = None
    seed: Whole = 0
    fast: Flag = False
    extra: dict[str, Number] = field(default_factory=dict)


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
        ("name: a\nseed: 1.5", "`seed=1.5` must be a whole number, it is of type float"),
        ("name: a\nseed: true", "`seed=True` must be a whole number, it is of type bool"),
        ("name: 3", "`name=3` must be a text"),
        ("name: a\nmode: lroa", "`mode='lroa'` must be 'lora' or 'ttt'"),
        ("name: a\noptim: 3", "`optim=3` must be a group of settings"),
        ("name: a\nsources: x", "`sources='x'` must be a list"),
        ("name: a\nsources: [1]", r"`sources\[0\]=1` must be a text"),
        ("name: a\nfast: 1", "`fast=1` must be true or false"),
        ("name: a\noptim: {lr: fast}", "`optim.lr='fast'` must be a number"),
        ("seed: 1", "missing 'name'"),
        ("- a", "must hold `key: value` lines"),
        ("a: [", "not valid YAML"),
        ("[" * 5000, "not valid YAML: it is nested too deep"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_settings(Run, write(tmp_path, text))


@settings_group
class Part:
    share: Share = 0.5
    sizes: Annotated[list[Positive], DISTINCT] = field(default_factory=lambda: [1.0])
    most: Count | None = None
    span: Bounds = field(default_factory=lambda: [0, 1])
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_entries("names", ["a", "a"] if self.seed == 7 else ["a"])


@settings_group
class Outer:
    part: Part = field(default_factory=Part)
    parts: list[Part] = field(default_factory=list)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("part: {share: 1.5}", r"run\.yaml: `part\.share=1\.5` must be at most 1\."),
        ("part: {share: .nan}", r"run\.yaml: `part\.share=nan` must be finite\."),
        ("part: {sizes: [1, 0]}", r"run\.yaml: `part\.sizes\[1\]=0` must be more than 0\."),
        ("part: {most: 0}", r"run\.yaml: `part\.most=0` must be at least 1\."),
        ("part: {most: .inf}", r"run\.yaml: `part\.most=inf` must be a whole number, it is of type float\."),
        (f"part: {{most: -{10**400}}}", r"run\.yaml: `part\.most=-10+` must be at least 1\."),
        (f"part: {{seed: {2**32}}}", r"run\.yaml: `part\.seed=4294967296` must be at most 4294967295\."),
        ("part: {sizes: []}", r"run\.yaml: `part\.sizes=\[\]` must hold an entry; name at least one\."),
        ("part: {sizes: [3, 3]}", r"run\.yaml: `part\.sizes=\[3, 3\]` must not hold 3\.0 twice; name it once\."),
        ("part: {span: [3, 2]}", r"run\.yaml: `part\.span=\[3, 2\]` must be a lowest and a highest"),
        ("part: {seed: 7}", r"run\.yaml: `part\.names=\['a', 'a'\]` must not hold 'a' twice"),
        ("parts: [{seed: 7}]", r"run\.yaml: `parts\[0\]\.names="),
        ("parts: [{sede: 7}]", r"run\.yaml: unknown key 'parts\[0\]\.sede'; did you mean 'parts\[0\]\.seed'"),
        ("part: {share: 2, seed: -1}", r"`part\.share=2` .* \(and 1 more is wrong\)"),
        ("part:", None),  # a group without a line
        ("part: {most: 1e3}", None),
    ],
)
def test_a_group_s_own_checks_name_the_file_and_the_field(tmp_path, text, message):
    if message is None:
        assert isinstance(load_settings(Outer, write(tmp_path, text)).part, Part)
        return
    with pytest.raises(MoshiTTTError, match=message):
        load_settings(Outer, write(tmp_path, text))


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


def test_help_says_key_type_default_and_meaning_of_every_setting():
    @settings_group
    class Part:
        """One of several."""

        size: Whole
        """How large."""
        kind: Literal["a", "b"] | None = None

    @settings_group
    class All(Part):
        """All of it."""

        lr: Positive | None = None
        """Its rate,
        over two lines."""
        sources: list[str] = field(default_factory=list)
        part: Part = field(default_factory=lambda: Part(1))
        parts: list[Part] = field(default_factory=lambda: [Part(3)])
        other: Part | None = None

    assert describe(All) == (
        "settings: All of it.\n  size: int, needed\n      How large.\n  kind: a | b | null = null\n"
        "  lr: float | null = null\n      Its rate, over two lines.\n  sources: list of str = []\n  part: group\n"
        '  parts: list of group = [{"size": 3, "kind": null}]\n  other: group | null = null\n\n'
        "part: One of several.\n  part.size: int, needed\n      How large.\n  part.kind: a | b | null = null\n\n"
        "parts[]: One of several.\n  parts[].size: int, needed\n      How large.\n  parts[].kind: a | b | null = null\n\n"
        "other: One of several.\n  other.size: int, needed\n      How large.\n  other.kind: a | b | null = null"
    )


def bare(hint: Any) -> bool:
    """Whether a hint holds a number or a flag that pydantic would convert in silence."""
    if hasattr(hint, "__metadata__"):
        return False
    return hint in (int, float, bool) or any(map(bare, getattr(hint, "__args__", ())))


@pytest.mark.parametrize("cls", [RunConfig, EvaluateSettings, RecallSettings])
def test_no_setting_takes_another_type_in_silence(cls):
    todo = [cls]
    for group in todo:
        for name, hint in get_type_hints(group, include_extras=True).items():
            assert not bare(hint), f"{group.__name__}.{name}: take Flag, Whole, Number or what stands beside them"
            todo += [part for part in (hint, *getattr(hint, "__args__", ())) if dataclasses.is_dataclass(part)]
