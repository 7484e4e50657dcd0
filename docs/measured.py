"""What the pages say of committed measurements: `python docs/measured.py` draws the pictures and writes the numbers of docs/pictures/*.json into the
pages anew, between `<!-- measured: NAME -->` and `<!-- /measured -->`."""

import re
import sys
from pathlib import Path

from modeling_moshi_ttt.cli import main as moshi_ttt
from modeling_moshi_ttt.evaluation import recall
from modeling_moshi_ttt.evaluation.compare import read
from modeling_moshi_ttt.evaluation.formatting import duration, percent
from modeling_moshi_ttt.evaluation.recall_task import share_within_reach

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
DRAWN = ("recall.json", "spoken_recall.json")
PAGES = ("README.md", "docs/measurements.md", "docs/tutorials/memory.md", "configuration/model/remembering/README.md")
VOICES = {"voices of training": "spoken_recall.json", "voices never heard": "spoken_recall_held_out_voices.json"}
WITHOUT = ("window only", "gate 0")
BLOCK = re.compile(r"(<!-- measured: (\w+) -->)(.*?)(<!-- /measured -->)", re.DOTALL)
ROWS = {"TTT": "{}", "window only": "{}, within attention's reach alone", "full attention": "{}, attention over everything",
        "gate 0": "{}, TTT gate at 0", "frozen at W0": "{}, memory frozen at W0"}  # fmt: skip


def spoken(file):
    """The runs of a spoken recall: condition -> {(corrected, from): cell}."""
    runs = read(PICTURES / file)["spoken_recall"]["runs"]
    return {label: {(cell["corrected"], cell["from"]): cell for cell in run["cells"]} for label, run in runs.items()}


def spoken_sentence():
    """Facts told once, 35 s before."""
    trained, others = (spoken(file) for file in VOICES.values())
    without = sorted(100 * found[next(filter(found.get, WITHOUT))][False, 35]["accuracy"] for found in (trained, others))
    told = [percent(found["TTT"][False, 35]["accuracy"], 0) for found in (trained, others)]
    spread = " to ".join(dict.fromkeys(f"{share:.0f}" for share in without))
    return f"{told[0]}% after 35 s for voices of its training, {told[1]}% for others, against {spread}% without that memory"


def spoken_table():
    found = {ROWS[label].format(voices): cells for voices, file in VOICES.items() for label, cells in spoken(file).items()}
    columns = sorted({key for cells in found.values() for key in cells})
    names = [
        f"{'corrected' if corrected else 'told'}, {f'{duration(low)} later' if low else 'asked at once'}" for corrected, low in columns
    ]
    rows = [[name, *(shown(cells.get(key)) for key in columns)] for name, cells in found.items()]
    return table(["percent right", *names], rows)


def shown(cell):
    worst = f", worst {percent(cell['worst'], 0)}" if cell and "worst" in cell else ""
    return f"{percent(cell['accuracy'], 0)} ({'–'.join(percent(bound, 0) for bound in cell['interval'])}){worst}" if cell else "–"


def symbols():
    return read(PICTURES / "recall.json")["recall"]


def symbol_table():
    part = symbols()
    rows = []
    for run in part["runs"]:
        there = [cell for cell in run["results"] if not share_within_reach(cell["pairs"], cell["distance"], part["window"])]
        pairs = sorted({cell["pairs"] for cell in there})
        shares = [[cell["accuracy"] for cell in there if cell["pairs"] == count] for count in pairs]
        training = f"{run['training']['steps']:,} steps, {run['training']['cpu_seconds']:.0f} s of CPU"
        rows.append([run["name"], *(f"{percent(sum(one) / len(one), 0)}%" for one in shares), training])
    head = ["recall beyond the reach of attention", *(f"{count} pairs" for count in pairs), "training"]
    return f"Chance is {percent(part['chance'], 0)}%.\n\n" + table(head, rows)


def symbol_lines():
    part = symbols()
    first = {one.name for one in recall.RecallSettings().variants}
    lines = recall.summary(part | {"runs": [run for run in part["runs"] if run["name"] in first]})[:-1]
    return "\n".join(["```text", *lines, "```"])


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


BLOCKS = {one.__name__: one for one in (spoken_sentence, spoken_table, symbol_table, symbol_lines)}


def written(text):
    """A page with its numbers as the measurements have them."""

    def block(match):
        edge = "\n" if match[3].startswith("\n") else ""
        return f"{match[1]}{edge}{BLOCKS[match[2]]()}{edge}{match[4]}"

    return BLOCK.sub(block, text)


def main():
    for page in PAGES:
        path = ROOT / page
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
    return moshi_ttt(["plot", *(str(PICTURES / file) for file in DRAWN)])


if __name__ == "__main__":
    sys.exit(main())
