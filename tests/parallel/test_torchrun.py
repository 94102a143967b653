"""What only torchrun can show: a rank that is killed or told to end, a restart, two hosts and a cut between them.

Ranks are on the CPU, with gloo; in the tests marked `gpu` each is on a GPU of its own, with NCCL.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from paths import ROOT
from ranks import end_of_run, on_ranks
from small_runs import ENVIRONMENT, alpaca_rows, save_tiny_model, steps_of, write_rows, write_run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ON_CPU = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Of a launcher, so that its two ranks speak over this."""
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices: NCCL takes no two ranks on one")
    return ENVIRONMENT if request.param == "nccl" else ON_CPU


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of 120 steps, of 50 ms each, with a checkpoint after every second one, on two ranks."""
    folder = tmp_path_factory.mktemp("run")
    model = save_tiny_model(folder / "model", num_hidden_layers=4)
    data = write_rows(folder / "data.jsonl", alpaca_rows(24, seed=2))
    keys = {"micro_batch_size": 1, "max_steps": 120, "save_steps": 2, "save_total_limit": 2, "fsdp": "full_shard"}
    return write_run(folder / "train.yml", model, data, **keys, lora_dropout=0.05, auto_resume_from_checkpoints=True)


started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    started.clear()
    yield
    for process in started:
        if process.poll() is None:
            process.terminate()  # torchrun ends its ranks then
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()


def until(condition: Callable[[], object], processes: list[subprocess.Popen], seconds: float = 240) -> None:
    """Wait for it, as long as the processes run. So long takes only a machine that does much else."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes), "a process has ended"
        assert time.monotonic() < give_up, f"not within {seconds} s"
        time.sleep(0.02)


def process_of_rank(rank: int, launcher: int) -> int | None:
    """The process that a torchrun has started as this rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for pid in children:
        try:
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)
        except OSError:  # it has just ended
            continue
    return None


def runs(pid: int) -> bool:
    """Whether a process is there and has not ended, unnoticed by the one that started it."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def last_step(folder: Path) -> int:
    """Of metrics.jsonl, which may be about to get a line."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def launch(environment: dict[str, str], log: Path, *words: object) -> subprocess.Popen:
    """torchrun with two ranks of train.py, and all that they say in `log`."""
    with open(log, "w") as file:
        command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", *map(str, words)]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file))
    return started[-1]


def test_ranks_that_are_killed_or_told_to_end_lose_nothing(run_file, environment, tmp_path):
    """Rank 1 gets SIGKILL twice, wherever it is, also while rank 0 saves: torchrun restarts once, then names it.

    The run that goes on gets SIGTERM at rank 1, saves and leaves; the one after that ends with the very adapter of a
    run without any of it.
    """
    log, run = tmp_path / "log", tmp_path / "run"
    words = ["train.py", run_file, "--output_dir", run]
    launcher = launch(environment, log, "--max-restarts=1", *words)
    until(lambda: last_step(run) >= 5, [launcher])
    first = process_of_rank(1, launcher.pid)
    os.kill(first, signal.SIGKILL)
    reached = last_step(run)
    until(lambda: process_of_rank(1, launcher.pid) not in (None, first), [launcher])
    until(lambda: last_step(run) >= reached + 4, [launcher])
    os.kill(process_of_rank(1, launcher.pid), signal.SIGKILL)
    assert launcher.wait(timeout=240) == 1
    text = log.read_text()
    assert "rank      : 1 (local_rank: 1)" in text and "Signal 9 (SIGKILL)" in text, text[-3000:]

    reached = last_step(run)
    launcher = launch(environment, log, *words)
    until(lambda: last_step(run) >= reached + 4, [launcher])
    os.kill(process_of_rank(1, launcher.pid), signal.SIGTERM)
    assert launcher.wait(timeout=240) == 1, "torchrun's own exit code"
    text, last = log.read_text(), last_step(run)
    assert f"it is saved. To go on: --resume_from_checkpoint {run}/checkpoint-{last}" in text, text[-3000:]
    assert text.count("exitcode  : 130") == 2 and reached + 4 <= last < 120

    for name in (run, tmp_path / "whole"):
        launcher = launch(environment, log, "train.py", run_file, "--output_dir", name)
        assert launcher.wait(timeout=240) == 0, log.read_text()
        assert [line["step"] for line in steps_of(name)] == list(range(1, 121))
    name = "adapter_model.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ------------------------------------------------------------------------------------------------ two hosts


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them, 10.77.0.1 and 10.77.0.2: hosts, as far as a network goes."""
    names = [f"host{i}-{os.getpid()}" for i in (1, 2)]
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as refused:  # not root, or a container without the right
        pytest.skip(f"no network namespaces here: {refused.stderr.decode().strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "cable1", "netns", names[0], "type", "veth", "peer", "name", "cable2", "netns", names[1])
        for i, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", f"cable{i}")
            ip("-n", name, "link", "set", f"cable{i}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def launch_on_hosts(hosts: list[str], script: Path, *words: object) -> list[subprocess.Popen]:
    """torchrun on each host, one rank each, meeting at the first."""
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=10.77.0.1:29400"]
    meet += ["--monitor_interval=0.1"]
    for i, host in enumerate(hosts, start=1):
        place = [f"--local_addr=10.77.0.{i}", f"--rdzv_conf=is_host={i == 1}"]  # their host names are the same
        command = ["ip", "netns", "exec", host, *TORCHRUN, *meet, *place, str(script)]
        environment = ON_CPU | {"GLOO_SOCKET_IFNAME": f"cable{i}", "PYTHONPATH": str(ROOT)}
        with open(script.parent / f"{host}.log", "w") as log:
            options = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": log}
            started.append(subprocess.Popen([*command, *map(str, words)], **options))
    return started[-len(hosts) :]


@pytest.mark.skipif(not shutil.which("ip"), reason="needs the ip command")
def test_two_hosts_are_one_run_and_a_cut_ends_both(run_file, hosts, tmp_path):
    """The losses of two ranks of one host; then, in a hurry, the cable goes down in the middle of the run.

    Each rank ends with its line. The launcher that is cut off from the meeting place waits for that by itself.
    """
    script = tmp_path / "impatient.py"
    script.write_text(
        "import train\nfrom nanoqlora.parallel import heartbeat\nfrom nanoqlora.config.commands import run_command\n"
        "heartbeat.LIMIT_S = 8.0\nrun_command(train.main)\n"
    )
    words = [run_file, "--lr_scheduler", "constant", "--output_dir"]
    both = launch_on_hosts(hosts, script, *words, tmp_path / "two", "--max_steps", "3000")
    until(lambda: last_step(tmp_path / "two") >= 4, both)
    ranks = [process_of_rank(rank, process.pid) for rank, process in enumerate(both)]
    ip("-n", hosts[1], "link", "set", "cable2", "down")
    until(lambda: not any(map(runs, ranks)), [])
    both[0].wait(timeout=240)
    said = [(tmp_path / f"{host}.log").read_text() for host in hosts]
    assert "error: rank 0 ends: rank 1 has given no sign of life for 8 s" in said[0], said[0][-2000:]
    assert "error: rank 1 ends: the store on 10.77.0.1, where rank 0 is, cannot be reached for 8 s" in said[1], said[1]

    assert on_ranks(2, end_of_run, *words, tmp_path / "one", "--max_steps", "4")[0][0] == 0
    losses = [[line["loss"] for line in steps_of(tmp_path / name)[:4]] for name in ("two", "one")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
