"""Replacing a host's functions, the launcher, and the doctor's look at a host.

The host is a package written into a folder; a launched script runs in a process of its own.
"""

import importlib
import json
import sys

import pytest
import torch

from sapo_megatron import patches
from sapo_megatron.commands.doctor import examine_host
from sapo_megatron.errors import UserError
from sapo_megatron.metrics import Metrics
from sapo_megatron.objective.bound import bound_metrics
from sapo_megatron.objective.loss import gate_metrics, ratio_metrics
from sapo_megatron.objective.ratio import Ratio
from sapo_megatron.patches import measure, megatron_rl
from sapo_megatron.patches.replace import Host, Symbol, check, find, replace, restore
from sapo_megatron.sample import Temperatures
from tests.support.tiny import cli
from tests.test_cli import refused

DOUBLE = Symbol("a_host.maths", "double", "x")
METHOD = Symbol("a_host.maths", "Adder.add", "self, x")
HOST = Host(
    title="A Host",
    distribution="a-host",
    module="a_host",
    verified="2.1.0",
    oldest="2.0",
    symbols=(DOUBLE, METHOD),
)
SOURCE = """
def double(x):
    return 2 * x

class Adder:
    def add(self, x):
        return x + 1
"""


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The module with the functions; written with another version or text by ``host.write``."""
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "a_host"
    folder.mkdir()

    def write(version="2.1.0", source=SOURCE):
        for symbol in HOST.symbols:
            restore(symbol)
        for name in [n for n in sys.modules if n.split(".")[0] == "a_host"]:
            del sys.modules[name]
        # A later write within a second would find the compiled text of the one before.
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        (folder / "__init__.py").write_text(f"__version__ = {version!r}\n" if version else "")
        (folder / "maths.py").write_text(source)
        importlib.invalidate_caches()
        return importlib.import_module("a_host.maths")

    module = write()
    module.write = write
    yield module
    for symbol in HOST.symbols:
        restore(symbol)
    for name in [n for n in sys.modules if n.split(".")[0] == "a_host"]:
        del sys.modules[name]


def one_more(original, x):
    return original(x) + 1


def test_a_replacement_calls_what_it_replaced(host):
    own = host.double
    replace(HOST, DOUBLE, one_more)
    assert host.double(3) == 7
    assert find(HOST, DOUBLE) is own
    restore(DOUBLE)
    assert host.double is own


def test_twice_is_once_and_the_later_one_counts(host):
    own = host.double
    replace(HOST, DOUBLE, one_more)
    replace(HOST, DOUBLE, one_more)
    assert host.double(3) == 7
    replace(HOST, DOUBLE, lambda original, x: original(x) - 1)
    assert host.double(3) == 5
    restore(DOUBLE)
    restore(DOUBLE)
    assert host.double is own


def test_methods_can_be_replaced(host):
    replace(HOST, METHOD, lambda original, self, x: 10 * original(self, x))
    assert host.Adder().add(1) == 20
    restore(METHOD)
    assert host.Adder().add(1) == 2


def test_what_others_have_imported_is_out_of_reach(host, monkeypatch):
    user = type(sys)("a_user")
    user.double = host.double
    monkeypatch.setitem(sys.modules, "a_user", user)
    with pytest.raises(UserError, match=r"double: expected to replace it before a_user imports it"):
        replace(HOST, DOUBLE, one_more)
    assert host.double(3) == 6


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", r"a_host.maths.double: expected it in A Host 2.1.0, got .*no attribute 'double'"),
        (
            "def double(y, times):\n    return y\n",
            r"a_host.maths.double: expected the parameters \(x\) in A Host 2.1.0, got \(y, times\)",
        ),
        ("import nothing_like_it\n", "a_host.maths.double: expected it .* got No module named .*"),
    ],
    ids=["missing", "changed", "does not import"],
)
def test_a_function_that_is_not_there_or_another(host, source, said):
    if source.startswith("import"):
        with pytest.raises(ModuleNotFoundError):
            host.write(source=source)
    else:
        host = host.write(source=source)
    for attempt in (lambda: check(HOST), lambda: replace(HOST, DOUBLE, one_more)):
        with pytest.raises(UserError, match=said) as refusal:
            attempt()
        advice = "install nothing_like_it" if source.startswith("import") else "take 2.1.0"
        assert f"; {advice}, which" in str(refusal.value)


@pytest.mark.parametrize(
    "version", ["1.9.9", "2", "2.0", "2.1.0", "2.1.0+cu130", "2.1rc1", "3.0rc1", "main-1a", None]
)
def test_versions(host, version, caplog):
    host.write(version=version)
    if version == "1.9.9":
        with pytest.raises(UserError, match=r"A Host: expected 2.0 or later, got 1.9.9; update it"):
            check(HOST)
        return
    check(HOST)
    assert ("verified against 2.1.0" in caplog.text) == (version == "3.0rc1")


def test_a_host_that_is_not_installed():
    with pytest.raises(UserError, match=r"A Host: expected 2.1.0 .*no module a_host.* install it"):
        check(HOST)


def test_what_a_host_itself_lacks_is_not_taken_for_the_host(host, tmp_path):
    (tmp_path / "a_host" / "__init__.py").write_text("import nothing_like_it\n")
    del sys.modules["a_host"]
    with pytest.raises(ModuleNotFoundError, match="nothing_like_it"):
        check(HOST)


# The doctor.


@pytest.fixture
def known(host, monkeypatch):
    """A Host in the place of a patch's."""
    monkeypatch.setattr(megatron_rl, "HOST", HOST)
    return host


def test_doctor_on_a_host_that_fits(known):
    found = [(f.name, f.status, f.found) for f in examine_host("megatron_rl")]
    assert found == [
        ("A Host", "ok", "2.1.0"),
        ("double", "ok", "a_host.maths: fits"),
        ("Adder.add", "ok", "a_host.maths: fits"),
    ]


def test_doctor_on_a_host_that_does_not(known):
    known.write(version="2.5", source="def double(y):\n    return y\n\nclass Adder:\n    pass\n")
    version, double, method = examine_host("megatron_rl")
    assert version.status == "warn"
    assert "verified against 2.1.0" in version.found
    assert double.status == method.status == "fail"
    assert double.found == "a_host.maths: expected the parameters (x) in A Host 2.5, got (y)"
    assert double.todo == "Take 2.1.0, which this patch was verified against."
    assert "no attribute 'add'" in method.found


def test_doctor_on_a_host_that_is_old_absent_or_broken(known, tmp_path):
    known.write(version="1.0")
    (old,) = examine_host("megatron_rl")
    assert (old.status, old.found) == ("fail", "1.0, expected 2.0 or later")
    (tmp_path / "a_host" / "__init__.py").write_text("print('hello')\n1 / 0\n")
    del sys.modules["a_host"]
    (broken,) = examine_host("megatron_rl")
    assert (broken.status, broken.found) == (
        "fail",
        "does not import: ZeroDivisionError: division by zero",
    )
    (tmp_path / "a_host").rename(tmp_path / "moved")
    importlib.invalidate_caches()
    (absent,) = examine_host("megatron_rl")
    assert (absent.status, absent.found) == ("fail", "not installed: no module a_host")


@pytest.mark.parametrize("name", patches.HOSTS)
def test_every_host_has_a_description(name):
    host = importlib.import_module(f"sapo_megatron.patches.{name}").HOST
    assert isinstance(host, Host)
    assert host.symbols
    assert host.oldest <= host.verified


def test_doctor_command(tmp_path):
    done = cli("doctor", "--host", "megatron_rl", "--json", cwd=tmp_path)
    assert done.returncode == 1
    (finding,) = json.loads(done.stdout)
    assert finding["status"] == "fail"
    assert "expected 0.20.0 or later" in finding["found"]
    refused(cli("doctor", "--host", "trl", cwd=tmp_path), "choose from")


# The launcher.


def launch(*words, cwd):
    return cli(*words, cwd=cwd, program=("-m", "sapo_megatron.patches"))


def test_a_script_with_sapo_off_runs_as_it_is(tmp_path):
    (tmp_path / "beside.py").write_text("word = 'beside'\n")
    script = tmp_path / "train_rl.py"
    script.write_text(
        "import sys, beside\n"
        "print(__name__, sys.argv, beside.word, 'megatron.rl' in sys.modules)\n"
        "sys.exit(3)\n"
    )
    words = ["megatron_rl", "--", str(script), "--bf16", "--loss_type", "grpo", "--lr", "-1"]
    done = launch(*words, cwd=tmp_path)
    assert done.returncode == 3
    argv = [str(script), "--bf16", "--lr", "-1"]
    assert done.stdout == f"__main__ {argv} beside False\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["megatron_rl", "--", "{script}"], "required: --loss_type"),
        (["megatron_rl", "--", "{script}", "--loss_type", "ppo"], "invalid choice: 'ppo'"),
        (["megatron_rl", "--", "{script}x", "--loss_type", "sapo"], "got no such file"),
        (
            ["megatron_rl", "--", "{script}", "--loss_type", "sapo", "--tau_pos", "0"],
            "--tau_pos: expected a finite number > 0, got 0.0",
        ),
        (["megatron_rl", "{script}"], "expected megatron_rl or nemo_rl, --, and"),
        (["trl", "--", "{script}"], "expected megatron_rl or nemo_rl, --, and"),
        ([], "got nothing"),
        (["nemo_rl", "--", "{script}", "--vocab_parallel_logprobs"], "required: --loss_type"),
    ],
)
def test_what_the_launcher_refuses(tmp_path, words, said):
    script = tmp_path / "train_rl.py"
    script.write_text("raise SystemExit('ran')\n")
    refused(launch(*[word.format(script=script) for word in words], cwd=tmp_path), said)


def test_a_host_that_does_not_fit_ends_before_its_script_runs(tmp_path):
    script = tmp_path / "train_rl.py"
    script.write_text("raise SystemExit('ran')\n")
    done = launch("megatron_rl", "--", str(script), "--loss_type", "sapo", cwd=tmp_path)
    assert done.returncode == 2
    # Above it stands what the host warns of when it is imported.
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: Megatron-LM: expected 0.20.0 or later, got ")


def test_help(tmp_path):
    done = launch("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--loss_type sapo|grpo" in done.stdout


# What a dashboard gets.


def test_parts_add_up_to_the_metrics_of_the_whole():
    torch.manual_seed(0)
    log_ratio = torch.randn(6, 9, dtype=torch.float64) * 0.3
    advantages = torch.randn(6, 1, dtype=torch.float64)
    mask = torch.rand(6, 9) > 0.4
    mask[2] = False
    temperatures = Temperatures(1.0, 1.3)
    r = Ratio.of(log_ratio, advantages, mask)
    ids = torch.arange(6).repeat_interleave(9)
    whole = Metrics()
    whole.update(ratio_metrics(r))
    whole.update(gate_metrics(r, temperatures))
    whole.update(bound_metrics(r.flatten(), temperatures, ids, mask.sum(1)))
    expected = whole.values()

    parts = [
        measure.measure_rows(Ratio.of(log_ratio[rows], advantages[rows], mask[rows]), temperatures)
        for rows in ([0, 1], [2], [3, 4, 5])
    ]
    found = {
        name: float(
            sum(p.means[name].total for p in parts) / sum(p.means[name].count for p in parts)
        )
        for name in parts[0].means
    }
    found["ratio/log_var"] = measure.log_variance(found)
    del found["ratio/log_mean"], found["ratio/log_square"]
    assert found == pytest.approx({name: expected[name] for name in found})
    assert {*measure.PER_SEQUENCE, "sapo/gate_pos_mean", "sapo/gate_neg_mean"} < found.keys()
    assert min(float(p.ratio_min) for p in parts) == expected["ratio/min"]
    assert max(float(p.ratio_max) for p in parts) == expected["ratio/max"]
    assert sum(float(p.violations) for p in parts) == expected["sapo/bound_violations"] == 0
