"""Every process that the tests start runs on one release of megatron-core."""

from importlib.metadata import version

from packaging.version import Version

from sapo_megatron.policy import compat
from tests.support.gloo import run_ranks
from tests.support.tiny import cli

RELEASE = version("megatron-core")
PROGRAM = """
from importlib.metadata import version
print(version("megatron-core"))
"""


def imported():
    from megatron.core import package_info

    return package_info.__version__.partition("+")[0]


def test_here():
    assert imported() == RELEASE


def test_on_ranks():
    assert run_ranks(2, imported) == [RELEASE, RELEASE]


def test_in_programs(tmp_path):
    done = cli(cwd=tmp_path, program=("-c", PROGRAM), fresh=True)
    assert done.stdout.strip() == RELEASE, done.stderr


def test_it_reads_what_it_can_of_another_release():
    assert compat.release() == RELEASE
    assert compat.reads([".metadata", "common.pt"])
    assert compat.reads([".metadata"]) == (Version(RELEASE) >= Version("0.19"))
