"""``python -m sapo_megatron.patches``: a host's own script with SAPO, or a recipe as its flags.

Exit status: that of the script; 2 where the input is wrong (one line on stderr says what).
"""

import argparse
import importlib
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sapo_megatron.errors import UserError, one_line
from sapo_megatron.recipe.load import load
from sapo_megatron.recipe.schema import AlgorithmConfig
from sapo_megatron.sample import Temperatures

USAGE = """python -m sapo_megatron.patches megatron_rl|nemo_rl -- SCRIPT [ITS FLAGS]
           --loss_type sapo|grpo [--tau_pos TAU] [--tau_neg TAU]
           [--vocab_parallel_logprobs]  (megatron_rl only)
       python -m sapo_megatron.patches ms_swift RECIPE

The other hosts are patched by flags of their own: docs/patches."""
SEE = "see python -m sapo_megatron.patches --help"


def main(argv: Sequence[str] | None = None) -> int:
    """The program, with ``argv`` or the command line; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        match words:
            case ["-h" | "--help"]:
                sys.stdout.write(f"usage: {USAGE}\n")
            case ["ms_swift", recipe]:
                from sapo_megatron.patches import ms_swift

                sys.stdout.write(shlex.join(ms_swift.flags(load(recipe))) + "\n")
            case ["megatron_rl" | "nemo_rl" as host, "--", script, *flags]:
                _run(host, script, flags)
            case _:
                got = shlex.join(words) or "nothing"
                raise UserError(
                    f"expected megatron_rl or nemo_rl, --, and its script, or ms_swift and a "
                    f"recipe, got {got}; {SEE}"
                )
    except UserError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {SEE}")


def _run(host: str, script: str, flags: Sequence[str]) -> None:
    """The script, as if by ``python SCRIPT FLAGS``, without those flags that are ours."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    parser.add_argument("--loss_type", choices=["sapo", "grpo"], required=True)
    parser.add_argument("--tau_pos", type=float, default=AlgorithmConfig.tau_pos)
    parser.add_argument("--tau_neg", type=float, default=AlgorithmConfig.tau_neg)
    if host == "megatron_rl":
        parser.add_argument("--vocab_parallel_logprobs", action="store_true")
    ours, rest = parser.parse_known_args(flags)
    if not Path(script).is_file():
        raise UserError(f"{script}: expected the script of {host}, got no such file; name it")
    # As python does for a script: what lies beside it can be imported.
    sys.path.insert(0, str(Path(script).resolve().parent))
    sys.argv = [script, *rest]
    if ours.loss_type == "sapo":
        _install(host, ours)
    runpy.run_path(script, run_name="__main__")


def _install(host: str, ours: argparse.Namespace) -> None:
    try:
        Temperatures(ours.tau_pos, ours.tau_neg)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    algorithm = AlgorithmConfig(tau_pos=ours.tau_pos, tau_neg=ours.tau_neg)
    known = ("loss_type", "tau_pos", "tau_neg")
    of_host = {name: value for name, value in vars(ours).items() if name not in known}
    importlib.import_module(f"sapo_megatron.patches.{host}").install(algorithm, **of_host)


if __name__ == "__main__":
    sys.exit(main())
