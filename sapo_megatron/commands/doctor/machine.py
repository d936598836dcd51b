"""What this machine has: GPUs and their links, folders, network, accounts."""

import ipaddress
import os
import re
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sapo_megatron.commands.doctor.finding import Finding

GIB = 2**30
SHARED = {
    *("afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.juicefs", "glusterfs"),
    *("gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs", "smb3", "wekafs"),
}
"""File systems that several machines mount."""
PASSING = {"overlay": "of this container alone", "ramfs": "in memory", "tmpfs": "in memory"}
"""File systems that end with the container or the machine."""


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi says of a machine with GPUs."""

    version: str
    cuda: str
    """The newest CUDA that this driver runs."""
    gpus: tuple[tuple[str, int], ...]
    """Name and MiB of memory of each GPU."""


def read_driver() -> Driver | None:
    """The machine's NVIDIA driver; None where none works."""
    query = "--query-gpu=driver_version,memory.total,name"
    rows = [
        [field.strip() for field in line.split(",", 2)]
        for line in _nvidia_smi(query, "--format=csv,noheader,nounits").splitlines()
    ]
    rows = [row for row in rows if len(row) == 3]
    if not rows:
        return None
    cuda = re.search(r"CUDA Version\s*:\s*([\d.]+)", _nvidia_smi())
    return Driver(
        version=rows[0][0],
        cuda=cuda[1] if cuda else "0",
        gpus=tuple((name, int(memory) if memory.isdecimal() else 0) for _, memory, name in rows),
    )


def gpus(driver: Driver | None) -> Finding:
    if driver is None:
        todo = "Recipes for GPUs will not run here; those for the CPU do, such as "
        return Finding("gpus", "warn", "none", todo + "recipes/tiny-moe-cpu.yaml.")
    names = sorted({f"{name}, {memory / 1024:.0f} GiB" for name, memory in driver.gpus})
    found = f"{len(driver.gpus)} x {' and '.join(names)}; driver {driver.version}"
    if len(names) > 1:
        return Finding("gpus", "warn", found, "A run goes at the slowest's pace; use one kind.")
    return Finding("gpus", "ok", found)


def links(driver: Driver | None) -> Finding:
    """NVLink between the GPUs of this machine, or not."""
    name = "gpu links"
    if driver is None or len(driver.gpus) < 2:
        return Finding(name, "skipped", "fewer than two GPUs")
    pairs = _pairs(_nvidia_smi("topo", "--matrix"))
    if not pairs:
        return Finding(name, "warn", "nvidia-smi shows none", "See: nvidia-smi topo --matrix")
    kinds = ", ".join(sorted(set(pairs)))
    linked = [kind.startswith("NV") for kind in pairs]
    if all(linked):
        return Finding(name, "ok", f"NVLink between all {len(driver.gpus)} ({kinds})")
    todo = (
        "Tensor and expert parallelism are slow across PCIe: keep tensor_model_parallel_size "
        "within linked GPUs (nvidia-smi topo --matrix), and prefer pipeline parallelism beyond."
    )
    found = "NVLink between some only" if any(linked) else "no NVLink"
    return Finding(name, "warn", f"{found} ({kinds})", todo)


def shared_memory(driver: Driver | None) -> Finding:
    """NCCL talks through /dev/shm within a machine; containers give 64 MiB unless told."""
    name = "/dev/shm"
    if driver is None:
        return Finding(name, "skipped", "only nccl needs it")
    total = shutil.disk_usage("/dev/shm").total
    if total >= GIB:
        return Finding(name, "ok", f"{total / GIB:.0f} GiB")
    todo = "Start the container with --ipc=host or --shm-size=16g; in Kubernetes mount a volume."
    return Finding(name, "warn", f"{total / 2**20:.0f} MiB", todo)


def folder(name: str, path: Path, driver: Driver | None) -> Finding:
    """A folder that may not exist yet: can it be written, how much fits, who else sees it?"""
    path = Path(os.path.abspath(path.expanduser()))
    existing = next(p for p in (path, *path.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        todo = "Choose another, or have its owner let you write."
        return Finding(name, "fail", f"{path}: cannot be written: {error.strerror}", todo)
    free = shutil.disk_usage(existing).free / GIB
    kind = _file_system(existing)
    found = f"{path}: {free:,.0f} GiB free on {kind}"
    if free < 1:
        return Finding(name, "fail", found, "Free some space, or choose another.")
    if kind in PASSING:
        todo = f"It is {PASSING[kind]}: what must last belongs on a mounted volume."
        return Finding(name, "warn", found, todo)
    if driver and free < 100:
        todo = "A checkpoint takes about 14 bytes per parameter, so 400 GiB for 30 billion."
        return Finding(name, "warn", found, todo)
    if kind in SHARED:
        return Finding(name, "ok", f"{found} (shared)")
    todo = "Runs on several machines need it on a file system that all of them mount."
    return Finding(name, "ok", found, todo if driver else "")


def hf_cache() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")


def rendezvous() -> Finding:
    """A port for torchrun's agents to meet, and a name by which others find this machine."""
    name, text = "rendezvous", os.environ.get("MASTER_PORT", "29500")
    if not (text.isdecimal() and 0 < int(text) < 65536):
        return Finding(name, "fail", f"MASTER_PORT is {text!r}", "Set it to a port, or unset it.")
    host = socket.getfqdn()
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        todo = "Add it to /etc/hosts, or set PET_LOCAL_ADDR to this machine's address."
        return Finding(name, "warn", f"the name of this machine, {host}, has no address", todo)
    if not _free_port(int(text)):
        todo = f"Set MASTER_PORT to a free one, such as {_free_port(0)}."
        return Finding(name, "warn", f"port {text} is taken", todo)
    found, todo = f"port {text} is free on {host}", ""
    if all(ipaddress.ip_address(address).is_loopback for address in addresses):
        found += ", a name that only this machine knows"
        todo = "For runs on several machines, set PET_LOCAL_ADDR to this machine's address."
    return Finding(name, "ok", found, todo)


def wandb() -> Finding:
    """Whether runs with ``logging.wandb=true`` would go online. Shows no key."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return Finding("wandb", "ok", f"WANDB_MODE is {os.environ['WANDB_MODE']}")
    if os.environ.get("WANDB_API_KEY"):
        return Finding("wandb", "ok", "WANDB_API_KEY is set")
    todo = "For logging.wandb=true to go online, put WANDB_API_KEY into the environment."
    return Finding("wandb", "skipped", "no WANDB_API_KEY; runs would be kept offline", todo)


def _nvidia_smi(*options: str) -> str:
    """What nvidia-smi prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *options], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _pairs(matrix: str) -> list[str]:
    """The kind of link of every pair of GPUs, from the matrix of ``nvidia-smi topo``."""
    rows = [line.split() for line in matrix.splitlines() if re.match(r"\s*GPU\d+\s+\S*\s", line)]
    rows = [row[1:] for row in rows if "X" in row]
    return [kind for i, row in enumerate(rows) for kind in row[:i]]


def _file_system(path: Path) -> str:
    """The type of the file system that ``path`` lies on."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    found = Path(os.path.realpath(path))
    # The last of equals is the one on top.
    best = max(
        (len(place), number, kind)
        for number, (mount, kind) in enumerate(mounts)
        if found.is_relative_to(place := mount.replace("\\040", " "))
    )
    return best[2]


def _free_port(wanted: int) -> int | None:
    """``wanted``, or None where it is taken; of 0, any that is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
        except OSError:
            return None
        return probe.getsockname()[1]
