"""A short HTML report of results.json that stands alone: findings, tables, pictures inside, no scripts, no links out."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

from ..common.files import atomic_write, inside
from .drawing import DPI, provenance, save
from .plots import draw
from .task import task

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(results: dict[str, Any], folder: str | Path) -> Path:
    """Draw every part of `results` into `folder`/pictures and write `folder`/report.html with the pictures inside."""
    root = Path(folder)
    sections = {name: _section(name, part, root / "pictures") for name, part in results["tasks"].items()}
    # names come from settings and file names: escape them all
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    target = root / "report.html"
    atomic_write(target, template.render(results=results, sections=sections))
    return target


def _section(name: str, part: dict[str, Any], pictures: Path) -> dict[str, Any]:
    """A part as the template takes it."""
    one = task(part["kind"])
    figure, picture = draw(part), None
    if figure is not None:
        png = save(figure, inside(pictures, name))[0].read_bytes()
        width = int.from_bytes(png[16:20], "big") * 96 // DPI  # of PNG's header, in CSS pixels: the same size of letters in all
        picture = {"data": base64.b64encode(png).decode(), "width": width}
    said = {"question": one.question, "reading": one.reading, "finding": one.finding(part), "provenance": provenance(part)}
    return said | {"table": one.table(part), "picture": picture}
