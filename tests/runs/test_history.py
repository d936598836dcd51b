"""Checkpoints of a run: in their order, whole or named as damaged, and kept aside when given up."""

import contextlib
import functools
import json
import os
import shutil
import zlib
from pathlib import Path

import pytest

from sapo_megatron.errors import UserError
from sapo_megatron.files import checksum
from sapo_megatron.runs import history
from sapo_megatron.runs.history import (
    MANIFEST,
    abandon,
    checkpoints,
    damage,
    home,
    read_manifest,
    settle,
    write_manifest,
)


def add(run: Path, *steps: int) -> list[Path]:
    """Checkpoints of two files each, with what else a run has after each step."""
    made = [run / "checkpoints" / f"step-{step:06d}" for step in steps]
    for folder, step in zip(made, steps, strict=True):
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(f'{{"step": {step}}}')
        (folder / "__0_0.distcp").write_bytes(bytes(range(256)) * 16)
        files = {p.name: checksum(p) for p in sorted(folder.iterdir())}
        write_manifest(folder, "0.16.1", files)
    return made


def problem(checkpoint: Path) -> str | None:
    manifest = read_manifest(checkpoint)
    if isinstance(manifest, str):
        return manifest
    return damage(checkpoint, manifest.files)


def test_numbers_sort_as_numbers_and_other_names_are_none(tmp_path):
    made = add(tmp_path, 1000000, 999999, 7)
    for name in (".step-000008.tmp", "step-old", "step-000009-copy", "step-"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert checkpoints(tmp_path) == sorted(made, key=lambda p: int(p.name[5:]))
    assert checkpoints(tmp_path)[-1].name == "step-1000000"
    assert checkpoints(tmp_path / "none") == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n ")


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGES = (cut, longer, emptied, flipped, a_folder, a_fifo, a_loop, Path.unlink)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["state.json", "__0_0.distcp", MANIFEST])
def test_any_damage_is_found_and_named(tmp_path, name, how):
    (folder,) = add(tmp_path, 3)
    assert problem(folder) is None
    if name == MANIFEST and how is longer:
        return  # white space behind JSON says nothing else
    how(folder / name)
    found = problem(folder)
    assert found is not None
    assert name in found
    assert "\n" not in found


def test_every_flipped_bit_of_the_checksums_is_found(tmp_path):
    (folder,) = add(tmp_path, 3)
    whole = (folder / MANIFEST).read_bytes()
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        (folder / MANIFEST).write_bytes(content)
        assert problem(folder), content


@pytest.mark.parametrize(
    "changed",
    [
        {"files": None},
        {"files": []},
        {"files": {"state.json": [1]}},
        {"files": {"state.json": ["1", 2]}},
        {"files": {"state.json": [True, 2]}},
        {"format": "2"},
        {"format": 2.5},
        {"megatron_core": 16},
        {"more": 1},
        {"crc32": None},
    ],
)
def test_wrong_types_in_the_checksums_are_found(tmp_path, changed):
    (folder,) = add(tmp_path, 3)
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    assert problem(folder)


def test_checksums_name_no_file_of_another_folder(tmp_path):
    (folder,) = add(tmp_path, 3)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for name in ("../../secret", str(secret), "..", ""):
        write_manifest(folder, "0.16.1", {name: checksum(secret)})
        assert "is missing" in (problem(folder) or "")


def test_another_format_is_refused_by_name(tmp_path, monkeypatch):
    (folder,) = add(tmp_path, 3)
    monkeypatch.setattr(history, "FORMAT", 1)
    with pytest.raises(UserError, match=r"step-000003: expected .* of format 1, got 2; go on with"):
        read_manifest(folder)
    (folder / MANIFEST).unlink()
    assert "format 1, which are not read any more" in str(read_manifest(folder))


def test_a_checksum_is_that_of_the_whole_file(tmp_path):
    content = os.urandom(9_000_001)
    (tmp_path / "file").write_bytes(content)
    assert checksum(tmp_path / "file") == (len(content), zlib.crc32(content))


def a_run(folder: Path) -> Path:
    """A finished run of six steps, with a checkpoint every other."""
    run = folder / "run-001"
    add(run, 2, 4, 6)
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(1, 7)))
    (run / "samples.jsonl").write_text("".join(f'{{"step": {n}}}\n' * 2 for n in range(1, 7)))
    for name in ("config.yaml", "summary.json", "wandb/run_id", "report/index.html"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(name)
    (run / "dumps").mkdir()
    for step in range(1, 7):
        (run / "dumps" / f"step-{step:06d}-rank-00000.safetensors").write_text("")
    return run


def everything(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def check_given_up(run: Path) -> None:
    aside = run / "abandoned-1"
    assert [p.name for p in checkpoints(run)] == ["step-000002", "step-000004"]
    assert steps(run / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps(run / "samples.jsonl") == [1, 1, 2, 2, 3, 3, 4, 4]
    kept = ["abandoned-1", "checkpoints", "config.yaml", "dumps", "metrics.jsonl"]
    assert names(run) == [*kept, "samples.jsonl", "wandb"]
    assert [p.name for p in checkpoints(aside)] == ["step-000006"]
    assert steps(aside / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    assert steps(aside / "samples.jsonl")[-3:] == [5, 6, 6]
    assert (len(names(run / "dumps")), len(names(aside / "dumps"))) == (4, 2)
    for name in ("config.yaml", "summary.json", "wandb/run_id", "report/index.html"):
        assert (aside / name).read_text() == name
    assert problem(checkpoints(aside)[0]) is None
    assert home(aside) == home(run) == run


def test_what_is_newer_is_kept_aside_like_a_run_of_its_own(tmp_path):
    run = a_run(tmp_path)
    before = everything(run)
    abandon(run, after=6)
    assert everything(run) == before, "nothing is newer"
    abandon(run, after=4)
    check_given_up(run)
    add(run, 6, 8)
    abandon(run, after=4)
    assert names(run / "abandoned-2" / "checkpoints") == ["step-000006", "step-000008"]
    shutil.rmtree(run / "abandoned-1")  # asked to go
    add(run, 7)
    abandon(run, after=4)
    assert (run / "abandoned-3").exists(), "a number is not given twice"


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_killed_at_any_place_it_has_not_begun_or_is_ended_later(tmp_path, monkeypatch):
    """Each call that changes names is in turn the one that is not made any more."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here outlives a machine
    for number in range(60):
        run = a_run(tmp_path / str(number))
        before = everything(run)
        left = number

        def stopping(*args, _call, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return _call(*args, **kwargs)

        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            for name in ("rename", "replace", "mkdir", "unlink"):
                call = functools.partial(stopping, _call=getattr(Path, name))
                patched.setattr(Path, name, functools.partialmethod(call))
            abandon(run, after=4)
            break
        if [p.name for p in checkpoints(run)][-1] == "step-000006":
            hidden = {name for name in everything(run) if name.startswith(".")}
            assert {k: v for k, v in everything(run).items() if k not in hidden} == before, number
        else:
            settle(run)
            check_given_up(run)
    assert 12 < number < 40, "the last is never killed"
