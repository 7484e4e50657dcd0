"""The list of mutants that may survive is kept: each is of today's code and has a reason; and what `make mutants` finds is read rightly."""

import json
from configparser import ConfigParser
from pathlib import Path

import mutants
import pytest
from mutants import Mutant

ROOT = Path(__file__).parents[1]
DIFF = """--- modeling_moshi_ttt/cache_moshi_ttt.py
+++ modeling_moshi_ttt/cache_moshi_ttt.py
@@ -1,3 +1,3 @@
 def reset(self) -> None:
-    self.ttt_state = None
+    self.ttt_state = ""
"""
RESULTS = """    modeling_moshi_ttt.cache_moshi_ttt.xǁMoshiTTTCacheLayerǁreset__mutmut_1: survived
    modeling_moshi_ttt.frames_moshi_ttt.x_align__mutmut_1: killed
    modeling_moshi_ttt.frames_moshi_ttt.x_align__mutmut_2: not checked
"""
SURVIVOR = Mutant("cache_moshi_ttt.MoshiTTTCacheLayer.reset", "self.ttt_state = None", 'self.ttt_state = ""')


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return {key: value.split("\n")[1:] for key, value in parser["mutmut"].items() if "\n" in value}


def test_the_modules_and_tests_it_names_are_there(settings):
    for key in ("only_mutate", "pytest_add_cli_args_test_selection", "also_copy"):
        assert settings[key]
        assert [path for path in settings[key] if not (ROOT / path).exists()] == []


def test_every_known_survivor_is_of_todays_code_and_has_a_reason(settings):
    code = {Path(path).stem: " ".join((ROOT / path).read_text().split()) for path in settings["only_mutate"]}
    for one, reason in mutants.known().items():
        module, _, function = one.where.partition(".")
        assert one.was in code[module], f"{one.where} no longer holds {one.was!r}: take it out of the list"
        assert f"def {function.rpartition('.')[2]}(" in code[module]
        assert len(reason.split()) >= 4


@pytest.mark.parametrize(("known", "code"), [([], 1), ([SURVIVOR], 0)])
def test_a_survivor_that_is_not_in_the_list_fails(monkeypatch, tmp_path, capsys, known, code):
    monkeypatch.setattr(mutants, "mutmut", lambda command, *_: RESULTS if command == "results" else DIFF)
    monkeypatch.setattr(mutants, "KNOWN", tmp_path / "mutants.json")
    mutants.KNOWN.write_text(json.dumps([one._asdict() | {"reason": "it is read as a truth value alone"} for one in known]))
    assert mutants.main() == code
    said = capsys.readouterr().out
    assert f"2 of 3 mutants run: 1 survived, 1 killed; {code} that no test notices" in said
    assert (SURVIVOR.where in said) == bool(code)


def test_a_run_over_nothing_fails(monkeypatch):
    monkeypatch.setattr(mutants, "mutmut", lambda *_: RESULTS.splitlines()[-1])
    assert mutants.main() == 1
