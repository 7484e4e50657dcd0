"""A short HTML report of results.json that stands alone: tables, pictures inside, no scripts, no links out."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from ..common.files import atomic_write, inside
from . import recall, spoken_recall
from .kept import kept_shape
from .plots import DPI, FIGURES, draw, save
from .zero_resource import FREQUENCY_BANDS, comparison_table

Section = dict[str, Any]
# what a section asks, and how to read its answer
HEADINGS = {
    "zero_shot": (
        "Does it tell right from wrong speech?",
        "Pairs of recordings: it should find the right one likelier than the wrong one.",
    ),
    "long_context": ("Does it use what left the attention window?", "The same recording with TTT and with each part of it switched off."),
    "inner_loss": (
        "Do the inner models learn?",
        "They do where the three losses lie one below the other: W₀ never learned, Wₜ₋₁ has heard all before token t.",
    ),
    "dialogue": (
        "Does it behave in a conversation?",
        "It hears the user's side of each recording and answers; beside it stands the recorded answer.",
    ),
    "spoken_recall": (
        "Does it remember what it was told?",
        "Facts are told in speech, then other things, then it is asked; some facts are corrected.",
    ),
    "recall": (
        "Can it recall?",
        "Pairs are heard, then noise, then the keys again: small models trained for this alone, not the model above.",
    ),
}
TEMPLATE = Path(__file__).with_name("report.html")
WITHHELD = "withheld"  # why numbers of a conversation are not given


def write_report(results: dict[str, Any], folder: str | Path) -> Path:
    """Draw every part of `results` into `folder`/pictures and write `folder`/report.html with the pictures inside."""
    root = Path(folder)
    sections = {}
    for name, part in results["tasks"].items():
        with kept_shape(root / "results.json", name):  # parts may be of earlier runs
            sections[name] = _section(name, part, root / "pictures")
    # names come from settings and file names: escape them all
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    target = root / "report.html"
    atomic_write(target, template.render(results=results, sections=sections))
    return target


def _section(name: str, part: dict[str, Any], pictures: Path) -> Section:
    """A part as the template takes it: titles, table and picture."""
    title, question = HEADINGS.get(name, (name, ""))
    section: Section = {"note": "", "head": [], "rows": [], "picture": None, "title": title, "question": question}
    section["took"] = f"{part['seconds']:,.0f} s" if "seconds" in part else ""
    if table := TABLES.get(part.get("kind", "")):
        section |= table(part)
    if part.get("kind") in FIGURES:
        png = save(draw(part), inside(pictures, name))[0].read_bytes()
        width = int.from_bytes(png[16:20], "big") * 96 // DPI  # of PNG's header, in CSS pixels: the same size of letters in all
        section["picture"] = {"data": base64.b64encode(png).decode(), "width": width}
    return section


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _interval(bounds: list[float] | None, scale: float = 1.0, digits: int = 3) -> str:
    return "–" if bounds is None else f"{scale * bounds[0]:.{digits}f} to {scale * bounds[1]:.{digits}f}"


def zero_shot_section(part: dict[str, Any]) -> Section:
    """This model beside the published rows; then, in the note, how it was scored, with the intervals and groups of each task."""
    tasks = part["tasks"]
    table = comparison_table({name: task["accuracy"] for name, task in tasks.items()}, published=part["published"])
    rows = [[row["name"], *[_percent(row[name]) for name in tasks]] for row in table]
    rows.insert(1, ["95% interval", *[_interval(task["interval"], 100, 1) for task in tasks.values()]])
    scored = part["scoring"]
    for variant in next(iter(tasks.values()))["variants"]:
        if variant == f"weighted {scored['reduction']}":
            continue  # the first row
        rows.append([f"this model, {variant}", *[_percent(100 * task["variants"][variant]) for task in tasks.values()]])
    for name, task in tasks.items():
        for group, result in sorted(task["groups"].items(), key=lambda item: (FREQUENCY_BANDS.get(item[0], 0), item[0])):
            rows.append(
                [f"{name}: {group} ({result['items']} items)", *[_percent(100 * result["accuracy"]) if n == name else "" for n in tasks]]
            )
    note = f"Accuracy in percent; {scored['reduction']} of the weighted log-likelihood; " + ", ".join(
        f"{key} {scored[key]}" for key in ("text", "user", "semantic_weight", "acoustic_weight")
    )
    return {"head": ["", *tasks], "rows": rows, "note": note}


def long_context_section(part: dict[str, Any]) -> Section:
    """What TTT gains beyond the window over each control: mean difference of the losses, interval, p value."""
    rows = []
    for condition, streams in part["gains"].items():
        for stream, test in streams.items():
            p = "–" if test["p"] is None else "< 0.0001" if test["p"] < 1e-4 else f"{test['p']:.4f}"
            rows.append([f"{condition} − TTT, {stream}", f"{test['mean']:.4f}", _interval(test["interval"], digits=4), p, test["pairs"]])
    note = f"Loss beyond the window of {part['window']} frames, in nats; positive: TTT is better. Paired over {part['unit']}; one alone has no interval."
    return {"head": ["", "difference", "95% interval", "p", "pairs"], "rows": rows, "note": note}


def inner_loss_section(part: dict[str, Any]) -> Section:
    """Mean of the three inner losses of each layer, drift and gate."""
    rows = []
    for layer, curves in part["layers"].items():
        means = [sum(curves[key]) / len(curves[key]) for key in ("initial", "before", "after")]
        rows.append(
            [f"layer {layer}", *[f"{mean:.4f}" for mean in means], f"{curves['drift'][-1]:.3g}", f"{curves['gate']['mean_abs']:.3g}"]
        )
    head = ["", "ℓ(W₀; xₜ)", "ℓ(Wₜ₋₁; xₜ)", "ℓ(Wₜ; xₜ)", "drift ‖W − W₀‖", "mean |tanh α|"]
    return {"head": head, "rows": rows, "note": f"{part['recordings']} recordings, mini-batch {part['mini_batch_size']}."}


def dialogue_section(part: dict[str, Any]) -> Section:
    """The reference recordings beside what the model, and the one before fine-tuning, said over the same user."""
    names = [name for name in part["reference"] if name != WITHHELD]
    sides = {"reference": "recorded answer", "before": "before fine-tuning", "model": "this model"}
    sides = {side: head for side, head in sides.items() if side in part}
    rows = [[name, *[_number(part[side].get(name)) for side in sides]] for name in names]
    return {
        "head": ["", *sides.values()],
        "rows": rows,
        "note": " ".join([f"{part['recordings']} recordings.", *(_withheld(head, part[side]) for side, head in sides.items())]).strip(),
    }


def _withheld(head: str, numbers: dict[str, Any]) -> str:
    reason = numbers.get(WITHHELD)
    return f"Who spoke when is not known of {reason} ({head})." if reason else ""


def recall_section(part: dict[str, Any]) -> Section:
    """Accuracy of every model at every distance, with what attention reaches by itself in the note."""
    found = recall.panels(part)
    labels = list(dict.fromkeys(recall.label(part, cell) for cells in found.values() for cell in cells))
    rows = []
    for (name, pairs, told_after), cells in found.items():
        shown = {recall.label(part, cell): _percent(100 * cell["accuracy"]) for cell in cells}
        rows.append([name, pairs, told_after, *[shown.get(label, "") for label in labels]])
    return {"head": ["", "pairs", "told after", *labels], "rows": rows, "note": recall.note(part)}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


TABLES: dict[str, Callable[[dict[str, Any]], Section]] = {
    "zero_shot": zero_shot_section,
    "long_context": long_context_section,
    "inner_loss": inner_loss_section,
    "dialogue": dialogue_section,
    "spoken_recall": spoken_recall.section,
    "recall": recall_section,
}
