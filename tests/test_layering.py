"""Imports run one way, and the flat files, which travel to the Hub alone, need nothing but torch and transformers."""

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
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
KERNELS = {"ttt_kernels_device", "ttt_kernels_linear", "ttt_kernels_mlp"}  # in Triton's language
FILES = sorted(PACKAGE.rglob("*.py"))
SUB_FILES = sorted(path for name in MAY_IMPORT for path in (PACKAGE / name).rglob("*.py"))
# The layers of the flat files, lowest first: a file may import from its own layer and from lower ones.
LAYERS = [
    {"errors_moshi_ttt"},
    {"stored_config_moshi_ttt"},
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


def test_every_flat_file_is_typed_strictly():
    """All but what is written in Triton's own language."""
    (section,) = re.findall(rf"^\[mypy-({NAME}\..*)\]$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert set(section.split(",")) == {f"{NAME}.{path.stem}" for path in FLAT if path.stem not in KERNELS}


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
            if target in MAY_IMPORT:
                assert target in MAY_IMPORT[house] | {house}, f"{identity(path)} imports {target}"


def imported_files(path: Path) -> set[Path]:
    """The package's files that a file imports, wherever the import stands."""
    home, found = path.relative_to(PACKAGE).parts, set()
    for level, module, names in imports(path):
        if level:
            place = PACKAGE.joinpath(*home[: len(home) - level], *filter(None, module.split(".")))
            named = (
                [place.with_suffix(".py")] if module and place.with_suffix(".py").is_file() else [place / f"{name}.py" for name in names]
            )
            found |= {file for file in named if file.is_file()} or {place / "__init__.py"}
    return found


def test_no_imports_run_in_a_circle():
    """File by file, over the whole package."""
    graph = {path: set(imported_files(path)) for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(identity(path) for path in reversed(error.args[1])))


def test_nothing_of_the_package_imports_what_stands_around_it():
    around = {path.name for path in ROOT.iterdir() if path.is_dir()} - {NAME}
    for path in [*FLAT, *SUB_FILES]:
        for level, module, _ in imports(path):
            assert level or module.split(".")[0] not in around - ALLOWED_OUTSIDE, f"{identity(path)} imports {module}"


CODE = [path for name in (NAME, "tests", "benchmarks", "examples", "hub", "docs") for path in sorted((ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize("path", [path for path in CODE if "golden" not in path.parts], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path):
    """500 lines a file, 60 a function; a Triton kernel is one function, however long."""
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    if path.stem in KERNELS:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, node.name


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
    found["-100"].discard("common/files.py")  # AT_FDCWD of a system call
    assert found == {text: {home} for text, home in homes.items()}
