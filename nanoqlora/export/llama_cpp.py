"""Real llama.cpp, asked about a .gguf file: its template engine, its tokenizer, its arithmetic.

The package xllamacpp brings llama.cpp with its server, and may be missing. `Server` starts this file by its path as a
process of its own, where xllamacpp is imported and nothing of ours is (`serve`), and asks it over HTTP on a free port
of the loopback interface. So a file that crashes llama.cpp crashes nothing else.

Who is to blame when that fails? `Refused`: llama.cpp does not take the file. `NotAsked`: it could not be asked (not
installed, another version, another processor, no memory, killed), which is no evidence against the file.

As a command it asks a GGUF file one question, with the chat template that is stored in it, and prints the answer:

    python -m nanoqlora.export.llama_cpp MODEL.gguf "question" [--max_tokens 80]
"""

import http.client
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CANNOT_START = 3  # exit code of a process without a usable xllamacpp
NO_FAULT = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU, signal.SIGILL}
NO_MEMORY = re.compile(
    r"bad_alloc|insufficient memory|(?:unable|failed) to allocate|cannot allocate|out of memory", re.IGNORECASE
)


class NotAsked(Exception):
    """llama.cpp could not be asked, and the file is not to blame. The message is the cause."""


class Refused(Exception):
    """llama.cpp does not take the file, or something that it was asked. The message is its reason."""


class Server:
    """llama.cpp with a .gguf file, on the CPU.

    Settings, as `serve` has them:
        n_ctx: tokens of the longest text.
        exact: float32 keys and values and no faster kernels that round differently; else llama.cpp's own defaults.
        hidden: `hidden_states` are wanted.
        lora: the .gguf file of an adapter, with which it computes; beside it the chat template, if it has its own.
        threads: they wait for each other in busy loops, so one too many is slower than one alone, by far.
    Raises:
        NotAsked, Refused: see above.
    """

    def __init__(self, file: str | Path, **settings: Any) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise NotAsked("the package xllamacpp is not installed")
        self.log = tempfile.TemporaryFile()
        command = [sys.executable, "-P", __file__, str(file), json.dumps(settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        assert self.process.stdin and self.process.stdout
        self.pipes = self.process.stdin, self.process.stdout
        lines = (line.decode("utf-8", "replace").strip() for line in self.process.stdout)
        address = next((line for line in lines if line.startswith("http://")), None)
        if address is None:
            raise self._ended()
        # Not urllib: it would go through a proxy that the environment names.
        self.connection = http.client.HTTPConnection(address.removeprefix("http://"))

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        for pipe in self.pipes:
            pipe.close()
        self.process.kill()
        self.process.wait()
        self.log.close()

    def _ended(self) -> Exception:
        """Why the process ended: the file's fault or not."""
        code = self.process.wait()
        self.log.seek(0)
        log = self.log.read().decode("utf-8", "replace")
        self.close()
        if code == CANNOT_START:
            return NotAsked(f"the package xllamacpp cannot be used ({log.strip().splitlines()[-1]})")
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if -code in NO_FAULT:
            return NotAsked(f"its process was ended by {name}{', as when memory runs out' * (name == 'SIGKILL')}")
        if found := NO_MEMORY.search(log):
            return NotAsked(f"it has not enough memory ({found[0]})")
        return Refused(reason_in(log) or f"its process ended with {name}")

    def ask(self, path: str, **question: Any) -> Any:
        """The answer to a request to the server.

        Raises:
            Refused: the request is refused; NotAsked: this version of the server does not know it.
        """
        try:
            self.connection.request("POST", path, json.dumps(question), {"Content-Type": "application/json"})
            response = self.connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException):
            raise self._ended() from None
        if response.status in (404, 405, 501):
            raise NotAsked(f"this version of xllamacpp does not answer {path}")
        if response.status != 200:
            raise Refused(" ".join(str(answer.get("error", {}).get("message")).split()))
        return answer

    def prompt(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
        """What the template in the file makes of a conversation, with the header of the answer."""
        given = {"tools": tools} if tools else {}
        return self.ask("/apply-template", messages=messages, add_generation_prompt=True, **given)["prompt"]

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Text -> ids. `add_special`: BOS in front as the file has it; `parse_special`: <|x|> is a token, not text."""
        return self.ask("/tokenize", content=text, add_special=add_special, parse_special=parse_special)["tokens"]

    def hidden_states(self, ids: list[int]) -> list[list[float]]:
        """(T, D): what the head reads after each token."""
        return self.ask("/embedding", content=ids)[0]["embedding"]

    def complete(self, prompt: str | list[int], max_tokens: int, **more: Any) -> dict[str, Any]:
        """A greedy answer: `content`, `stop_type`, `timings`. A text is tokenised with its special tokens."""
        return self.ask("/completion", prompt=prompt, n_predict=max_tokens, temperature=0, **more)


def reason_in(log: str) -> str:
    """What llama.cpp logged of an error: its first lines of level E, and where its template engine stopped."""
    found = re.findall(r"^(?:[\d.]+ E \s*(?:srv\s|cmn\s)?\s*(.+)|(Error: .+|.*GGML_ASSERT.+|\w*Error: .+))$", log, re.M)
    lines = [" ".join((error or other).split()) for error, other in found]
    return "; ".join(lines[:1] + [line for line in lines[1:] if line.startswith("Error: ")][:1])[:400]


def serve(file: str, n_ctx: int = 512, exact: bool = True, hidden: bool = False, **more: Any) -> None:
    """The other end: load the file, print the address, and stay until the process that asks closes the pipe or ends."""
    try:
        import xllamacpp

        params, f32 = xllamacpp.CommonParams(), xllamacpp.ggml_type.GGML_TYPE_F32
        params.model.path = file
        params.cpuparams.n_threads = more.get("threads", 1)
        # The generation prompt also behind an answer, as training renders it; by default the answer is gone on with.
        settings = {"prefill_assistant": False, "ui": False, "warmup": False, "fit_params": False, "verbosity": 1}
        settings |= {"n_ctx": n_ctx, "n_parallel": 1, "n_gpu_layers": 0, "port": 0}
        if "lora" in more:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(more["lora"], 1.0)]
            template = Path(more["lora"]).with_suffix(".jinja")
            params.chat_template = template.read_text("utf-8") if template.exists() else ""
        if exact:
            settings |= {"cache_type_k": f32, "cache_type_v": f32, "no_extra_bufts": True}
            settings["flash_attn_type"] = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if hidden:  # all tokens of a text in one batch
            settings |= {"n_batch": n_ctx, "n_ubatch": n_ctx, "embedding": True}
            settings["pooling_type"] = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        for name, value in settings.items():
            setattr(params, name, value)
        server = xllamacpp.Server(params)
    except RuntimeError:
        raise  # of a file that it does not take
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(CANNOT_START)
    print(server.listening_address, flush=True)
    sys.stdin.buffer.read()
    os._exit(0)  # at once, whatever it is doing


def main() -> None:
    from ..config.errors import Failed, UserError
    from ..config.load import load_options
    from ..config.options import AskOptions
    from ..config.scripts import script_command

    args = load_options(AskOptions)
    if not Path(args.model).is_file():
        command = script_command("export_gguf.py")
        raise UserError(f"{args.model}: no such file, so there is no model to ask. Write it with {command}.")
    try:
        with Server(args.model, n_ctx=2048) as llama:
            prompt = llama.prompt([{"role": "user", "content": args.question}])
            print(llama.complete(prompt, args.max_tokens)["content"].strip())
    except Refused as error:
        raise UserError(f"{args.model}: llama.cpp refuses it ({error}). Export it again.") from error
    except NotAsked as error:
        raise Failed(f"llama.cpp was not asked: {error}. It does not depend on {args.model}.") from error


if __name__ == "__main__":
    if __package__:
        from ..config.commands import run_command

        run_command(main)
    else:  # by its path
        serve(sys.argv[1], **json.loads(sys.argv[2]))
