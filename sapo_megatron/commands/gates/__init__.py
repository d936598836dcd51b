"""``sapo-megatron gates DUMP...``: what other gates would have done to a run's own tokens.

:mod:`.gate` names a gate, :mod:`.compare` runs every gate over a dump, :mod:`.show` and
:mod:`.figure` tell and draw what came out.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from sapo_megatron.commands.gates.compare import compare
from sapo_megatron.commands.gates.gate import default_gates, parse_gate
from sapo_megatron.commands.gates.show import as_json, as_text
from sapo_megatron.errors import UserError
from sapo_megatron.files import write_whole
from sapo_megatron.runs.dump import read_dumps

logger = logging.getLogger(__name__)


def compare_gates(
    dumps: Sequence[str],
    gates: Sequence[str],
    attenuation: float,
    json_file: str | None,
    out: str | None,
) -> str:
    """The comparison as text; also writes it as JSON and draws ``gates.png`` into ``out``.

    ``dumps``: files and folders; ``gates``: as on the command line, none for the usual ones.
    Raises UserError for whatever is wrong with them, before anything is written.
    """
    wanted = [parse_gate(text) for text in gates]
    if not 0 < attenuation < 1:
        raise UserError(
            f"--attenuation: expected a mean weight between 0 and 1 (both excluded), got "
            f"{attenuation:g}; change it"
        )
    if json_file and (Path(json_file).is_dir() or not Path(json_file).parent.is_dir()):
        raise UserError(
            f"--json: expected a file in a folder that exists, got {json_file}; name another"
        )
    if out and any(p.exists() and not p.is_dir() for p in (Path(out), *Path(out).parents)):
        raise UserError(f"--out: expected a folder, or a name for one, got {out}; name another")
    dump = read_dumps(dumps)
    comparison = compare(dump, wanted or default_gates(dump.settings), attenuation)
    if json_file:
        write_whole(Path(json_file), as_json(comparison))
        logger.info("json: %s", json_file)
    if out:
        from sapo_megatron.commands.gates.figure import draw  # the tables do without matplotlib

        Path(out).mkdir(parents=True, exist_ok=True)
        write_whole(Path(out) / "gates.png", draw(comparison))
        logger.info("figure: %s", Path(out) / "gates.png")
    return as_text(comparison)
