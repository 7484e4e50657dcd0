"""Modules under the names they had in version 0.2: importing one gives the module of today, with a DeprecationWarning, until version 0.4."""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
REMOVED_IN = "0.4"
FORMER = {
    "common.adapters": "adapters.bases",
    "common.audio": "data.audio",
    "common.recordings": "data.recordings",
    "evaluation.books": "data.long_recordings",
    "evaluation.voice": "data.voice",
    "tools": "hub",
    "tools.adapter": "adapters.checks",
    "tools.card": "hub.card",
    "tools.carried_code": "hub.carried_code",
    "tools.cli": "cli",
    "tools.convert": "conversion.tables",
    "tools.convert_checkpoint": "conversion.convert",
    "tools.convert_lora": "conversion.lora",
    "tools.convert_mimi": "conversion.mimi",
    "tools.convert_old_ttt": "conversion.old_ttt",
    "tools.init": "common.init_folder",
    "tools.kyutai_config": "conversion.kyutai_config",
    "tools.probe": "hub.probe",
    "tools.pull": "hub.pull",
    "tools.push": "hub.push",
    "tools.remote": "hub.remote",
    "tools.shards": "common.safetensor_files",
    "tools.stage": "hub.stage",
    "tools.verify": "hub.verify",
    "training.annotate": "data.annotate",
    "training.archives": "data.archives",
    "training.codes": "data.codes",
    "training.data": "training.windows",
    "training.prepare": "data.prepare",
    "training.sources": "data.sources",
    "training.state": "training.checkpoint",
}


class _TodaysModule(importlib.abc.InspectLoader):
    """Gives the module that stands at `name` today, itself and not a copy, so that its classes stay one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has just written the former name's over it

    def get_source(self, fullname: str) -> str:
        """What `python -m` runs under the former name."""
        return f"import runpy\nrunpy.run_module({self.name!r}, run_name='__main__')\n"


class _FormerNames(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        home, _, name = fullname.partition(".")
        if home != PACKAGE or name not in FORMER:
            return None
        today = f"{PACKAGE}.{FORMER[name]}"
        warnings.warn(f"{fullname} is {today} now; the former name goes in {REMOVED_IN}", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, _TodaysModule(today), is_package=name == "tools")


def install() -> None:
    """Have the import system ask here first: a former package has the path of the one of today, whose modules would be loaded twice."""
    if not any(isinstance(finder, _FormerNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FormerNames())
