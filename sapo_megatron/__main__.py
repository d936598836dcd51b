"""The command line: ``sapo-megatron train | plan | eval | export | report | samples | gates |
doctor | qualify``.

Exit status: 0 done, 1 the work failed, 2 the input is wrong (one line on stderr says what).
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sapo_megatron.errors import RunFailed, UserError, not_installed, one_line
from sapo_megatron.files import write_whole
from sapo_megatron.launcher import STORE, join, launch
from sapo_megatron.patches import HOSTS

if TYPE_CHECKING:
    from sapo_megatron.recipe.schema import Recipe

logger = logging.getLogger("sapo_megatron")

ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "NCCL_DEBUG": "WARN",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}
"""What a process that trains has in its environment unless it is set there. ``launch/env.sh`` says
what each is for, and sets what torchrun needs besides."""

PATHS = ("recipe", "resume", "checkpoint", "out", "run", "run_dir", "json")
"""Words that are paths, of which ``~`` and ``$NAME`` are understood."""


LONGEST = 1500
"""Characters of an error that are shown."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in words
    join()
    _set_up_logging(debug)
    _set_up_environment()
    try:
        arguments, rest = _parser().parse_known_args(words)
        from sapo_megatron.recipe.load import expanded  # --help does without

        for name, word in vars(arguments).items():
            if name in PATHS and isinstance(word, str):
                setattr(arguments, name, expanded(word, name))
        arguments.words, arguments.rest = words, rest
        if rest and not hasattr(arguments, "recipe"):
            raise UserError(
                f"{arguments.name}: expected its own words only, got also {' '.join(rest)}; see "
                f"sapo-megatron {arguments.name} --help"
            )
        return arguments.command(arguments)
    except UserError as error:
        return _fail(error, 2, debug, everywhere=False)
    except RunFailed as error:
        return _fail(error, 1, debug, everywhere=False)
    except ModuleNotFoundError as error:
        if not (mistake := not_installed(error)):
            raise
        return _fail(mistake, 2, debug, everywhere=False)
    except OSError as error:  # a full disk, say, and maybe on this process alone
        status = 2 if error.errno == errno.ENAMETOOLONG else 1
        return _fail(error, status, debug, everywhere=True)
    except RuntimeError as error:
        if "RANK" not in os.environ:
            raise
        if lost := re.search(r"Connection (closed|reset) by peer|[Tt]imed out|NCCL", str(error)):
            what = RunFailed(
                f"no answer of the other ranks ({lost[0]}); they tell why, or are gone"
            )
            return _fail(what, 1, debug, everywhere=True)
        return _fail(error, 1, True, everywhere=True)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    """What each command takes; the words that change a recipe are left over."""
    parser = _Parser(
        prog="sapo-megatron",
        description="SAPO reinforcement learning for Mixture-of-Experts models on Megatron-Core.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(function: Callable, help: str) -> argparse.ArgumentParser:
        name = function.__name__.removeprefix("_")
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")
        sub.set_defaults(command=function, name=name)
        return sub

    def recipe_command(function: Callable, help: str, usage: str) -> argparse.ArgumentParser:
        sub = command(function, help)
        sub.add_argument("recipe", help="a YAML file, or the name of a recipe that is shipped")
        sub.usage = f"{sub.prog} RECIPE {usage} [--debug] [--KEY VALUE | SECTION.KEY=VALUE]..."
        return sub

    train = recipe_command(
        _train,
        "Train a recipe. Anything in it can be changed on the line.",
        "[--resume auto|PATH [--new-data]]",
    )
    resume = "go on with the newest run that has a checkpoint, or with this run or checkpoint"
    train.add_argument("--resume", metavar="auto|PATH", help=resume)
    new_data = "go on in other training data, at the number of the problem that was to come"
    train.add_argument("--new-data", action="store_true", help=new_data)
    plan = recipe_command(
        _plan,
        "Say what a recipe needs of its cluster; needs no GPU itself.",
        "[--gpu NAME] [--nodes N] [--mean-length TOKENS] [--json]",
    )
    mean = "mean tokens of a sequence, prompt included; without it, the longest"
    plan.add_argument("--mean-length", type=int, metavar="TOKENS", help=mean)
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    checkpoint = "a run folder, or one checkpoint of it"
    scores = "Score a run on the held-out problems of a recipe."
    evaluate = recipe_command(_eval, scores, "--checkpoint PATH [--out FILE]")
    evaluate.add_argument("--checkpoint", required=True, metavar="PATH", help=checkpoint)
    evaluate.add_argument("--out", metavar="FILE", help="write the scores here, as JSON")
    export = recipe_command(
        _export,
        "Write the weights of a run as a Hugging Face folder.",
        "--checkpoint PATH --out FOLDER",
    )
    export.add_argument("--checkpoint", required=True, metavar="PATH", help=checkpoint)
    export.add_argument("--out", required=True, metavar="FOLDER", help="a folder that is not there")
    report = command(_report, "Draw a run's report: pictures and one HTML page.")
    report.add_argument("run", help="a run folder, finished or not")
    _add_samples(command(_samples, "Print what the model wrote in a step, and what came of it."))
    _add_gates(command(_gates, "Compare what gates keep of the gradient of dumped tokens."))
    _add_doctor(command(_doctor, "Check what is installed and what this machine has."))
    _add_qualify(command(_qualify, "Compare what this machine's GPUs compute with the CPU."))
    return parser


def _add_samples(samples: argparse.ArgumentParser) -> None:
    samples.add_argument("run", help="a run folder, finished or not")
    samples.add_argument("--step", type=int, metavar="N", help="this step, not the last one")
    worst = "only the group with the lowest mean reward"
    samples.add_argument("--worst", action="store_true", help=worst)


def _add_gates(gates: argparse.ArgumentParser) -> None:
    gates.add_argument("dumps", nargs="+", metavar="DUMP", help="a token dump, or a folder of them")
    gates.add_argument(
        "--gate",
        action="append",
        default=[],
        metavar="NAME:VALUE,VALUE",
        help="sapo:TAU_POS,TAU_NEG, a loss that clips with CLIP_LOW,CLIP_HIGH, or another by its "
        "name; repeat it for more; without it, one of each",
    )
    gates.add_argument(
        "--attenuation",
        type=float,
        default=0.95,
        metavar="W",
        help="mean weight for which to suggest temperatures (default 0.95)",
    )
    gates.add_argument("--json", metavar="FILE", help="write the numbers here, as JSON")
    gates.add_argument("--out", metavar="FOLDER", help="draw gates.png into this folder")


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument("--json", action="store_true", help="write a JSON list, not a table")
    doctor.add_argument(
        "--run-dir", default="runs", metavar="DIR", help="where runs will be written (default runs)"
    )
    doctor.add_argument(
        "--host",
        choices=HOSTS,
        help="look instead at a pipeline that is to be patched (docs/patches)",
    )


def _add_qualify(qualify: argparse.ArgumentParser) -> None:
    qualify.add_argument("--section", choices=("A", "B", "C"), help="only these checks")
    qualify.add_argument("--json", action="store_true", help="write a JSON list, not a table")
    qualify.add_argument("--list", action="store_true", help="say what the checks are; run none")


def _train(arguments: argparse.Namespace) -> int:
    from sapo_megatron.runs.folder import find_place
    from sapo_megatron.training.inputs import Inputs

    recipe = _load(arguments)
    fresh = not find_place(recipe, arguments.resume).checkpoints

    def work(inputs: Inputs) -> None:
        from sapo_megatron.training.loop import train

        summary = train(recipe, inputs, arguments.resume, new_data=arguments.new_data)
        if summary and summary["steps"] and _is_main():
            _report_apart(Path(summary["report"]).parents[1])

    return _on_all_processes(recipe, arguments.words, work, fresh=fresh)


def _report_apart(run: Path) -> None:
    """Draw the report in a process of its own: one that trains has no use for matplotlib."""
    words = [sys.executable, "-m", "sapo_megatron", "report", str(run)]
    if subprocess.run(words, check=False).returncode:
        logger.warning("the report was not drawn; try sapo-megatron report %s", run)


def _plan(arguments: argparse.Namespace) -> int:
    recipe = _load(arguments)
    # Before torch looks: the plan is the same on a machine with GPUs and on one without.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from sapo_megatron.commands.plan import plan
    from sapo_megatron.commands.plan.render import as_json, as_table, verdict

    made = plan(recipe, arguments.mean_length)
    as_text = as_table(made, colour=sys.stdout.isatty())
    sys.stdout.write(json.dumps(as_json(made), indent=2) + "\n" if arguments.json else as_text)
    if not made.fits:
        raise RunFailed(f"{recipe.name}: {verdict(made)}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from sapo_megatron.training.inputs import Inputs

    recipe = _load(arguments)
    data = recipe.data  # without that of training, where problems of its own are held out
    data = dataclasses.replace(data, train=data.eval or data.train)
    recipe = dataclasses.replace(recipe, data=data)
    out = Path(arguments.out) if arguments.out else None
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"--out: expected a file in a folder that exists, got {out}; name another")

    def work(inputs: Inputs) -> None:
        from sapo_megatron.training.session import evaluate_checkpoint

        scores = evaluate_checkpoint(recipe, inputs, Path(arguments.checkpoint))
        if not _is_main():
            return
        sys.stdout.write("".join(f"{name} {score:.4f}\n" for name, score in scores.items()))
        if out:
            write_whole(out, json.dumps(scores, indent=2) + "\n")

    return _on_all_processes(recipe, arguments.words, work, fresh=False)


def _export(arguments: argparse.Namespace) -> int:
    from sapo_megatron.hf.architecture import Architecture

    recipe = _load(arguments)
    out = Path(arguments.out)
    if out.exists():
        raise UserError(f"--out: expected a folder that is not there yet, got {out}; name another")

    def work(model: tuple[Path, Architecture]) -> None:
        from sapo_megatron.training.session import export_checkpoint

        export_checkpoint(recipe, *model, Path(arguments.checkpoint), out)

    return _on_all_processes(recipe, arguments.words, work, fresh=None)


def _report(arguments: argparse.Namespace) -> int:
    from sapo_megatron.commands.report import write_report

    write_report(arguments.run)
    return 0


def _samples(arguments: argparse.Namespace) -> int:
    from sapo_megatron.commands.samples import show_samples

    text = show_samples(Path(arguments.run), arguments.step, worst=arguments.worst)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads it, less or head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _gates(arguments: argparse.Namespace) -> int:
    from sapo_megatron.commands.gates import compare_gates

    text = compare_gates(
        arguments.dumps, arguments.gate, arguments.attenuation, arguments.json, arguments.out
    )
    sys.stdout.write(text)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from sapo_megatron.commands.doctor import examine, examine_host, show

    host = arguments.host
    findings = examine_host(host) if host else examine(Path(arguments.run_dir))
    sys.stdout.write(show(findings, as_json=arguments.json))
    return int(any(finding.status == "fail" for finding in findings))


def _qualify(arguments: argparse.Namespace) -> int:
    from sapo_megatron.commands.qualify import first_failure, listed, qualify, read_machine, show

    if arguments.list:
        sys.stdout.write(listed(arguments.section))
        return 0
    outcomes = qualify(arguments.section, read_machine())
    sys.stdout.write(show(outcomes, as_json=arguments.json))
    if failed := first_failure(outcomes):
        raise RunFailed(
            f"{failed.check}: expected {failed.expected}, got {failed.got}; docs/gpu.md says what "
            f"it proves"
        )
    return 0


def _on_all_processes(
    recipe: Recipe, words: list[str], work: Callable, *, fresh: bool | None
) -> int:
    """Do ``work(inputs)`` on each process of the recipe's layout.

    Those are the processes that torchrun, or something like it, started; or else as few as the
    layout takes, on this machine, each with the command line ``words``. The inputs are those of
    ``read_inputs`` with ``fresh``, or, where it is None, of ``read_model``.
    """
    # Here, not above: other commands, and mistakes in the recipe, do without.
    from sapo_megatron.recipe.check import smallest_world
    from sapo_megatron.training.inputs import preflight, read_inputs, read_model

    launched = "RANK" in os.environ
    processes = _launched_world() if launched else smallest_world(recipe.parallel)
    if fresh is None:
        inputs: Any = read_model(recipe, processes, weights=False)
    else:  # once a machine: what all would stumble over, one looks for and tells
        inputs = (preflight if _speaks() else read_inputs)(recipe, processes, fresh=fresh)
    if not launched and processes > 1:
        return launch(processes, ["sapo_megatron", *words])
    if STORE in os.environ and not recipe.rollout.servers:  # to which NCCL brings the weights
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    work(inputs)
    from sapo_megatron.policy import parallel

    parallel.shutdown()
    return 0


def _load(arguments: argparse.Namespace) -> Recipe:
    from sapo_megatron.recipe.load import load

    return load(arguments.recipe, _overrides(arguments.rest))


def _overrides(words: Sequence[str]) -> dict[str, str]:
    """``--key value``, ``--key=value`` and ``section.key=value`` -> key to YAML text."""
    overrides: dict[str, str] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--") or not words or words[0].startswith("--"):
                raise UserError(
                    f"{word}: expected --key value or section.key=value, got no value for it"
                )
            value = words.pop(0)
        overrides[key] = value
    return overrides


def _launched_world() -> int:
    """The number of processes that were started. Raises UserError where that is not said."""
    meeting = () if STORE in os.environ else ("MASTER_ADDR", "MASTER_PORT")
    for name in ("WORLD_SIZE", *meeting):
        if not os.environ.get(name):
            raise UserError(
                f"{name}: expected it in the environment beside RANK, got none; start with "
                f"torchrun, or unset RANK"
            )
    for name in ("RANK", "WORLD_SIZE", *meeting[1:]):
        if not os.environ[name].isdecimal():
            raise UserError(f"{name}: expected a whole number, got {os.environ[name]!r}; change it")
    return int(os.environ["WORLD_SIZE"])


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _speaks() -> bool:
    """Whether this process tells what is wrong: one does on each machine."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def _set_up_logging(debug: bool) -> None:
    """Plain lines on stderr; of ranks above 0 only what is wrong."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logger.setLevel(logging.DEBUG if debug else logging.INFO if _is_main() else logging.ERROR)


def _set_up_environment() -> None:
    """:data:`ENVIRONMENT`, before torch is imported and starts CUDA."""
    older = "PYTORCH_CUDA_ALLOC_CONF"  # the name that releases of torch before 2.9 read
    if older in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", os.environ[older])
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[older] = os.environ["PYTORCH_ALLOC_CONF"]


def _fail(error: Exception, status: int, debug: bool, *, everywhere: bool) -> int:
    """``everywhere``: the other processes may not know of this error."""
    if debug:
        logger.exception("")
    if everywhere or _speaks():
        of_a_rank = "RANK" in os.environ and (everywhere or not _is_main())
        who = f"rank {os.environ['RANK']}: " if of_a_rank else ""
        sys.stderr.write(f"error: {who}{one_line(error, LONGEST)}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
