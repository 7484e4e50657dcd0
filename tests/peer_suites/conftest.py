"""Brings the peers' tests onto the path, and marks what does not apply: such a test must fail, every entry of the list must meet one."""

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))

import not_applying
import sources

for package in sources.STAND_INS:
    sys.path.insert(0, str(sources.suite(package)))


def pytest_collection_modifyitems(config, items):
    reasons, met = not_applying.read("tests"), set()
    for item in items:
        patterns = not_applying.matching(item.nodeid.removeprefix("tests/peer_suites/"), reasons)
        met.update(patterns)
        for pattern in patterns:
            item.add_marker(pytest.mark.xfail(reason=reasons[pattern], strict=True))
    whole = not config.option.keyword and not any("::" in argument for argument in config.args)
    if whole and (idle := sorted(set(reasons) - met)):
        raise pytest.UsageError(f"{not_applying.PATH.name} lists tests that do not exist: {', '.join(idle)}; take them out.")
