"""Numbers about memory on the pages are those of the committed measurements, and nobody types them."""

import json
import re
import sys

import pytest
from tree import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import measured


@pytest.mark.parametrize("page", measured.PAGES)
def test_a_page_says_what_was_measured(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert measured.BLOCK.search(text)
    assert measured.written(text) == text, f"{page}: run `python docs/measured.py`"


def test_another_number_is_written_over():
    page = "Before <!-- measured: spoken_sentence -->99% after 35 s<!-- /measured -->, and after."
    said = measured.spoken_sentence()
    assert measured.written(page) == f"Before <!-- measured: spoken_sentence -->{said}<!-- /measured -->, and after."
    assert re.fullmatch(r"\d+% after 35 s for voices of its training, \d+% for others, against \d+( to \d+)?% without that memory", said)


@pytest.mark.parametrize("name", sorted({*measured.DRAWN, *measured.VOICES.values()}))
def test_a_measurement_names_its_command_seed_and_date(name):
    data = json.loads((measured.PICTURES / name).read_text())
    for part in data["tasks"].values() if "tasks" in data else [data]:
        assert "moshi-ttt" in part["command"]
        assert isinstance(part["settings"]["seed"], int)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", part["date"])
