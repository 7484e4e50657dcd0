"""Imports run one way, and the flat files, which travel to the Hub alone, need nothing but torch and transformers."""

import ast
import re
import sys
from pathlib import Path

import pytest

import modeling_moshi_ttt

PACKAGE = Path(modeling_moshi_ttt.__file__).parent
ROOT = Path(__file__).parents[1]
NAME = "modeling_moshi_ttt"
HOME_ONLY = {"__init__.py", "cli.py", "former_names.py", "version.py"}
FLAT = sorted(path for path in PACKAGE.glob("*.py") if path.name not in HOME_ONLY)
ALLOWED_OUTSIDE = {"torch", "transformers", "numpy", "triton", "huggingface_hub", "safetensors"} | set(sys.stdlib_module_names)
# A sub-package may import those it lists, and the flat files.
MAY_IMPORT = {
    "common": set(),
    "data": {"common"},
    "adapters": {"common"},
    "training": {"common", "data", "adapters"},
    "evaluation": {"common", "data", "adapters"},
    "conversion": {"common", "data", "adapters"},
    "live": {"common", "data", "adapters"},
    "hub": {"common", "data", "adapters", "training", "evaluation", "conversion", "live"},
}
# Left from the move to these rooms; each goes as its room is put in order.
TO_GO = {
    ("adapters/checks.py", "hub"),
    ("adapters/checks.py", "training"),
    ("conversion/convert.py", "hub"),
}
SUB_FILES = sorted(path for name in MAY_IMPORT for path in (PACKAGE / name).rglob("*.py"))
# The layers of the flat files, lowest first: a file may import from its own layer and from lower ones.
LAYERS = [
    {"errors_moshi_ttt"},
    {"versions_moshi_ttt", "rings", "rows", "sampling_moshi_ttt", "tokens_moshi_ttt"},
    {"configuration_moshi_ttt", "delay_pattern", "frames_moshi_ttt", "loss_moshi_ttt", "mimi_stream", "processing_moshi_ttt", "resampling"}
    | {"ttt_reference", "ttt_dual", "ttt_state", "ttt_functions", "ttt_scan", "ttt_scan_op", "ttt_decode"},
    {"ttt_kernels", "ttt_kernels_device", "ttt_kernels_linear", "ttt_kernels_mlp"},
    {"ttt_ops"},
    {"ttt_layer", "cache_moshi_ttt"},
    {"outputs_moshi_ttt"},
    {"stream_moshi_ttt", "depth_decoder", "attention_moshi_ttt", "prompt_moshi_ttt"},
    {"generation_settings_moshi_ttt"},
    {"generation_moshi_ttt"},
    {"quantization_moshi_ttt"},
    {"modeling_moshi_ttt"},
]


def imports(path: Path) -> list[tuple[int, str, list[str]]]:
    """(level, module, names) of every import of a file, wherever it stands: in functions, conditions and TYPE_CHECKING blocks too."""
    found: list[tuple[int, str, list[str]]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", [alias.name for alias in node.names]))
    return found


def identity(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FLAT, ids=identity)
def test_flat_files_import_only_siblings_and_the_allowed_packages(path):
    siblings = {other.stem for other in FLAT}
    for level, module, names in imports(path):
        if level == 0:
            assert module.split(".")[0] in ALLOWED_OUTSIDE, f"{path.name} imports {module}"
        else:
            assert level == 1, f"{path.name} imports from above the package: {module}"
            assert module in siblings, f"{path.name} imports {names} from .{module}: only `from .sibling import name` survives on the Hub"


@pytest.mark.parametrize("path", FLAT, ids=identity)
def test_flat_files_name_no_import_that_the_hub_would_take_for_one(path):
    """transformers scans the text for imports, docstrings and comments included."""
    text = path.read_text()
    assert not re.findall(rf"^\s*(?:from|import)\s+{NAME}\b", text, re.MULTILINE)
    assert not re.findall(r"^\s*from\s+\.\s+import", text, re.MULTILINE)
    assert not re.findall(r"^\s*from\s+\.\.", text, re.MULTILINE)


@pytest.mark.parametrize("path", FLAT, ids=identity)
def test_flat_files_import_downwards(path):
    height = {name: level for level, names in enumerate(LAYERS) for name in names}
    assert path.stem in height, f"say in LAYERS where {path.name} stands"
    for level, module, _ in imports(path):
        if level:
            assert height[module] <= height[path.stem], f"{path.name} imports {module}, which stands above it"


def test_triton_is_guarded():
    """Where Triton is absent the Hub's loader must not ask for it: only an import inside `try` is optional to it."""
    for path in FLAT:
        for block in ast.parse(path.read_text()).body:
            modules = [alias.name for node in ast.walk(block) if isinstance(node, ast.Import) for alias in node.names]
            modules += [node.module or "" for node in ast.walk(block) if isinstance(node, ast.ImportFrom) and not node.level]
            if any(module.split(".")[0] == "triton" for module in modules):
                assert isinstance(block, ast.Try), f"{path.name} imports triton outside of try"


def test_the_reference_shares_no_code_with_what_it_judges():
    assert [module for level, module, _ in imports(PACKAGE / "ttt_reference.py") if level] in ([], ["ttt_state"])


@pytest.mark.parametrize("path", SUB_FILES, ids=identity)
def test_sub_packages_import_one_way(path):
    house = path.relative_to(PACKAGE).parts[0]
    for level, module, names in imports(path):
        assert not (level == 0 and module.split(".")[0] == NAME), f"{identity(path)} imports {module} absolutely"
        depth = len(path.relative_to(PACKAGE).parts) - 1
        if level <= depth:
            continue  # inside its own sub-package
        targets = [module.split(".")[0]] if module else names
        for target in targets:
            if target in MAY_IMPORT and (identity(path), target) not in TO_GO:
                assert target in MAY_IMPORT[house] | {house}, f"{identity(path)} imports {target}"


def test_nothing_of_the_package_imports_what_stands_around_it():
    around = {path.name for path in ROOT.iterdir() if path.is_dir()} - {NAME}
    for path in [*FLAT, *SUB_FILES]:
        for level, module, _ in imports(path):
            assert level or module.split(".")[0] not in around - ALLOWED_OUTSIDE, f"{identity(path)} imports {module}"


def test_no_pickle_is_read_or_written():
    for path in [*FLAT, *SUB_FILES]:
        for level, module, _ in imports(path):
            assert level or module.split(".")[0] not in {"pickle", "dill", "joblib"}, f"{identity(path)} imports {module}"
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
            assert "weights_only=True" in call, f"{identity(path)}: {call}"


def test_special_tokens_have_one_home():
    """Their numbers and names stand in tokens_moshi_ttt.py alone; padding ids are a configuration's."""
    homes = {
        "12.5": "tokens_moshi_ttt.py",
        "-100": "tokens_moshi_ttt.py",
        "'SPEAKER_MAIN'": "tokens_moshi_ttt.py",
        "'SPEAKER_USER'": "tokens_moshi_ttt.py",
    }
    found: dict[str, set[str]] = {}
    for path in [*FLAT, *SUB_FILES]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Constant, ast.UnaryOp)) and (text := ast.unparse(node)) in homes:
                found.setdefault(text, set()).add(identity(path))
    assert found == {text: {home} for text, home in homes.items()}
