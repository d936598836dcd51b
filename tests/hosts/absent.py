"""Packages that a host imports beside its loss, stood in for where they are not installed."""

import importlib.util
import sys
import typing
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock

import typing_extensions


class Anything(ModuleType):
    """A package with every name in it."""

    __version__ = "0"

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


def newer_names_of_typing():
    """Give ``typing`` what a later Python has there: hosts are written for 3.12 and later."""
    for name in typing_extensions.__all__:
        if not hasattr(typing, name):
            setattr(typing, name, getattr(typing_extensions, name))
