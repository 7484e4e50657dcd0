"""Reference pages from the package itself: its modules, its commands, every setting and every recipe. `docs/conf.py` calls it."""

import contextlib
import io
import os
import pkgutil
import re
import shutil
from importlib import import_module
from pathlib import Path

import modeling_moshi_ttt
from modeling_moshi_ttt.cli import COMMANDS, main
from modeling_moshi_ttt.common import packaged
from modeling_moshi_ttt.common.settings import Group, groups
from modeling_moshi_ttt.evaluation.settings import EvaluateSettings
from modeling_moshi_ttt.training.run_config import RunConfig

PACKAGE = modeling_moshi_ttt.__name__
# Of the sub-packages, what one calls from Python; the rest is commands.
ALSO = ("common.packaged", "live.session", "training.modes", "conversion.tables")
KERNELS = "ttt_kernels"  # their public face is `ttt_ops`
SETTINGS = {"train": RunConfig, "evaluate": EvaluateSettings}


def write_pages(folder: Path) -> None:
    """Write all reference pages anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pages = module_pages() | {"commands.md": commands_page(), "settings.md": settings_page(), "recipes.md": recipes_page()}
    for name, text in pages.items():
        (folder / name).write_text(text)


def modules() -> list[str]:
    """Names below the package: every flat module but the kernels, and `ALSO`."""
    flat = [module.name for module in pkgutil.iter_modules(modeling_moshi_ttt.__path__) if not module.ispkg]
    return [*sorted(name for name in flat if not name.startswith(KERNELS)), *ALSO]


def module_pages() -> dict[str, str]:
    """A page a module, and the list of them."""
    pages = {f"{name}.rst": f"{name}\n{'=' * len(name)}\n\n.. automodule:: {PACKAGE}.{name}\n" for name in modules()}
    rows = [f"| [{name}]({name}.rst) | {summary(f'{PACKAGE}.{name}')} |" for name in modules()]
    public = ", ".join(f"`{name}`" for name in modeling_moshi_ttt.__all__)
    lines = [
        "# Python",
        f"From `{PACKAGE}` itself come {public}.",
        "\n".join(["| module | what it is |", "| --- | --- |", *rows]),
        toctree(name for name in modules()),
    ]
    return pages | {"python.md": "\n\n".join(lines) + "\n"}


def summary(module: str) -> str:
    """The first sentence of a module's docstring."""
    said = " ".join((import_module(module).__doc__ or "").split())
    return re.split(r"(?<=[.:]) ", said)[0].rstrip(":").replace("|", r"\|")


def toctree(names) -> str:
    return "\n".join(["```{toctree}", ":hidden:", "", *names, "```"])


def commands_page() -> str:
    """What `--help` of every command says; settings have a page of their own."""
    parts = ["# Commands", "Every command says this itself with `--help`."]
    for name, (_, what) in COMMANDS.items():
        more = "\n\nIts settings: [every one of them](settings.md)." if name in SETTINGS else ""
        parts.append(f"## {name}\n\nTo {what}.{more}\n\n```text\n{help_of(name)}\n```")
    return "\n\n".join(parts) + "\n"


def help_of(command: str) -> str:
    said, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([command, "--help"])
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return said.getvalue().partition("\nsettings: ")[0].strip()


def settings_page() -> str:
    """Every setting of `train` and `evaluate`, with its type, default and meaning."""
    parts = [
        "# Settings",
        "A settings file is YAML; `key=value` on the command line overrides it, as in `optim.lr=1e-4`. What is unknown is refused by name. "
        "Fields of the model itself (`model.ttt={...}`) are those of [MoshiTTTConfig](configuration_moshi_ttt.rst).",
    ]
    for command, cls in SETTINGS.items():
        parts.append(f"## Of `moshi-ttt {command}`")
        parts += [group_table(group) for group in groups(cls)]
    return "\n\n".join(parts) + "\n"


def group_table(group: Group) -> str:
    """A group of settings: what it says of itself, and a row for each."""
    rows = [[f"`{row.key}`", row.type, f"`{row.default}`" if row.default else "", row.meaning] for row in group.rows]
    table = [
        "| setting | type | default | meaning |",
        "| --- | --- | --- | --- |",
        *("| " + " | ".join(map(cell, row)) + " |" for row in rows),
    ]
    return "\n\n".join([f"### {group.name or 'The whole'}", group.said, "\n".join(table)])


def cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def recipes_page() -> str:
    """Every packaged settings file, with its comments."""
    parts = ["# Recipes", "They come with the package and are called by these names; `moshi-ttt init FOLDER` writes copies to edit."]
    for kind, what in (
        ("train", "moshi-ttt train NAME"),
        ("evaluate", "moshi-ttt evaluate NAME"),
        ("accelerate", "moshi-ttt train … --launch NAME"),
    ):
        parts.append(f"## `{what}`")
        for name in packaged.names(kind):
            parts.append(f"### {name}\n\n```yaml\n{Path(packaged.packaged(kind, name)).read_text().strip()}\n```")
    return "\n\n".join(parts) + "\n"


def plain_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text with `code`, Google sections and, in modules, indented formulas: Sphinx is kept from reading more into
    them.
    """
    read: list[str] = []
    for before, line in zip(["", *lines], lines):
        if what == "module" and line.startswith("    "):
            read += [line] if before.strip() else ["::", "", line]
        else:
            read.append(re.sub(r"(`[^`]*`)|([*|])|(\w)_(?=\W|$)", lambda m: m[1] or (f"\\{m[2]}" if m[2] else f"{m[3]}\\_"), line))
    lines[:] = read
