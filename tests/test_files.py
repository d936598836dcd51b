"""What is written whole: the old one stays until the new one is there."""

import os
import signal

import pytest

from sapo_megatron.files import whole_file, whole_folder, write_whole


def fail_over(whole, path, name):
    with whole(path) as temporary:
        (temporary / name).write_text("half")
        raise ZeroDivisionError


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "summary.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \udc80")
    assert path.read_text() == "old"
    with pytest.raises(ZeroDivisionError):
        fail_over(whole_file, path, "")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["summary.json"]


@pytest.mark.parametrize("content", ["text \u00e9\n", b"\x00\xff"])
def test_texts_and_bytes(tmp_path, content):
    write_whole(tmp_path / "old", b"old")
    write_whole(tmp_path / "old", content)
    assert (tmp_path / "old").read_bytes() == (
        content.encode() if isinstance(content, str) else content
    )


def test_a_file_whose_place_cannot_be_taken_leaves_nothing(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write_whole(tmp_path / "folder", "text")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "above" / "report"
    with whole_folder(path) as folder:
        (folder / "old.txt").write_text("old")
        assert not path.exists()
    assert path.stat().st_mode & 0o777 == (tmp_path / "above").stat().st_mode & 0o777
    with pytest.raises(ZeroDivisionError):
        fail_over(whole_folder, path, "half.txt")
    assert os.listdir(path) == ["old.txt"]
    with whole_folder(path) as folder:
        (folder / "new.txt").write_text("new")
    assert os.listdir(path) == ["new.txt"]
    assert os.listdir(path.parent) == ["report"]


def test_two_may_write_a_folder_at_once(tmp_path):
    with whole_folder(tmp_path / "start") as one, whole_folder(tmp_path / "start") as other:
        (one / "a").write_text("")
        (other / "b").write_text("")
    assert os.listdir(tmp_path / "start") == ["a"]
    assert os.listdir(tmp_path) == ["start"]


def test_what_a_killed_process_left_of_a_folder_goes_with_the_next(tmp_path):
    path = tmp_path / "report"
    child = os.fork()
    if not child:
        with whole_folder(path) as folder:
            (folder / "half.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    with whole_folder(path) as one:
        assert not left.exists()
        with whole_folder(path) as other:
            (other / "a.txt").write_text("")
            assert one.exists(), "that is in use"
    assert os.listdir(tmp_path) == ["report"]
