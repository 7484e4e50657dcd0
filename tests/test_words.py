"""Identifiers use one word for one thing, and the spelling of the libraries around us (CONTRIBUTING, "Words")."""

import ast
import re

import pytest
from tree import ROOT

NOT = ("fingerprint", "behaviour", "colour", "centre", "centred", "normalise", "summarise", "recogniser", "recognise", "neighbour", "eta")
FORMER = {"codec_fingerprint", "fingerprint"}  # a name of 0.2 that answers until 0.4; a key of results.json


def identifiers(tree: ast.AST) -> set[str]:
    """Names of functions, classes and arguments, and those that something is bound to."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "modeling_moshi_ttt").rglob("*.py")), ids=lambda path: path.name)
def test_identifiers_are_the_fields_words(path):
    names = identifiers(ast.parse(path.read_text())) - FORMER
    words = {name: set(re.findall(r"[a-z]+", re.sub(r"([A-Z])", r"_\1", name).lower())) for name in names}
    assert {name for name, parts in words.items() if parts & set(NOT)} == set()
