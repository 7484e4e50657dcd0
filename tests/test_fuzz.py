"""What fuzzing has found once is refused ever since, and some fresh inputs of every kind."""

import pytest
from fuzz import CORPUS, KINDS, attack, finding

FRESH = 4


@pytest.mark.parametrize("path", sorted(path for path in CORPUS.iterdir() if path.suffix != ".md"), ids=lambda path: path.name)
def test_a_finding_of_before_is_none_now(path):
    assert finding(path.name.split("-")[0], path.read_bytes()) is None


@pytest.mark.parametrize("kind", list(KINDS))
def test_fresh_inputs_are_read_or_refused(kind):
    found = {number: problem for number in range(FRESH) if (problem := finding(kind, attack(kind, number)))}
    assert found == {}
