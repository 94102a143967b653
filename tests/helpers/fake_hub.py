"""A small hub on this machine, as huggingface_hub asks one."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" * 6 + "c0ff"


class FakeHub:
    """The part of a hub that a download talks to. Counts what is asked for."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}  # repository -> path -> contents
        self.gated: set[str] = set()
        self.log: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.cut: int | None = None  # send only so many bytes of the next large file, then hang up
        self.lies = False  # send other bytes than the hash promises
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=lambda: self.server.serve_forever(0.01), daemon=True).start()

    def downloaded(self) -> set[str]:
        return {path.partition(f"/resolve/{COMMIT}/")[2] for method, path, _ in self.log if method == "GET"} - {""}

    def ranges(self) -> list[str | None]:
        return [at for method, path, at in self.log if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0].lstrip("/")
        hub.log.append((self.command, path, self.headers.get("Range")))
        kind, prefix = ("api/", "api/") if path.startswith("api/") else ("", "")
        rest = path.removeprefix(prefix)
        rest = rest.removeprefix("models/") if kind else rest
        parts = rest.split("/")
        name = "/".join(parts[: 3 if parts[0] == "datasets" else 2])
        rest = rest.removeprefix(name).lstrip("/")
        if name not in hub.files:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if name in hub.gated:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        files = hub.files[name]
        if kind and rest.startswith("tree/"):
            return self.answer(200, json.dumps([entry(*item) for item in files.items()]).encode())
        if kind:
            siblings = [{"rfilename": file} for file in files]
            return self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
        file = rest.removeprefix(f"resolve/{COMMIT}/")
        if file not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        self.send(files[file])

    def send(self, data: bytes) -> None:
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if self.headers.get("Range"):
            start, status = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        sent, cut = data[:-1] + bytes([data[-1] ^ 1]) if self.hub.lies else data, None
        if self.command == "GET" and is_large(data):
            cut, self.hub.cut = self.hub.cut, None
        self.answer(status, sent[start:], headers, cut)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            self.close_connection = cut is not None


def is_large(data: bytes) -> bool:
    return len(data) > 10_000


def etag(data: bytes) -> str:
    """Large files go by their SHA-256, small ones by git's SHA-1."""
    if is_large(data):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes) -> dict:
    found = {"type": "file", "path": path, "size": len(data), "oid": etag(data)[:40]}
    if is_large(data):
        found["lfs"] = {"oid": etag(data), "size": len(data), "pointerSize": 134}
    return found
