"""How a command ends: a reader that leaves, a terminal without a letter, variables of torchrun, and faults of ours."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT
from processes import run_interpreter, run_process
from ranks import end_of_run_with_fault, on_ranks
from small_runs import ENVIRONMENT, alpaca_rows, run_here, save_tiny_model, steps_of, write_rows, write_run

import train
from nanoqlora.config import commands as config_commands
from nanoqlora.config.commands import OURS, run_command
from nanoqlora.config.errors import Failed, UserError
from nanoqlora.run import build, checkpoints
from nanoqlora.run.forecast import Forecast
from nanoqlora.weights import pretrained

COMMANDS = [
    ["train.py"],
    ["merge.py"],
    ["export_gguf.py"],
    ["bench.py"],
    ["-m", "nanoqlora.evaluate"],
    ["-m", "nanoqlora.chat"],
]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run with 'space")
    model, data = save_tiny_model(folder / "model"), write_rows(folder / "data.jsonl", alpaca_rows(8))
    return write_run(folder / "train.yml", model, data, max_steps=2, val_set_size=2, save_steps=1)


def end_with_closed_pipe(words: list[str], which: str) -> tuple[int, str]:
    """Exit code, and what is on the other stream, of a command whose stdout or stderr nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {which: writer}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, text=True, timeout=300, **streams)
    os.close(writer)
    return done.returncode, done.stderr or done.stdout or ""


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[-1])
def test_help_into_a_reader_that_leaves_is_quiet(words):
    assert end_with_closed_pipe([*words, "--help"], "stdout") == (0, "")


WRONG = (
    ["train.yml", "--lora_rr", "4"],
    ["--plan", "--rehearse"],
    ["absent.yml"],
    ["--seed", "x"],
    ["--lora_target_linear", "false"],
)


def test_help_and_wrong_settings_need_no_pytorch():
    """All in one process, which must not have imported it at the end."""
    cases = [(words, "--help") for words in COMMANDS] + [(words, "--modle") for words in COMMANDS]
    cases += [(["train.py"], *words) for words in WRONG]
    code = """
import json, runpy, sys
for words, *arguments in json.loads(sys.argv[1]):
    sys.argv = [words[-1], *arguments]
    try:
        run = runpy.run_module if words[0] == "-m" else runpy.run_path
        run(words[-1], run_name="__main__")
    except SystemExit as end:
        print("code", end.code)
print("torch" in sys.modules)
"""
    words = [sys.executable, "-c", code, json.dumps(cases)]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    codes = [line for line in done.stdout.splitlines() if line.startswith("code ")]
    assert codes == ["code 0"] * len(COMMANDS) + ["code 2"] * (len(cases) - len(COMMANDS)), done.stderr
    assert done.stdout.splitlines()[-1] == "False" and done.stderr.count("error: ") == done.stderr.count("\n")


def test_the_package_alone_is_no_pytorch():
    code = "import sys, nanoqlora as nq; assert 'torch' not in sys.modules and 'Llama' in dir(nq); print(nq.UserError)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "UserError" in done.stdout, done.stderr


@pytest.mark.parametrize("which", ["stdout", "stderr"])
def test_a_run_goes_on_when_nobody_reads_what_it_prints(run_file, tmp_path, which):
    code, other = end_with_closed_pipe(["train.py", str(run_file), "--output_dir", str(tmp_path / "out")], which)
    assert code == 0 and "Broken" not in other and len(steps_of(tmp_path / "out")) == 2, other


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_a_run_goes_on_without_stdout_and_stderr(run_file, tmp_path, closed):
    command = shlex.join([sys.executable, "train.py", str(run_file), "--output_dir", str(tmp_path / "out")])
    done = subprocess.run(
        f"{command} {closed}", shell=True, cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=300
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr and len(steps_of(tmp_path / "out")) == 2, done


@pytest.mark.parametrize("work", ["print('scores')", "open('/dev/full', 'w', 1).write('scores\\n')"])
def test_a_full_disk_ends_with_one_line(work):
    """Else `evaluate > scores.txt` would end well, with a file that is cut."""
    words = [sys.executable, "-c", f"from nanoqlora.config.commands import run_command\nrun_command(lambda: {work})"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, cwd=ROOT, env=ENVIRONMENT, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: stdout or a file cannot be written (No space left on device)"), done.stderr


def test_a_run_goes_on_when_its_terminal_is_closed(run_file, tmp_path):
    """Writing to it then is an input/output error."""
    master, terminal = os.openpty()
    os.close(master)
    words = [sys.executable, "train.py", str(run_file), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(words, stdout=terminal, stderr=terminal, cwd=ROOT, env=ENVIRONMENT, timeout=300)
    os.close(terminal)
    assert done.returncode == 0 and len(steps_of(tmp_path / "out")) == 2


def test_letters_that_a_terminal_lacks_are_escaped(tmp_path):
    code = "from nanoqlora.config.commands import run_command\nrun_command(lambda: print('Ahoj \\u2603 \\udcff'))"
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Ahoj \\u2603 \\udcff\n"), done.stderr


def test_a_name_that_is_no_utf_8_is_one_line():
    done = subprocess.run([sys.executable, "train.py", b"a\xff.yml"], cwd=ROOT, env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(b"error: command line: ") and done.stderr.count(b"\n") == 1
    assert rb"'a\udcff.yml'" in done.stderr


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many is not a number"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK does not fit"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x is not a number"),
    ],
)
def test_variables_of_torchrun_without_torchrun_are_one_line(monkeypatch, run_file, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", variables.get("RANK", "")) if "RANK" not in variables else None
    ended = run_here(train.main, run_file)
    if variables.get("RANK") == "2":
        assert ended.code == 2
        return
    assert ended.code == 2 and said in ended.err and "torchrun" in ended.err and ended.err.count("\n") == 1, ended.err


def test_a_lone_rank_is_the_first_one(monkeypatch, run_file, tmp_path):
    monkeypatch.setenv("RANK", "3")
    assert run_here(train.main, run_file, "--output_dir", tmp_path / "out").code == 0
    assert len(steps_of(tmp_path / "out")) == 2
    assert "no such file" in run_here(train.main, tmp_path / "absent.yml").err


# ------------------------------------------------------------------------------------------------ ours is ours


def broken(*_: object, **__: object) -> None:
    raise ValueError("a size that does not fit")


@pytest.mark.parametrize(
    "module, name",
    [
        (build, "inject_lora"),
        (build, "fuse_blocks"),
        (build, "keeps_for"),
        (pretrained, "rope_frequencies"),
        (checkpoints, "save_adapter"),
        (train, "save_results"),
    ],
)
def test_a_fault_of_ours_is_a_traceback_with_one_line(run_file, tmp_path, monkeypatch, module, name):
    """Not "error:" and exit 2, wherever in a run it is."""
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(ValueError, match="does not fit") as fault:
        run_here(train.main, run_file, "--output_dir", tmp_path / "out")
    assert not isinstance(fault.value, UserError) and fault.value.__notes__ == [OURS]


def test_the_line_stands_once_at_the_end_of_the_traceback():
    code = "from nanoqlora.config.commands import run_command\nrun_command(lambda: 1 / 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == OURS and done.stderr.count(OURS) == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("x"), TypeError("y")]
)
def test_only_a_disk_that_is_full_reads_so(run_file, tmp_path, monkeypatch, error):
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoints, "save_file", fails)
    with pytest.raises(type(error), match=str(error)):
        run_here(train.main, run_file, "--output_dir", tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*")), "what was half-written is removed"


def test_memory_that_runs_out_in_the_middle_is_one_line(run_file, tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More")

    keys = ("--max_steps", 4, "--save_steps", 1, "--gradient_checkpointing", "false", "--output_dir")
    monkeypatch.setattr(train, "sum_and_clip", fails)
    ended = run_here(train.main, run_file, *keys, tmp_path / "first")
    assert ended.code == 1 and ended.err.count("\n") == 1
    expected = (
        r"step 1: cpu is out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. .* [0-9.]+ GiB; less needs "
    )
    assert re.search(
        expected + r"gradient_checkpointing: true \([0-9.]+ GiB\), .*No checkpoint is saved yet\.", ended.err
    )

    step = torch.optim.AdamW.step
    calls = []

    def fails_later(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:  # on a CPU the error has no type of its own
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 8 bytes")
        return step(*arguments)

    monkeypatch.undo()
    monkeypatch.setattr(torch.optim.AdamW, "step", fails_later)
    monkeypatch.setattr(train, "measure", lambda *_: Forecast(1.0, {}, 1, ""))  # which takes steps too
    out = tmp_path / "out"
    ended = run_here(train.main, run_file, *keys, out)
    assert ended.code == 1 and ended.err.count("error: ") == 1 and "Traceback" not in ended.err
    assert "step 3: cpu is out of memory: " in ended.err and f"{out}/checkpoint-2 is saved; go on" in ended.err


@pytest.mark.parametrize("kind, marks", [("fault", "ZeroDivisionError"), ("failed", "error: no way")])
def test_what_ends_all_ranks_is_told_once(run_file, tmp_path, kind, marks):
    ended = on_ranks(2, end_of_run_with_fault, kind, run_file, "--output_dir", tmp_path / "out")
    assert all(code == 1 for code, _, _ in ended)
    assert sum(err.count(marks) > 0 for _, _, err in ended) == 1, ended


# ------------------------------------------------------------------------------------------------ Ctrl-C twice


@pytest.mark.parametrize("where", ["save_checkpoint", "judge", "save_results"])
def test_a_second_ctrl_c_ends_at_once(run_file, tmp_path, monkeypatch, where):
    """While it saves, answers, or writes results: the first one would wait for the end of that."""
    seen = []

    def twice(*_: object, **__: object) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            seen.append(where)

    monkeypatch.setattr(train, where, twice)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = run_here(train.main, run_file, "--output_dir", tmp_path / "out")
    signal.signal(signal.SIGINT, before)
    assert ended.code == 130 and "Traceback" not in ended.err and seen == [where]


# ------------------------------------------------------------------------------------------------ to repeat it


def test_the_command_in_the_report_repeats_the_run(run_file, tmp_path):
    """Under torchrun too, with its arguments, and with names that need quotes; the losses are equal."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launcher in (("one rank", []), ("two ranks", torchrun)):
        out = tmp_path / name
        words = [*launcher, "train.py", str(run_file), "--output_dir", str(out), "--seed", "7"]
        ended = (run_interpreter if launcher else run_process)(*words)
        assert ended.code == 0, ended.err
        report = (out / "report.md").read_text("utf-8")
        repeat = report.split("## To repeat it")[1]
        assert f"In `{ROOT}`, with another output_dir" in repeat
        command = repeat.split("```sh\n")[1].split("\n```")[0]
        assert shlex.split(command)[1:] == words and shlex.split(command)[0] == "python"
        if launcher:
            continue
        ended = run_process(*shlex.split(command)[1:], "--output_dir", tmp_path / "again")
        assert ended.code == 0, ended.err
        losses = [[row["loss"] for row in steps_of(folder)] for folder in (out, tmp_path / "again")]
        assert losses[0] == losses[1] and len(losses[0]) == 2


def test_told_everywhere_is_told_by_the_first_rank(monkeypatch, capsys):
    def fails() -> None:
        raise Failed("as on all", everywhere=True)

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in ((0, "error: as on all\n"), (1, "")):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit, match="1"):
            run_command(fails)
        assert capsys.readouterr().err == said
    assert config_commands.asks_ranks == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")])
def test_memory_that_runs_out_anywhere_is_one_line(run_file, monkeypatch, error):
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(train, "check_surroundings", fails)
    ended = run_here(train.main, run_file)
    assert ended.code == 1 and ended.err.count("error: out of memory: ") == 1 and "Traceback" not in ended.err


def test_eval_table_without_held_out_data_is_named(run_file, tmp_path):
    keys = ("--eval_table_size", 2, "--val_set_size", 0, "--max_steps", 1)
    ended = run_here(train.main, run_file, "--output_dir", tmp_path / "out", *keys)
    assert ended.code == 0 and "warning: eval_table_size answers questions at evaluations" in ended.out


@pytest.mark.parametrize("received", ["SIGINT", "SIGTERM"])
def test_ctrl_c_within_the_imports_is_no_traceback(tmp_path, run_file, received):
    """A torch that takes its time to import, and is stopped."""
    stop = f"import os, signal, time\nos.kill(os.getpid(), signal.{received})\ntime.sleep(9)\n"
    (tmp_path / "torch.py").write_text(stop)
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", run_file],
        env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    assert (done.returncode, done.stdout, done.stderr) == (-getattr(signal, received), "", "")


def test_a_folder_that_is_deleted_is_one_line(tmp_path, run_file, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    ended = run_here(train.main, run_file)
    assert (
        ended.code == 2
        and ended.err == "error: the folder that this command was started in is deleted. Change to another one.\n"
    )


def test_a_fault_of_ours_is_a_traceback_that_steers_nothing(tmp_path):
    """Whatever a stranger's file has put into the message."""
    program = "from nanoqlora.config.commands import run_command\ndef main():\n    raise ValueError('\\x1b[2J\\x9b')\n"
    program += "run_command(main)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "fault of nanoqlora" in done.stderr
    assert "\x1b" not in done.stderr and "\x9b" not in done.stderr
