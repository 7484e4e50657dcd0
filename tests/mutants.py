"""After `mutmut run`: the mutants that no test noticed, beside those that are known (mutants.json); one that is new is an error.

    make mutants                                                # all modules of setup.cfg's [mutmut]: some hours
    make mutants MUTANTS='*.frames_moshi_ttt.*'                 # one of them

mutmut numbers its mutants anew when code changes, so they are known by what they change in which function.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

KNOWN = Path(__file__).with_name("mutants.json")
UNNOTICED = ("survived", "no tests")


class Mutant(NamedTuple):
    """One change: the function as `module.Class.function`, the line as it was, and as the mutant has it."""

    where: str
    was: str
    now: str


def mutmut(*arguments: str) -> str:
    """What a mutmut command says."""
    return subprocess.run([sys.executable, "-m", "mutmut", *arguments], capture_output=True, text=True, check=True).stdout


def statuses(results: str) -> dict[str, str]:
    """Mutmut's name of each mutant -> what became of it, from `mutmut results --all true`."""
    return dict(line.strip().rsplit(": ", 1) for line in results.splitlines() if "__mutmut_" in line)  # type: ignore[arg-type]


def mutant(name: str, diff: str) -> Mutant:
    """A mutant from mutmut's name for it and its unified diff."""
    path, _, function = name.partition("__mutmut_")[0].rpartition(".")
    where = f"{path.rpartition('.')[2]}.{re.sub('^x[_ǁ]', '', function).replace('ǁ', '.')}"
    changed = {
        sign: [line[1:].strip() for line in diff.splitlines() if re.match(rf"{re.escape(sign)}(?!{re.escape(sign)})", line)]
        for sign in "-+"
    }
    return Mutant(where, " ".join(changed["-"]), " ".join(changed["+"]))


def known() -> dict[Mutant, str]:
    """The survivors that are known, and why each may survive."""
    return {Mutant(entry["where"], entry["was"], entry["now"]): entry["reason"] for entry in json.loads(KNOWN.read_text())}


def main() -> int:
    found = statuses(mutmut("results", "--all", "true"))
    run = {name: status for name, status in found.items() if status != "not checked"}
    unnoticed = {mutant(name, mutmut("show", name)): name for name, status in run.items() if status in UNNOTICED}
    new = sorted(unnoticed.keys() - known().keys())
    for one in new:
        print(f"{one.where}  ({unnoticed[one]})\n  - {one.was}\n  + {one.now}")
    counts = ", ".join(f"{count} {status}" for status, count in Counter(run.values()).most_common())
    print(f"{len(run)} of {len(found)} mutants run: {counts}; {len(new)} that no test notices are not in {KNOWN.name}")
    return 1 if new or not run else 0


if __name__ == "__main__":
    sys.exit(main())
