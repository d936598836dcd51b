"""Packages that a host imports beside its loss, stood in for where they are not installed."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock


class Anything(ModuleType):
    """A package with every name in it."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        found = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


class Finder:
    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.packages:
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Anything(spec.name)

    def exec_module(self, module):
        pass


def stand_in_for(packages):
    """Which of ``packages`` are not installed; from now on they import as empty shells."""
    missing = {name for name in packages if importlib.util.find_spec(name) is None}
    sys.meta_path.append(Finder(missing))
    return missing
