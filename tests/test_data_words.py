"""Words as people have them: each oddity is counted, mended, refused or kept, and the text stream is right; every layout gives the same."""

import json

import numpy as np
import pytest
import soundfile
from hub_checkpoints import small_processor

from modeling_moshi_ttt.data import limits
from modeling_moshi_ttt.data.cache import CodesCache
from modeling_moshi_ttt.data.prepared import odd_words, prepare
from modeling_moshi_ttt.data.settings import DataSettings
from modeling_moshi_ttt.data.word_files import find_words, read_words
from modeling_moshi_ttt.data.words import Said, WordReport, mend, recording_text

MAIN, USER = "SPEAKER_MAIN", "SPEAKER_USER"
GOOD = [["he", [0.2, 0.5], MAIN], ["you", [1.0, 1.3], MAIN]]
KEPT = [("he", 0.2, 0.5), ("you", 1.0, 1.3)]
SECONDS = 4.0

# What is written between GOOD's two words, what became of it, and the words then.
ODDITIES = {
    "no times": (["me", [None, None], MAIN], {"interpolated": 1}, ("me", 0.5, 1.0)),
    "no start": ({"word": "me", "end": 0.9, "speaker": MAIN}, {"interpolated": 1}, ("me", 0.5, 0.9)),
    "no end": ({"word": "me", "start": 0.6, "speaker": MAIN}, {"interpolated": 1}, ("me", 0.6, 1.0)),
    "neither": ({"word": "me", "speaker": MAIN}, {"interpolated": 1}, ("me", 0.5, 1.0)),
    "nan": (["me", [float("nan"), 0.9], MAIN], {"interpolated": 1}, ("me", 0.5, 0.9)),
    "infinite": (["me", [0.6, float("inf")], MAIN], {"interpolated": 1}, ("me", 0.6, 1.0)),
    "400 digits": (["me", [10**400, 10**400], MAIN], {"interpolated": 1}, ("me", 0.5, 1.0)),
    "times as strings": (["me", ["0.6", "0.9"], MAIN], {}, ("me", 0.6, 0.9)),
    "before the start": (["me", [-0.1, 0.15], MAIN], {"clamped": 1}, ("me", 0.0, 0.15)),
    "past the end": (["me", [3.8, 4.2], MAIN], {"clamped": 1}, ("me", 3.8, 4.0)),
    "outside": (["me", [4.1, 4.2], MAIN], {"dropped": 1}, None),
    "ends before it starts": (["me", [0.9, 0.6], MAIN], {"dropped": 1}, None),
    "without duration": (["me", [0.6, 0.6], MAIN], {"dropped": 1}, None),
    "empty": (["", [0.6, 0.9], MAIN], {"dropped": 1}, None),
    "blank": (["  ", [0.6, 0.9], MAIN], {"dropped": 1}, None),
    "no text": ([None, [0.6, 0.9], MAIN], {"dropped": 1}, None),
    "a number": ([42, [0.6, 0.9], MAIN], {"dropped": 1}, None),
    "10 MB": (["x" * 10**7, [0.6, 0.9], MAIN], {"dropped": 1}, None),
    "half a character": (["\ud83d", [0.6, 0.9], MAIN], {"dropped": 1}, None),
    "spaces inside": (["me we", [0.6, 1.0], MAIN], {"split": 1}, ("me", 0.6, 0.8)),
    "twice the same": (["he", [0.2, 0.5], MAIN], {"dropped": 1}, None),
    "another shape": (7, {"dropped": 1}, None),
    "cannot be written": (["hé!", [0.6, 0.9], MAIN], {"dropped": 1}, None),
    "out of order": (["me", [0.05, 0.15], MAIN], {}, ("me", 0.05, 0.15)),
}


@pytest.fixture(scope="module")
def processor():
    return small_processor()


def write(path, words):
    path.write_text(json.dumps({"alignments": words}))
    return path


@pytest.mark.parametrize("oddity", ODDITIES)
def test_an_odd_word_is_counted_and_the_others_stay(tmp_path, processor, oddity):
    item, counts, becomes = ODDITIES[oddity]
    words, report = read_words(write(tmp_path / "a.json", [GOOD[0], item, GOOD[1]]), SECONDS, "repair")
    text, unwritten = recording_text(processor, words, 50, "repair")
    assert report + unwritten == WordReport(**counts)
    found = [(word, round(start, 6), round(end, 6)) for word, (start, end), _ in words]
    assert set(KEPT) <= set(found)
    assert becomes is None or becomes in found
    expected = [(word, times, speaker) for word, times, speaker in words if word != "hé!"]
    assert text.tolist() == processor.text_frames(expected, 50)
    if counts:
        with pytest.raises(ValueError, match="word 1 |cannot encode"):
            recording_text(processor, read_words(tmp_path / "a.json", SECONDS, "refuse")[0], 50, "refuse")


def test_a_report_counts_the_odd_words_of_every_file(tmp_path, processor):
    for name, (item, _, _) in ODDITIES.items():
        soundfile.write(tmp_path / f"{name}.flac", np.zeros((round(SECONDS * 8000), 2)), 8000)
        write(tmp_path / f"{name}.json", [GOOD[0], item, GOOD[1]])
    settings = DataSettings(str(tmp_path))
    lines, total = odd_words(prepare(str(tmp_path), settings, CodesCache(tmp_path / "cache", processor)).table)
    counts = {name: WordReport(**count) for name, (_, count, _) in ODDITIES.items() if count}
    assert sorted(lines) == sorted(f"{tmp_path / name}.flac: {report}" for name, report in counts.items())
    assert total == sum(counts.values(), WordReport())


def test_kept_words_are_as_they_were_and_counted(tmp_path):
    odd = [["he", [3.8, 9.0], MAIN], ["a b", [1.0, 1.0], MAIN]]
    words, report = read_words(write(tmp_path / "a.json", odd), SECONDS, "keep")
    assert words == (("a b", (1.0, 1.0), MAIN), ("he", (3.8, 9.0), MAIN))
    assert report == WordReport(kept=2)


def test_words_of_one_time_keep_their_order():
    said = [Said(text, 1.0, 1.2, MAIN) for text in ("z", "a", "m")]
    assert [word[0] for word in mend(said, SECONDS, "repair", "x")[0]] == ["z", "a", "m"]


def test_times_of_another_unit_are_refused_and_so_are_too_many_words(tmp_path, monkeypatch):
    for policy in ("repair", "refuse"):
        with pytest.raises(ValueError, match=r"a\.json: 1 of 1 words.* are the times in seconds"):
            read_words(write(tmp_path / "a.json", [["he", [100, 400], MAIN]]), SECONDS, policy)
    monkeypatch.setattr(limits, "WORDS", 3)
    with pytest.raises(ValueError, match=r"a\.json: 4 words are more than the 3"):
        read_words(write(tmp_path / "a.json", GOOD + GOOD), SECONDS, "repair")
    monkeypatch.setattr(limits, "WORDS_BYTES", 10)
    with pytest.raises(ValueError, match=r"a\.json: the words take"):
        read_words(tmp_path / "a.json", SECONDS, "repair")


TEXT_GRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 4
tiers? <exists>
size = 3
item []:
"""


def tier(number, name, intervals):
    lines = [f"    item [{number}]:", '        class = "IntervalTier"', f'        name = "{name}"', "        xmin = 0", "        xmax = 4"]
    lines.append(f"        intervals: size = {len(intervals)}")
    for i, (start, end, text) in enumerate(intervals, 1):
        lines += [f"        intervals [{i}]:", f"            xmin = {start}", f"            xmax = {end}", f'            text = "{text}"']
    return "\n".join(lines) + "\n"


def layouts():
    """The same four words in each layout: file name and text."""
    said = [("he", 0.2, 0.5, "A"), ("you", 1.0, 1.3, "B"), ("we", 1.5, 2.0, "A"), ("me", 2.5, 3.0, "B")]
    label = {"A": MAIN, "B": USER}
    j_moshi = [{"speaker": who, "word": text, "start": start, "end": end} for text, start, end, who in said]
    segments = [{"start": s, "end": e, "text": t, "speaker": label[w], "words": [{"word": t, "start": s, "end": e}]} for t, s, e, w in said]
    grid = [(name, [(s, e, t) for t, s, e, w in said if w == who]) for name, who in (("A", "A"), ("user", "B"))]
    tiers = "".join(tier(i + 1, *one) for i, one in enumerate([*grid, ("A - phones", [(0.2, 0.5, "h")])]))
    yield "a.json", json.dumps({"alignments": [[t, [s, e], label[w]] for t, s, e, w in said]})
    yield "a.json", "\ufeff" + json.dumps(j_moshi)
    yield "a.json", json.dumps({"segments": segments, "word_segments": [], "language": "en"})
    yield (
        "a.ctm",
        ";; by hand\n" + "\r\n".join(f"a {'1' if w == 'A' else '2'} {s} {e - s} {t} 0.9" for t, s, e, w in said) + "\nother 1 0 1 no",
    )
    yield "a.TextGrid", TEXT_GRID + tiers


@pytest.mark.parametrize(("name", "text"), layouts())
def test_every_layout_gives_the_same_words(tmp_path, name, text):
    (tmp_path / name).write_text(text, newline="")
    (tmp_path / "a.wav").touch()
    path = find_words(tmp_path / "a.wav", "")
    words, report = read_words(path, SECONDS, "refuse")
    assert report == WordReport()
    assert [(word, round(start, 6), round(end, 6), who) for word, (start, end), who in words] == [
        ("he", 0.2, 0.5, MAIN),
        ("you", 1.0, 1.3, USER),
        ("we", 1.5, 2.0, MAIN),
        ("me", 2.5, 3.0, USER),
    ]


def test_a_torn_text_grid_is_named(tmp_path):
    (tmp_path / "a.TextGrid").write_text(TEXT_GRID.replace("size = 3", "size") + "item [1")
    with pytest.raises(ValueError, match=r"a\.TextGrid"):
        read_words(tmp_path / "a.TextGrid", SECONDS, "refuse")


def test_words_lie_beside_in_text_or_where_a_pattern_says(tmp_path):
    for folder in ("audio/x", "text/x", "labels"):
        (tmp_path / folder).mkdir(parents=True)
    sound = tmp_path / "audio" / "x" / "a.wav"
    assert find_words(sound, "") is None
    (tmp_path / "text" / "x" / "a.json").write_text("[]")
    assert find_words(sound, "") == tmp_path / "text" / "x" / "a.json"
    (tmp_path / "labels" / "a.words.json").write_text("[]")
    assert find_words(sound, "../../labels/{stem}.words.json").resolve() == (tmp_path / "labels" / "a.words.json").resolve()
    assert find_words(sound, "{stem}.nothing") is None


def test_another_label_may_be_moshis(processor):
    words = (("he", (0.2, 0.5), "SPEAKER_00"), ("you", (1.0, 1.3), "SPEAKER_01"))
    with pytest.raises(ValueError, match="data.main_speaker"):
        recording_text(processor, words, 50)
    text, _ = recording_text(processor, words, 50, main_speaker="SPEAKER_00")
    assert np.array_equal(text, processor.text_frames([("he", (0.2, 0.5), MAIN)], 50))


def test_a_language_without_spaces_loses_no_frame():
    """As rinna's tokenizers for Japanese: words do not begin with the mark, which is a token by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("\u2581", -3.0)]
    pieces += [(word, -5.0) for word in ("こんにちは", "元気", "です", "か")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    processor = small_processor()
    processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    words = [("こんにちは", 0.16, 0.3, MAIN), ("元気", 0.4, 0.5, MAIN), ("です", 0.48, 0.5, MAIN), ("か", 0.56, 0.7, MAIN)]
    stream = processor.text_frames(words, 10)
    assert [token for token in stream if token > 3] == [5, 6, 7, 8]
    assert processor.decode_text(stream) == "こんにちは元気ですか"
    assert processor.words(stream) == [("こんにちは", 0.16), ("元気ですか", 0.4)]
