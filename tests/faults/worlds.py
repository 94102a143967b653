"""What the programs here share: commands in forked processes, small runs, and what has to be equal after a fault."""

import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
sys.dont_write_bytecode = True

import matplotlib.backends.backend_agg  # noqa: E402, F401  (forked children need not import it)
import torch  # noqa: E402
from small_runs import alpaca_rows, save_tiny_model, write_rows, write_run  # noqa: E402

import export_gguf  # noqa: E402, F401
import merge  # noqa: E402, F401
import train  # noqa: E402, F401
from nanoqlora.config.commands import run_command  # noqa: E402
from nanoqlora.run import log  # noqa: E402

torch.set_num_threads(1)
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout and evaluations": {"lora_dropout": 0.1, "val_set_size": 3, "eval_steps": 2},
    "packed": {"sample_packing": True, "gradient_accumulation_steps": 2, "num_epochs": 5},
    "best": {"val_set_size": 3, "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.05},
    "patience": {
        "val_set_size": 3,
        "eval_steps": 1,
        "early_stopping_patience": 3,
        "learning_rate": 0.5,
        "num_epochs": 4,
    },
    "watchdog": {"loss_watchdog_threshold": 0.1, "loss_watchdog_patience": 6},
    "noise, DoRA": {"neftune_noise_alpha": 5, "peft_use_dora": True},
    "8 bit, LoRA+": {"optimizer": "adamw_8bit", "loraplus_lr_ratio": 4},
    "answers": {"val_set_size": 3, "eval_steps": 3, "eval_table_size": 1, "eval_max_new_tokens": 3},
}
VARIES = ("tokens_per_second", "memory/")  # in metrics.jsonl, from run to run


class World:
    """A folder with a model, data and a run; every trial begins with the same bytes at the same paths."""

    def __init__(self, folder: str | None) -> None:
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.folder = Path(folder) if folder else Path(tempfile.mkdtemp(prefix="nanoqlora-faults-", dir=memory))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model, self.data, self.log = self.folder / "model", self.folder / "data.jsonl", self.folder / "log"
        self.run, self.out, self.prepared = (self.folder / name for name in ("run", "run/out", "prepared"))
        save_tiny_model(self.model, **SMALL)
        write_rows(self.data, alpaca_rows(16))

    def new_run(self, **keys: Any) -> Path:
        """The YAML of a run into an output_dir that does not exist."""
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir()
        usual = {"dataset_prepared_path": str(self.prepared), "num_epochs": 2, "save_steps": 1, "save_total_limit": 2}
        usual |= {"micro_batch_size": 4, "auto_resume_from_checkpoints": True}
        return write_run(self.run / "train.yml", self.model, self.data, **(usual | keys))

    def fork(self, main: Callable[[], None], *words: object, before: Callable[[], object] = lambda: None) -> int:
        """A command in a process group of its own, its output in `log`. Returns the process."""
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        code = 99
        try:
            os.setpgid(0, 0)
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.chdir(self.folder)
            sys.argv = [f"{main.__module__}.py", *map(str, words)]
            before()
            run_command(main)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            code = 1
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(code)

    def go(
        self,
        main: Callable[[], None],
        *words: object,
        before: Callable[[], object] = lambda: None,
        kill_after: float | None = None,
        signal: int = signal.SIGKILL,
    ) -> tuple[int, str]:
        """A command to its end: its exit code (minus the signal) and what it printed."""
        code = wait(self.fork(main, *words, before=before), kill_after, signal)
        return code, self.log.read_text("utf-8", "replace")


def wait(pid: int, kill_after: float | None = None, number: int = signal.SIGKILL, limit: float = 300) -> int:
    """The exit code of a process; it gets a signal after so many seconds, and SIGKILL after `limit`."""
    handle = os.pidfd_open(pid)
    try:
        for seconds, last in ((kill_after, number), (limit, signal.SIGKILL)):
            if seconds is not None and not select.select([handle], [], [], seconds)[0]:
                os.kill(pid, last)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(handle)


def cut_log(at: int) -> Callable[[], None]:
    """What makes a child die while it writes the `at`-th line of metrics.jsonl."""

    def before() -> None:
        rows, write = [], log.Metrics.write

        def half(metrics: log.Metrics, row: dict[str, Any]) -> None:
            rows.append(row)
            if len(rows) == at:
                line = json.dumps(row)
                with open(metrics.path, "a") as file:
                    file.write(line[: len(line) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write(metrics, row)

        log.Metrics.write = half  # type: ignore[method-assign]

    return before


def facts(folder: Path) -> dict[str, Any]:
    """What two runs into the same folder have to share: every file, of the log and the report what does not vary."""
    found: dict[str, Any] = {"": sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            found[name] = [{k: v for k, v in row.items() if not k.startswith(VARIES)} for row in rows]
        elif path.is_file() and path.name not in ("report.md", "Fine-Tuning.png"):  # times and memory are in them
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def difference(right: dict[str, Any], found: dict[str, Any]) -> str:
    """In words; empty if they are the same."""
    for name in sorted(right.keys() | found.keys()):
        a, b = right.get(name), found.get(name)
        if a == b:
            continue
        if isinstance(a, list) and isinstance(b, list):
            if not name:
                more, fewer = sorted(set(b) - set(a)), sorted(set(a) - set(b))
                return f"files: more {more[:6]}, missing {fewer[:6]}"
            wrong = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            return (
                f"{name}: {len(a)} and {len(b)} lines; line {wrong + 1}: {a[wrong : wrong + 1]} {b[wrong : wrong + 1]}"
            )
        return f"{name} differs"
    return ""


class Book:
    """Counts what was tried, and what failed."""

    def __init__(self, name: str) -> None:
        self.name, self.counts, self.faults, self.began = name, Counter[str](), list[str](), time.perf_counter()

    def fault(self, what: str, story: str) -> None:
        self.faults.append(f"{what} | {story}")
        print(f"  FAILED {self.name}: {what[:400]} | {story}", flush=True)

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {what}" for what, number in sorted(self.counts.items()))
        return f"{self.name}: {counts}; {len(self.faults)} failed, in {time.perf_counter() - self.began:.0f} s"


def judge(book: Book, story: str, code: int, log: str, allowed: tuple[int, ...] = (0, 1, 2)) -> None:
    """An allowed exit code, and one line for an error."""
    book.counts[f"exit {code}"] += 1
    lines = [line for line in log.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    if "Traceback" in log:
        book.fault(f"traceback: {[line for line in log.splitlines() if line.strip()][-1]} {log[-900:-300]}", story)
    elif code not in allowed:
        book.fault(f"exit {code}: {log[-300:]}", story)
    elif code in (1, 2) and len(lines) != 1:
        book.fault(f"exit {code} with {len(lines)} lines of error: {log[-300:]}", story)
