"""Whether a pipeline of others that is installed here fits its patch (:mod:`..patches`)."""

import contextlib
import importlib
import sys

from sapo_megatron.commands.doctor.finding import Finding
from sapo_megatron.errors import UserError, with_type
from sapo_megatron.patches.replace import Host, Symbol, find, newer, too_old


def examine_host(name: str) -> list[Finding]:
    """Its version, then each function that the patch calls or replaces. Imports the host."""
    host: Host = importlib.import_module(f"sapo_megatron.patches.{name}").HOST
    # What a host prints when it is imported is no finding.
    with contextlib.redirect_stdout(sys.stderr):
        version = _version(host)
        if version.status == "fail":
            return [version]
        return [version, *(_symbol(host, symbol) for symbol in host.symbols)]


def _version(host: Host) -> Finding:
    todo = f"Install {host.title} {host.verified} in this environment."
    try:
        version = host.version()
    except Exception as error:  # the host's own code, which may fail in any way
        return Finding(host.title, "fail", f"does not import: {with_type(error)}", todo)
    if version is None:
        return Finding(host.title, "fail", f"not installed: no module {host.module}", todo)
    if too_old(host, version):
        return Finding(host.title, "fail", f"{version}, expected {host.oldest} or later", todo)
    if version == "unknown" or newer(host, version):
        found = f"{version}; the patch was verified against {host.verified}"
        return Finding(host.title, "warn", found, "Look at the functions below: they must fit.")
    return Finding(host.title, "ok", version)


def _symbol(host: Host, symbol: Symbol) -> Finding:
    try:
        find(host, symbol)
    except UserError as error:
        found, todo = str(error).removeprefix(f"{symbol}: ").rsplit("; ", 1)
        todo = todo[0].upper() + todo[1:] + "."
        return Finding(symbol.name, "fail", f"{symbol.module}: {found}", todo)
    except Exception as error:
        return Finding(symbol.name, "fail", f"{symbol.module}: does not import: {with_type(error)}")
    return Finding(symbol.name, "ok", f"{symbol.module}: fits")
