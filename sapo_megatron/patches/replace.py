"""What a patch needs of its host; and functions of ours in the place of a host's.

A host is checked before it is touched: that it is installed, that it is not older than what the
patch was written for, and that each function has the parameters which the patch gives or takes.
A newer release whose functions still fit is taken, with a warning.
"""

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.version import InvalidVersion, Version

from sapo_megatron.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Symbol:
    """A function of a host, or a method: ``name`` may have dots."""

    module: str
    name: str
    parameters: str
    """The names of all its parameters, in order, with commas between."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, kw_only=True)
class Host:
    """A pipeline that has a patch, and what the patch needs of it."""

    title: str
    distribution: str
    """The name of its package, whose metadata have the version."""
    module: str
    """A module of it whose ``__version__`` goes before the metadata's, if it has one."""
    verified: str
    """The version that the patch was verified against."""
    oldest: str
    """The first version that it fits."""
    symbols: tuple[Symbol, ...]

    def version(self) -> str | None:
        """Its version; ``unknown`` where none compares, None where the host is not installed."""
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name and f"{self.module}.".startswith(f"{error.name}."):
                return None
            raise
        try:
            found = getattr(module, "__version__", None) or metadata.version(self.distribution)
            Version(str(found))
        except (metadata.PackageNotFoundError, InvalidVersion):
            return "unknown"
        return str(found)


def check(host: Host) -> None:
    """Raises UserError for a host that is missing, too old, or differs in a symbol."""
    version = host.version()
    if version is None:
        raise UserError(
            f"{host.title}: expected {host.verified} (no module {host.module}), got none; install "
            f"it in this environment"
        )
    if too_old(host, version):
        raise UserError(
            f"{host.title}: expected {host.oldest} or later, got {version}; update it to "
            f"{host.verified}, which this patch was verified against"
        )
    if newer(host, version):
        fits = "%s %s: the patch was verified against %s; its functions still fit"
        logger.warning(fits, host.title, version, host.verified)
    for symbol in host.symbols:
        find(host, symbol)


def find(host: Host, symbol: Symbol) -> Callable[..., Any]:
    """The host's own function. Raises UserError for one that is missing or differs."""
    if symbol in _originals:
        return _originals[symbol]
    advice = f"take {host.verified}, which this patch was verified against"
    try:
        owner, last = _owner(symbol)
        function = getattr(owner, last)
    except (ImportError, AttributeError) as error:
        root = symbol.module.split(".")[0]
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] != root:
            advice = f"install {error.name}, which the host needs for it"
        expected, got = "it", str(error)
    else:
        found = ", ".join(inspect.signature(function).parameters)
        if found == symbol.parameters:
            return function
        expected, got = f"the parameters ({symbol.parameters})", f"({found})"
    raise UserError(
        f"{symbol}: expected {expected} in {host.title} {host.version()}, got {got}; {advice}"
    )


def replace(host: Host, symbol: Symbol, ours: Callable[..., Any]) -> None:
    """Put ``ours`` in the place of ``symbol``, for every later look at it.

    It gets the host's own function first, then what the host gives. Twice is as once: the second
    gets the host's own function too. Raises UserError for a symbol that is missing or differs, and
    where another module holds it by ``from ... import`` already, which this cannot reach.
    """
    original = find(host, symbol)
    owner, last = _owner(symbol)
    if symbol not in _originals:
        homes = (symbol.module, original.__module__)
        for name, module in list(sys.modules.items()):
            if name not in homes and getattr(module, "__dict__", {}).get(last) is original:
                raise UserError(
                    f"{symbol}: expected to replace it before {name} imports it, got {name} "
                    f"imported; patch first"
                )

    @functools.wraps(original)
    def with_original(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    setattr(owner, last, with_original)
    _originals[symbol] = original


def restore(*symbols: Symbol) -> None:
    """Put the host's own functions back; nothing happens where one was not replaced."""
    for symbol in symbols:
        if symbol in _originals:
            owner, last = _owner(symbol)
            setattr(owner, last, _originals.pop(symbol))


def with_argument(name: str, make: Callable[[Any], Any]) -> Callable[..., Any]:
    """For :func:`replace`: the host's function gets ``make`` of its argument ``name``."""

    def ours(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(*args, **kwargs)
        call.arguments[name] = make(call.arguments.get(name))
        return original(*call.args, **call.kwargs)

    return ours


def too_old(host: Host, version: str) -> bool:
    """Whether the patch was never meant for this version; False for ``unknown``."""
    return version != "unknown" and _release(version) < _release(host.oldest)


def newer(host: Host, version: str) -> bool:
    """Whether this version came out after the verified one; False for ``unknown``."""
    return version != "unknown" and _release(version) > _release(host.verified)


_originals: dict[Symbol, Callable[..., Any]] = {}


def _owner(symbol: Symbol) -> tuple[Any, str]:
    """The module or class that holds ``symbol``, and its name there."""
    owner: Any = importlib.import_module(symbol.module)
    *path, last = symbol.name.split(".")
    for name in path:
        owner = getattr(owner, name)
    return owner, last


def _release(version: str) -> Version:
    """The release that a version is of, or comes before: ``0.20.0rc1+cu130`` -> 0.20.0."""
    return Version(Version(version).base_version)
