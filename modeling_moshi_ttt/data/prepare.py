"""Encode recordings once: Mimi codes of every recording go into a cache that training reads.

A source is a .jsonl manifest, a .tar shard or .parquet of sounds, a folder of these or of sound files, or hub:owner/name[/part] of a
data set on the Hub; several are written "one.jsonl:2,two.jsonl:1". A run whose data.cache is the same folder finds everything there.
"""

from __future__ import annotations

import argparse
import dataclasses


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("sources", help='what to prepare: "path:weight,path:weight"')
    parser.add_argument("--processor", required=True, help="folder or Hub name of the processor with its codec, or tiny")
    parser.add_argument("--cache", required=True, help="folder that the codes go to")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad files out instead of stopping at the end")
    parser.add_argument("--allow-outside", action="store_true", help="accept absolute paths and '..' in manifests")
    parser.add_argument("--columns", default="", metavar="ROLE=NAME,…", help="parquet columns of other names, as data.columns in a recipe")
    parser.add_argument("--require-words", action="store_true", help="a recording without words beside it is a bad file")


def run(args: argparse.Namespace) -> int:
    """Prepare the sources and say what there is; bad files are reported together at the end."""
    from tqdm import tqdm

    from ..common.files import make_folder
    from ..tokens_moshi_ttt import FRAME_RATE
    from .codec import read_processor
    from .codes import CodesCache, says_words
    from .prepared import prepare_set
    from .settings import DataSettings, check_columns

    settings = dataclasses.replace(
        DataSettings(train=args.sources),
        on_bad_files="skip" if args.skip_bad else "stop",
        allow_outside=args.allow_outside,
        require_words=args.require_words,
        columns=dict(pair.partition("=")[::2] for pair in filter(None, args.columns.split(","))),
    )
    check_columns(settings.columns)
    processor = read_processor(args.processor, "--processor")
    cache = CodesCache(make_folder(args.cache, "--cache"), processor)
    found = prepare_set(args.sources, settings, cache, lambda items: tqdm(items, desc="encoding"))
    spoken = sum(says_words(recording.text, processor.text_padding_ids) for recording in found.recordings)
    hours = sum(found.lengths) / FRAME_RATE / 3600
    print(f"{len(found.recordings)} recordings, {hours:.2f} hours, {spoken} of them with words; codes in {cache.folder}")
    return 0
