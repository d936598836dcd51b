"""Token dumps: what is written is read back, however it was cut, and whatever is wrong is told."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_megatron.errors import UserError
from sapo_megatron.runs.dump import (
    SCHEMA,
    UNKNOWN,
    VERSION_KEY,
    DumpInfo,
    DumpRows,
    read_dumps,
    write_dump,
)
from sapo_megatron.sample import PackedBatch

INFO = DumpInfo(
    step=10,
    update=3,
    loss_type="sapo",
    tau_pos=1.0,
    tau_neg=1.05,
    loss_agg_mode="seq-mean-token-mean",
)


def rows(n=8, **columns):
    """Sequences of 4 tokens, all valid."""
    generator = torch.Generator().manual_seed(n)
    held = {
        "sequence": torch.arange(n) // 4 + 100,
        "position": torch.arange(n) % 4 + 7,
        "old_logprob": -torch.rand(n, generator=generator),
        "logprob": -torch.rand(n, generator=generator),
        "advantage": torch.randn(n, generator=generator),
        "mask": torch.ones(n, dtype=torch.bool),
        "layers_changed": torch.full((n,), UNKNOWN),
    }
    return DumpRows(**held | columns)


def take(dumped, where):
    return DumpRows(**{name: x[where] for name, x in vars(dumped).items()})


def rewrite(path, change=lambda table: table, metadata=None):
    """Spoil a dump: another table, or other metadata beside its own."""
    table = pq.read_table(path)
    held = table.schema.metadata
    pq.write_table(change(table).replace_schema_metadata({**held, **(metadata or {})}), path)


def replaced(name, values):
    return lambda table: table.set_column(table.schema.get_field_index(name), name, values)


def refuses(paths, *expected):
    with pytest.raises(UserError) as error:
        read_dumps(paths)
    for text in expected:
        assert text in str(error.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "dumps" / "one.parquet"


def test_round_trip(path):
    written = rows(
        layers_changed=torch.tensor([0, 1, UNKNOWN, 48, 2, 2, 0, UNKNOWN]),
        mask=torch.tensor([1, 1, 1, 0, 1, 1, 0, 0]).bool(),
    )
    write_dump(path, written, INFO)
    dump = read_dumps([path])
    for name in SCHEMA.names:
        assert torch.equal(getattr(dump.rows, name), getattr(written, name)), name
    assert dump.rows.layers_changed.dtype == torch.int16
    assert dump.mini_batches == (INFO,)
    assert dump.settings == INFO
    assert dump.files == 1
    assert dump.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert dump.lengths.tolist() == [3, 2]
    assert [p.name for p in path.parent.iterdir()] == ["one.parquet"]  # no temporary file


def test_the_file_is_what_the_format_says(path):
    write_dump(path, rows(), INFO)
    schema = pq.read_schema(path)
    assert schema.remove_metadata() == SCHEMA
    assert schema.metadata[VERSION_KEY] == b"1"
    assert json.loads(schema.metadata[b"sapo_megatron_info"]) == dataclasses.asdict(INFO)
    assert pq.read_table(path)["layers_changed"].null_count == 8


def test_a_dense_model_has_no_layers(path):
    write_dump(path, rows(), INFO)
    assert read_dumps([path]).rows.layers_changed.tolist() == [UNKNOWN] * 8


def test_what_a_file_does_not_know_stays_unknown_beside_one_that_does(path):
    whole = rows()
    write_dump(path, take(whole, slice(4)), INFO)
    known = dataclasses.replace(take(whole, slice(4, 8)), layers_changed=torch.arange(4))
    write_dump(path.with_name("two.parquet"), known, INFO)
    assert read_dumps([path.parent]).rows.layers_changed.tolist() == [UNKNOWN] * 4 + [0, 1, 2, 3]


def test_other_dtypes_are_rounded(path):
    write_dump(path, rows(logprob=torch.full((8,), -0.1, dtype=torch.float64)), INFO)
    assert read_dumps([path]).rows.logprob.tolist() == [torch.tensor(-0.1).item()] * 8


def test_tensors_of_different_shapes(path):
    with pytest.raises(ValueError, match=r"logprob: expected shape \[8\], got \[7\]"):
        write_dump(path, rows(logprob=torch.zeros(7)), INFO)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=24, max_size=24), st.randoms())
def test_pieces_are_the_whole(tmp_path_factory, owners, random):
    """Data- and context-parallel ranks, micro-batches in any order: the same tokens."""
    folder = tmp_path_factory.mktemp("dumps")
    whole = rows(24, layers_changed=torch.arange(24) % 5)
    write_dump(folder / "whole" / "x.parquet", whole, INFO)
    order = random.sample(range(24), 24)
    for rank in range(4):
        mine = [i for i in order if owners[i] == rank]
        write_dump(folder / "pieces" / f"{rank}.parquet", take(whole, mine), INFO)
    one, other = read_dumps([folder / "whole"]), read_dumps([folder / "pieces"])
    assert other.files == 4
    assert torch.equal(one.lengths, other.lengths)
    back = torch.argsort(other.sequence_ids * 100 + other.rows.position)
    for name in SCHEMA.names:
        assert torch.equal(getattr(one.rows, name), getattr(other.rows, name)[back])
    assert torch.equal(one.sequence_ids, other.sequence_ids[back])


def test_a_uid_means_a_sequence_within_its_mini_batch(tmp_path):
    for update in (1, 0):
        info = dataclasses.replace(INFO, update=update)
        write_dump(tmp_path / f"{update}.parquet", rows(4), info)
    dump = read_dumps([tmp_path / "1.parquet", tmp_path / "0.parquet"])
    assert [info.update for info in dump.mini_batches] == [0, 1]
    assert dump.lengths.tolist() == [4, 4]
    assert len(set(dump.sequence_ids.tolist())) == 2


def test_a_file_named_twice_counts_once(path):
    write_dump(path, rows(), INFO)
    assert read_dumps([path, path.parent, str(path)]).files == 1


def test_a_rank_without_tokens(path):
    write_dump(path, rows(), INFO)
    write_dump(path.with_name("none.parquet"), take(rows(), slice(0)), INFO)
    dump = read_dumps([path.parent])
    assert (dump.files, len(dump.rows.mask)) == (2, 8)


def test_garbage_on_masked_tokens_and_filler_copies_do_no_harm(path):
    garbage = torch.tensor([0, 0, 0, 0, 0, 0, torch.nan, torch.inf])
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]).bool()
    filler = {"sequence": torch.tensor([5, 5, 5, 5, 6, 6, -1, -1]), "position": torch.arange(8) % 6}
    filler["position"][-2:] = 0
    write_dump(path, rows(logprob=garbage, mask=mask, **filler), INFO)
    assert read_dumps([path]).lengths.tolist() == [0, 4, 2]  # by uid


def test_rows_of_a_micro_batch(path):
    batch = PackedBatch(
        tokens=torch.tensor([5, 9, 8, 4, 7]),
        targets=torch.tensor([9, 8, 1, 7, 1]),
        mask=torch.tensor([0, 1, 1, 1, 0]).bool(),
        position_ids=torch.tensor([0, 1, 2, 0, 1]),
        sequence_ids=torch.tensor([0, 0, 0, 1, 2]),
        cu_seqlens=torch.tensor([0, 3, 4, 5]),
        max_seqlen=3,
        lengths=torch.tensor([2, 1, 0]),
        advantages=torch.tensor([0.5, 0.5, 0.5, -1, 0]),
        rollout_logprob=torch.zeros(5),
        sample_uids=(57, 58, -1),
        old_logprob=torch.tensor([0, -1.0, -2.0, -3.0, 0]),
    )
    logprob = torch.tensor([0, -1.5, -2.5, -3.5, 0], requires_grad=True)
    got = DumpRows.of(batch, logprob, torch.tensor([9, 1, 2, 3, 9]))
    write_dump(path, DumpRows.cat([got, take(got, slice(0))]), INFO)
    read = read_dumps([path]).rows
    assert read.sequence.tolist() == [57, 57, 58]
    assert read.position.tolist() == [1, 2, 0]
    assert read.old_logprob.tolist() == [-1, -2, -3]
    assert read.logprob.tolist() == [-1.5, -2.5, -3.5]
    assert read.advantage.tolist() == [0.5, 0.5, -1]
    assert read.mask.all()
    assert read.layers_changed.tolist() == [1, 2, 3]
    assert DumpRows.of(batch, logprob).layers_changed.tolist() == [UNKNOWN] * 3


# What is wrong with files


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda p: rewrite(p, lambda t: t.drop_columns(["mask"])), ["columns", "got no mask"]),
        (lambda p: rewrite(p, metadata={VERSION_KEY: "7"}), ["version 1", "got 7", "release"]),
        (lambda p: pq.write_table(pa.table({"a": [1]}), p), ["without sapo_megatron_dump"]),
        (lambda p: p.write_text("no parquet"), ["expected a parquet file"]),
        (lambda p: p.write_text(""), ["expected a parquet file"]),
        (lambda p: p.write_bytes(p.read_bytes()[:-40]), ["expected a parquet file"]),
        (lambda p: p.unlink(), ["got nothing there"]),
        (
            lambda p: rewrite(p, metadata={b"sapo_megatron_info": "{"}),
            ["sapo_megatron_info", "JSON"],
        ),
        (
            lambda p: rewrite(p, metadata={b"sapo_megatron_info": '{"step": 1}'}),
            ["sapo_megatron_info", "(update: Field required)"],
        ),
        (
            lambda p: rewrite(
                p,
                metadata={
                    b"sapo_megatron_info": json.dumps(dataclasses.asdict(INFO) | {"step": "x"})
                },
            ),
            ["step: Input should be a valid integer, got 'x'"],
        ),
        (
            lambda p: rewrite(
                p,
                metadata={
                    b"sapo_megatron_info": json.dumps(
                        dataclasses.asdict(INFO) | {"tau_pos": float("nan")}
                    )
                },
            ),
            ["tau_pos: Input should be a finite number, got nan"],
        ),
        (
            lambda p: rewrite(p, replaced("logprob", pa.array(["x"] * 8))),
            ["columns of a token dump", "cannot be read"],
        ),
        (
            lambda p: rewrite(p, replaced("logprob", pa.array([None] * 8, pa.float32()))),
            ["'logprob' with null values"],
        ),
        (
            lambda p: rewrite(p, replaced("old_logprob", pa.array([0.0] * 7 + [float("nan")]))),
            ["old_logprob", "finite", "nan in row 7"],
        ),
        (
            lambda p: rewrite(p, replaced("advantage", pa.array([float("inf")] * 8))),
            ["advantage", "finite", "inf in row 0"],
        ),
        (
            lambda p: rewrite(p, replaced("mask", pa.array([False] * 8))),
            ["at least one valid token", "1 file"],
        ),
        (
            lambda p: rewrite(p, replaced("position", pa.array([3] * 8))),
            ["each valid token once", "6 of them again"],
        ),
    ],
)
def test_wrong_files(path, spoil, expected):
    write_dump(path, rows(), INFO)
    spoil(path)
    refuses([path], *expected, "one.parquet")


def test_a_folder_without_dumps(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    refuses([tmp_path], str(tmp_path), "*.parquet", "dump_every")


def test_copies_of_a_mini_batch(path):
    write_dump(path, rows(), INFO)
    write_dump(path.with_name("copy.parquet"), rows(), INFO)
    refuses([path.parent], "each valid token once", "8 of them again", "2 file")


def test_different_objectives(path):
    write_dump(path, rows(4), INFO)
    write_dump(path.with_name("two.parquet"), rows(4), dataclasses.replace(INFO, tau_pos=2.0))
    refuses([path.parent], "two.parquet", "tau_pos 1.0, got 2.0", "one run at a time")
