"""Encode recordings once: Mimi codes and text tokens of every recording go into a cache that training reads, with an index of them.

A source is a .jsonl manifest, a .tar shard or .parquet of sounds, a folder of these or of sound files, or hub:owner/name[/part] of a
data set on the Hub; several are written "one.jsonl:2,two.jsonl:1". A run whose data.cache is the same folder finds everything there; a
run whose data.train is the index (with the same data.cache) needs neither sounds nor words, and starts in seconds.
"""

from __future__ import annotations

import argparse
import dataclasses

from .shard import add_shard, read_shard


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("sources", help='what to prepare: "path:weight,path:weight"')
    parser.add_argument("--processor", required=True, help="folder or Hub name of the processor with its codec, or tiny")
    parser.add_argument("--cache", required=True, help="folder that the codes go to")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad files out instead of stopping at the end")
    parser.add_argument("--allow-outside", action="store_true", help="accept absolute paths and '..' in manifests")
    parser.add_argument("--columns", default="", metavar="ROLE=NAME,…", help="parquet columns of other names, as data.columns in a recipe")
    parser.add_argument("--require-words", action="store_true", help="a recording without words is a bad file")
    parser.add_argument(
        "--words", choices=("repair", "refuse", "keep"), default="repair", help="odd words, as data.words (default: repair)"
    )
    parser.add_argument("--words-files", default="", metavar="PATTERN", help='as data.words_files: "../text/{stem}.json"')
    parser.add_argument("--main-speaker", metavar="LABEL", help="label of Moshi's words, as data.main_speaker")
    parser.add_argument("--mono-is", choices=("moshi", "user"), help="whose voice a mono recording is; without it they are refused")
    parser.add_argument("--device", default="cpu", help="where the codec runs, as in cuda:0 (default: cpu)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="recordings encoded side by side (default: 1)")
    add_shard(parser, "the recordings")


def run(args: argparse.Namespace) -> int:
    """Prepare the sources and say what there is; bad files are reported together at the end."""
    from ..common.files import make_folder
    from ..common.progress import progress_bar
    from .cache import CodesCache
    from .codec import read_processor, to_device
    from .prepared import hours, prepare, say_what_is_odd
    from .settings import DataSettings, check_columns

    settings = dataclasses.replace(
        DataSettings(train=args.sources),
        on_bad_files="skip" if args.skip_bad else "stop",
        allow_outside=args.allow_outside,
        require_words=args.require_words,
        columns=dict(pair.partition("=")[::2] for pair in filter(None, args.columns.split(","))),
        words=args.words,
        words_files=args.words_files,
        mono_is=args.mono_is,
        **({"main_speaker": args.main_speaker} if args.main_speaker else {}),
    )
    check_columns(settings.columns)
    shard = read_shard(args.shard)
    processor = to_device(read_processor(args.processor, "--processor"), args.device)
    cache = CodesCache(make_folder(args.cache, "--cache"), processor, args.batch_size)
    found = prepare(args.sources, settings, cache, lambda items: progress_bar(items, desc="encoding"), shard)
    say_what_is_odd(found)
    spoken = sum(found.table.column("speaks").to_pylist())
    share = "" if shard.total == 1 else f"shard {shard.number} of {shard.total}: "
    print(f"{share}{len(found.table)} recordings, {hours(found.table):.2f} hours, {spoken} of them with words; codes in {cache.folder}")
    if found.index is not None:
        print(f"index: {found.index}")
    return 0
