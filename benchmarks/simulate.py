"""What the recipes take, without a card: memory a GPU by kind, host memory, checkpoints, operations, and time by the roofline.

    python benchmarks/simulate.py lora_ttt_7b [key=value ...] [--launch fsdp2_8gpu] [--world 8] [--card A100] [--json file]
    python benchmarks/simulate.py --all [--card A100]      # every recipe, into simulate.json, the recipes' headers, SIMULATED.md and README.md
    python benchmarks/simulate.py --table                  # recipe x card, as README.md holds it

A recipe is launched as its own header says unless --launch names another accelerate configuration; --world replaces the number of processes.
--card chooses whether the TTT layers run in the kernels (H100, H200) or in torch (A100 and RTX 4090, whose shared memory is too small for
heads of 128). One simulation takes one to three minutes on one core.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from modeling_moshi_ttt.common.packaged import names, packaged, resolve
from modeling_moshi_ttt.training.cards import CARDS, GB
from modeling_moshi_ttt.training.dry_run import account, cure, fits, verdict
from modeling_moshi_ttt.training.launch import Launch
from modeling_moshi_ttt.training.run_config import load_run_config
from modeling_moshi_ttt.training.simulate import Simulation, simulate

HERE = Path(__file__).parent
NUMBERS = HERE / "simulate.json"
PAGES = (HERE / "SIMULATED.md", HERE.parent / "README.md")  # which hold the table
WAYS = ("H100", "A100")  # of one card the TTT kernels take, of one where they are not taken
HEADER = "# Simulated: "


def launch_of(recipe: str) -> str:
    """The accelerate configuration that a recipe's header names."""
    found = re.search(r"moshi-ttt train \S+ --launch (\w+)", Path(resolve("train", recipe)).read_text())
    return found[1] if found else "one_gpu"


def speed(one: Simulation, card: str) -> str:
    """Tokens a second at most, to three digits."""
    return f"{float(f'{one.tokens / one.step_seconds[card]:.3g}'):,.0f} tokens/s"


def header(found: dict[str, Any]) -> str:
    """The line that a recipe's header holds of its own numbers in simulate.json."""
    one = Simulation(**found["H100"])
    return (
        f"{HEADER}{one.peak / GB:.1f} GB a GPU; host memory of a node {one.host_start / GB:.0f} GB to start, {one.host_save / GB:.0f} GB to save; "
        f"on H100s at most {speed(one, 'H100')}."
    )


def with_header(text: str, line: str) -> str:
    """A recipe with this line behind its first comment, in place of an earlier one."""
    lines = [each for each in text.split("\n") if not each.startswith(HEADER)]
    end = next(i for i, each in enumerate(lines) if each in ("#", "") or not each.startswith("#"))
    return "\n".join([*lines[:end], line, *lines[end:]])


def table(numbers: dict[str, Any]) -> str:
    """Recipe x card in Markdown."""
    rows = ["| recipe | launch | " + " | ".join(CARDS) + " |", "|---|---|" + "---|" * len(CARDS)]
    for recipe, found in numbers.items():
        run, launch, cells = load_run_config(recipe), Launch.read(found["launch"]), []
        for card in CARDS.values():
            one = next((Simulation(**found[way]) for way in WAYS if way in found and card.name in found[way]["step_seconds"]), None)
            if one is None:
                cells.append("not simulated: TTT in torch")
                continue
            memory = f"{one.peak / GB:.1f} GB"
            cells.append(
                f"fits, {memory}, ≤ {speed(one, card.name)}"
                if fits(one, card)
                else f"does not fit, {memory}. {cure(run, launch, one, card)}"
            )
        rows.append(f"| `{recipe}` | `{found['launch']}`, {found['world']} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def everything(card: str) -> dict[str, Any]:
    """Every recipe, each in a process of its own; kept as they come, beside those of the other way."""
    numbers = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    way = WAYS[0] if CARDS[card].shared >= CARDS[WAYS[0]].shared else WAYS[1]
    for recipe in names("train"):
        print(f"simulating {recipe}", flush=True)
        launch = launch_of(recipe)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            subprocess.run([sys.executable, __file__, recipe, "--card", way, "--json", file.name], check=True)
            found = {way: json.loads(Path(file.name).read_text())}
        numbers[recipe] = numbers.get(recipe, {}) | {"launch": launch, "world": Launch.read(launch).processes} | found
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


def write(numbers: dict[str, Any]) -> None:
    """The numbers into the recipes' headers, and the table into its pages."""
    for recipe, found in numbers.items():
        path = Path(packaged("train", recipe))
        path.write_text(with_header(path.read_text(), header(found)))
    for page in PAGES:
        text = page.read_text()
        begin = text.index("| recipe |")
        page.write_text(text[:begin] + table(numbers) + "\n\n" + text[begin:].partition("\n\n")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--launch")
    parser.add_argument("--world", type=int)
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_intermixed_args()
    if args.all or args.table:
        numbers = everything(args.card) if args.all else json.loads(NUMBERS.read_text())
        if args.all:
            write(numbers)
        print(table(numbers))
        return
    if args.recipe is None:
        parser.error("name a recipe, or --all, or --table")
    begin, run = time.perf_counter(), load_run_config(args.recipe, args.overrides)
    launch, card = Launch.read(args.launch or launch_of(args.recipe), args.world), CARDS[args.card]
    found = simulate(run, launch, card)
    print(f"{args.recipe}, {launch.processes} processes, TTT {'in Triton' if found.kernels else 'in torch'}")
    print("\n".join([*account(found), *(verdict(run, launch, found, CARDS[name]) for name in found.step_seconds)]))
    print(f"simulated in {time.perf_counter() - begin:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(found.to_dict(), indent=1))


if __name__ == "__main__":
    main()
