"""Token dumps: what every token of a mini-batch looked like to the loss, as parquet.

One file holds the tokens that one rank saw in one update, a row each:

==================  ========  ===================================================================
``sequence``        int64     uid of the response, unique within the mini-batch
``position``        int32     place of the token in its sequence
``old_logprob``     float32   log-prob under the policy that sampled, nats
``logprob``         float32   log-prob under the policy that is updated, nats
``advantage``       float32
``mask``            bool      whether the token counts in the loss
``layers_changed``  int16     MoE layers whose chosen experts differ from the old policy's; null
                              where that is not known, as for dense models
==================  ========  ===================================================================

The schema's metadata hold ``sapo_megatron_dump``, the version of this format, and
``sapo_megatron_info``, a :class:`DumpInfo` as JSON. Together the files of a mini-batch hold each
token once: the ranks of a data- and context-parallel group write, tensor-parallel copies do not.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch import Tensor

from sapo_megatron.errors import UserError, first_problem, one_line
from sapo_megatron.files import whole_file
from sapo_megatron.sample import PackedBatch

VERSION = "1"
VERSION_KEY, INFO_KEY = b"sapo_megatron_dump", b"sapo_megatron_info"
SCHEMA = pa.schema(
    [
        pa.field("sequence", pa.int64(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("old_logprob", pa.float32(), nullable=False),
        pa.field("logprob", pa.float32(), nullable=False),
        pa.field("advantage", pa.float32(), nullable=False),
        pa.field("mask", pa.bool_(), nullable=False),
        pa.field("layers_changed", pa.int16()),
    ]
)
UNKNOWN = -1
"""``layers_changed`` of a token for which it is not known; null in the file."""


@dataclass(frozen=True, kw_only=True)
class DumpRows:
    """N tokens, a row each; every tensor is [N], on any device, of any dtype that fits the column.

    Example: two tokens of response 57, the second masked: ``DumpRows(sequence=[57, 57],
    position=[3, 4], old_logprob=[-0.1, 0], logprob=[-0.2, 0], advantage=[1, 1], mask=[T, F],
    layers_changed=[2, 0])``.
    """

    sequence: Tensor
    position: Tensor
    old_logprob: Tensor
    logprob: Tensor
    advantage: Tensor
    mask: Tensor
    layers_changed: Tensor
    """:data:`UNKNOWN` where it is not known."""

    @classmethod
    def of(
        cls, batch: PackedBatch, logprob: Tensor, layers_changed: Tensor | None = None
    ) -> "DumpRows":
        """The valid tokens of a micro-batch, on the CPU.

        ``logprob`` [T], nats, of the policy that is updated; ``layers_changed`` int [T], None where
        it is not known.
        """
        if layers_changed is None:
            layers_changed = torch.full_like(batch.mask, UNKNOWN, dtype=torch.int16)
        assert batch.old_logprob is not None, "old_logprob is set before the first update"
        uids = torch.tensor(batch.sample_uids, device=batch.mask.device)

        def valid(x: Tensor) -> Tensor:
            return x.detach()[batch.mask].cpu()

        return cls(
            sequence=valid(uids[batch.sequence_ids]),
            position=valid(batch.position_ids),
            old_logprob=valid(batch.old_logprob),
            logprob=valid(logprob),
            advantage=valid(batch.advantages),
            mask=valid(batch.mask),
            layers_changed=valid(layers_changed),
        )

    @classmethod
    def cat(cls, parts: Iterable["DumpRows"]) -> "DumpRows":
        """The rows of several micro-batches or files, of which there is at least one."""
        columns = [vars(part) for part in parts]
        return cls(**{name: torch.cat([c[name] for c in columns]) for name in SCHEMA.names})


@with_config(ConfigDict(extra="forbid", allow_inf_nan=False))
@dataclass(frozen=True, kw_only=True)
class DumpInfo:
    """The mini-batch that a file belongs to, and the objective that it was trained with.

    Example: ``DumpInfo(step=10, update=3, loss_type="sapo", tau_pos=1.0, tau_neg=1.05,
    loss_agg_mode="seq-mean-token-mean")``.
    """

    step: int
    update: int
    """The number of the mini-batch in the step, from 0."""
    loss_type: str
    tau_pos: float
    tau_neg: float
    loss_agg_mode: str

    @property
    def settings(self) -> dict[str, str | float]:
        """The objective, without the place in the run."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in ("step", "update")}


_INFO: TypeAdapter[DumpInfo] = TypeAdapter(DumpInfo)


@dataclass(frozen=True, kw_only=True)
class Dump:
    """One or several mini-batches, read back: N tokens on the CPU, S sequences."""

    rows: DumpRows
    """All tokens, with the dtypes of the columns."""
    sequence_ids: Tensor
    """int64 [N], index of each token's sequence, 0 .. S-1: one response in one mini-batch."""
    lengths: Tensor
    """int64 [S], valid tokens of each whole sequence."""
    mini_batches: tuple[DumpInfo, ...]
    """The mini-batches in the order of training; they differ in step and update only."""
    files: int

    @property
    def settings(self) -> DumpInfo:
        """The objective, the same for all mini-batches."""
        return self.mini_batches[0]


def write_dump(path: Path, rows: DumpRows, info: DumpInfo) -> None:
    """Write one rank's rows of one mini-batch, whole or not at all; makes the folder.

    Columns are rounded to their dtypes (float64 log-probs to float32). N may be 0. Raises
    ValueError for tensors of different shapes.
    """
    columns = []
    for field in SCHEMA:
        x = vars(rows)[field.name]
        if x.shape != (len(rows.mask),):
            expected, got = [len(rows.mask)], list(x.shape)
            raise ValueError(f"{field.name}: expected shape {expected}, got {got}")
        dtype = getattr(torch, str(field.type))  # both call them int64, float, bool
        values = x.detach().cpu().to(dtype).numpy()
        columns.append(pa.array(values, mask=values < 0 if field.nullable else None))
    metadata = {VERSION_KEY: VERSION, INFO_KEY: json.dumps(dataclasses.asdict(info))}
    table = pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_dumps(paths: Sequence[str | Path]) -> Dump:
    """Read files, and all ``*.parquet`` of folders, as one dump.

    Files of one mini-batch (step and update) belong together, however its sequences are spread
    over them; a sequence is what has one uid within a mini-batch. Raises UserError for what is not
    there, is not a dump of this version, holds a valid token twice, holds numbers that are not
    finite on valid tokens or no valid token at all, or stems from runs with different objectives.
    """
    files = _files(paths)
    read = [_read(path) for path in files]
    infos = [info for _, info in read]
    for path, info in zip(files, infos, strict=True):
        for name, value in info.settings.items():
            if value != infos[0].settings[name]:
                raise UserError(
                    f"{path}: expected the objective of {files[0]}, {name} "
                    f"{infos[0].settings[name]}, got {value}; read the dumps of one run at a time"
                )
    rows = DumpRows.cat(rows for rows, _ in read)
    if not rows.mask.any():
        raise UserError(
            f"{files[0]}: expected at least one valid token (mask), got none in "
            f"{len(files)} file(s); name the dumps of another step"
        )
    mini_batches = sorted(set(infos), key=lambda info: (info.step, info.update))
    batch_ids = torch.cat(
        [torch.full((len(rows.mask),), mini_batches.index(info)) for rows, info in read]
    )
    # What has one uid within a mini-batch, in one file or several.
    sequence_ids = _number(_number(rows.sequence), batch_ids)
    _check_once(rows, sequence_ids, files)
    return Dump(
        rows=rows,
        sequence_ids=sequence_ids,
        lengths=torch.bincount(sequence_ids[rows.mask], minlength=int(sequence_ids.max()) + 1),
        mini_batches=tuple(mini_batches),
        files=len(files),
    )


def _number(x: Tensor, within: Tensor | None = None) -> Tensor:
    """The entries of int ``x`` [N] (in each class of ``within``), numbered: equal ones alike."""
    if within is not None:
        x = x.long() - x.min()
        x = within * (x.max() + 1) + x
    return torch.unique(x, return_inverse=True)[1]


def _check_once(rows: DumpRows, sequence_ids: Tensor, files: list[Path]) -> None:
    """Raise UserError where a valid token is there twice."""
    valid = rows.mask.nonzero().squeeze(1)
    copies = torch.bincount(_number(rows.position[valid], sequence_ids[valid]))
    if copies.max() > 1:
        raise UserError(
            f"{files[0]}: expected each valid token once, got {(copies - 1).sum()} of them again "
            f"in {len(files)} file(s); name each file once, and no copies"
        )


def _files(paths: Sequence[str | Path]) -> list[Path]:
    """Every file that is meant, once."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(path.glob("*.parquet"))
            if not inside:
                raise UserError(
                    f"{path}: expected a folder with *.parquet files, got none in it; name a run's "
                    f"dumps/ (logging.dump_every writes it)"
                )
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path}: expected a dump or a folder of dumps, got nothing there")
    return list({file.resolve(): file for file in files}.values())


def _read(path: Path) -> tuple[DumpRows, DumpInfo]:
    try:
        with pq.ParquetFile(path) as file:
            info = _read_info(path, file.schema_arrow)
            table = file.read(SCHEMA.names).select(SCHEMA.names).cast(SCHEMA)
    except UserError:
        raise
    except (ValueError, pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: expected a parquet file with the columns of a token dump, got one that "
            f"cannot be read ({one_line(error)}); write it again"
        ) from None
    columns = {}
    for name in SCHEMA.names:
        column = table[name]  # only layers_changed can hold null
        column = column.fill_null(UNKNOWN) if column.null_count else column
        columns[name] = torch.tensor(column.to_numpy())
    for name in ("old_logprob", "logprob", "advantage"):
        bad = ~columns[name].isfinite() & columns["mask"]
        if bad.any():
            row = int(bad.nonzero()[0])
            raise UserError(
                f"{path}: {name}: expected finite numbers on valid tokens, got "
                f"{columns[name][row].item()} in row {row}; mask those tokens, or look into the run"
            )
    return DumpRows(**columns), info


def _read_info(path: Path, schema: pa.Schema) -> DumpInfo:
    """What the schema says of a dump, once it has the version and the columns of this module."""
    metadata = schema.metadata or {}
    version = metadata.get(VERSION_KEY)
    if version is None:
        raise UserError(
            f"{path}: expected a token dump, got a parquet file without "
            f"{VERSION_KEY.decode()} in its schema; name files that a run wrote to dumps/"
        )
    if version != VERSION.encode():
        raise UserError(
            f"{path}: expected version {VERSION} of the dump format, got "
            f"{version.decode(errors='replace')}; read it with the release that wrote it"
        )
    missing = [name for name in SCHEMA.names if name not in schema.names]
    if missing:
        raise UserError(
            f"{path}: expected the columns {', '.join(SCHEMA.names)}, got no "
            f"{', '.join(missing)}; write the dump again"
        )
    try:
        return _INFO.validate_json(metadata.get(INFO_KEY, b"null"), strict=True)
    except ValidationError as error:
        raise UserError(
            f"{path}: {INFO_KEY.decode()}: expected the mini-batch and its objective as JSON, got "
            f"something else ({first_problem(error)}); write the dump again"
        ) from None
