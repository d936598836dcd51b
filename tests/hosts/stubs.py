"""Modules that need a GPU's software, as empty ones, so that what imports them can be imported."""

import importlib.abc
import importlib.machinery
import sys
import types


class Stub(types.ModuleType):
    """Any name in it is a class of that name."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, *names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if any(f"{name}.".startswith(f"{stub}.") for stub in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


def install(*names):
    """These modules, and all below them, are empty from now on."""
    sys.meta_path.insert(0, Finder(*names))
