"""Score a model on spoken benchmarks and long recordings. Takes settings files (paths, or bare names of packaged ones) and key=value pairs
that override them; resumes where it stopped; writes results.json, pictures and a report.html that stands alone into the output folder."""

from __future__ import annotations

import argparse

from ..common.settings import describe, load_settings
from ..errors_moshi_ttt import MoshiTTTError
from .settings import EvaluateSettings


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "settings", nargs="+", help="YAML files or bare names such as recall, and key=value pairs that apply to each of them"
    )
    parser.epilog = describe(EvaluateSettings)


def run(args: argparse.Namespace) -> int:
    files = [word for word in args.settings if "=" not in word]
    overrides = [word for word in args.settings if "=" in word]
    # all files are read before the first run: a typo in the last must not come out after hours
    runs = [load_settings(EvaluateSettings, path, overrides, kind="evaluate") for path in (files or [None])]
    places = [f"{name} is given for the output {settings.output}" for settings in runs for name in settings.sections]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise MoshiTTTError(f"{place} by two files; give each an output folder of its own.")
    from .runner import check, run_evaluation

    for settings in runs[1:]:
        check(settings)
    for settings in runs:
        print(run_evaluation(settings))
    return 0
