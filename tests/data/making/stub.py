"""A stand-in for an OpenAI-compatible endpoint on the loopback interface, and questions that it can answer.

What it says is a function of the request alone. `override` takes a request and may return what is sent instead.
"""

import contextlib
import dataclasses
import http.server
import json
import pathlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from solar_jax.data.making.prompts import ANSWER, REPHRASE
from solar_jax.make_data import Making

NAMES = ("Ada", "Bela", "Chidi", "Dora", "Emre")
THINGS = ("apples", "marbles", "stamps", "pencils", "coins")
HEAD = "Here is a small puzzle about the same thing."


@dataclasses.dataclass
class Sent:
    """A response in place of the stub's own."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    drip: float = 0.0  # seconds between two bytes of the body


Override = Callable[[dict[str, Any]], Sent | None]


def question(i: int) -> dict[str, str]:
    """The i-th of any number of questions in GSM8K's form, all different; the answer is the sum of its numbers."""
    who, what = NAMES[i % 5], THINGS[i // 5 % 5]
    a, b, c = 1000 + 7 * i, 3 + i, 20 + i % 9
    total = a + b + c
    text = f"{who} keeps {a:,} {what} at home, finds {b} on Monday and buys {c} on Friday. How many {what} are there?"
    worked = f"{who} has {a}+{b}+{c} = <<{a}+{b}+{c}={total}>>{total} {what}."
    return {"question": text, "answer": f"{worked}\n#### {total:,}"}


def write_questions(file: pathlib.Path, records: list[dict[str, Any]]) -> pathlib.Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def is_answer(body: dict[str, Any]) -> bool:
    return body["messages"][0]["content"] == ANSWER


def asked(body: dict[str, Any]) -> str:
    """The question of a request, as it was before it was rephrased."""
    return body["messages"][1]["content"].removeprefix(f"{HEAD} ").partition(" (manner")[0]


def own_text(body: dict[str, Any]) -> str:
    text = body["messages"][1]["content"]
    if not is_answer(body):
        manner = body["messages"][0]["content"].removeprefix(REPHRASE).strip()  # what rephrasings differ in
        return f"{HEAD} {text}" + (f" (manner: {manner})" if manner else "")
    total = sum(int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text.partition(" (manner")[0]))
    return f"Add all of them.\nThe sum is {total}.\nThe answer is: {total}"


def said(text: str | None, finish: str = "stop", **more: Any) -> Sent:
    value = {
        "object": "chat.completion", "model": "stub-1", "usage": {"prompt_tokens": 11, "completion_tokens": 7},
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
    }  # fmt: skip
    return Sent(body=json.dumps(value | more).encode())


class Stub:
    """The endpoint's behaviour, and all that it was asked."""

    def __init__(self, override: Override | None = None, delay: float = 0.0, models: tuple[str, ...] = ("stub",)):
        self.override, self.delay, self.models = override, delay, models
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.most_at_once, self._at_once, self._lock = 0, 0, threading.Lock()
        self.url = ""

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Sent:
        self.keys.add(headers.get("Authorization"))
        if method == "GET":
            listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
            return Sent(body=json.dumps(listed).encode()) if path == "/v1/models" else Sent(404, b"{}")
        if path != "/v1/chat/completions":
            return Sent(404, b'{"error": {"message": "no such path"}}')
        request = json.loads(body)
        with self._lock:
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay)
            return (self.override(request) if self.override else None) or said(own_text(request))
        finally:
            with self._lock:
                self._at_once -= 1


@contextlib.contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            sent = stub.answer(self.command, self.path, self.headers, body)
            with contextlib.suppress(OSError):  # the other side may be gone
                self.send_response(sent.status)
                for name, value in sent.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(sent.body)))
                self.end_headers()
                for byte in [sent.body] if not sent.drip else [sent.body[i : i + 1] for i in range(len(sent.body))]:
                    self.wfile.write(byte)
                    self.wfile.flush()
                    time.sleep(sent.drip)

        do_GET = do_POST = do

        def log_message(self, *args: Any) -> None:
            del args

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


FIFTY = [question(i) for i in range(50)]
FIRST = FIFTY[0]["question"]  # its numbers are 1,000, 3 and 20
MakeJob = Callable[..., Making]  # (stub, questions, name of the output folder, changes) -> options of a job


def job_in(folder: pathlib.Path) -> MakeJob:
    """Returns a function that makes the options of jobs in a folder, about the first questions of `FIFTY`."""

    def of(stub: Stub, records: list[dict[str, str]] = FIFTY[:5], out: str = "out", **changes: Any) -> Making:
        file = write_questions(folder / "questions.jsonl", records)
        return dataclasses.replace(Making("math_instruct", file, stub.url, folder / out), **changes)

    return of


def lines(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def dropped(out: pathlib.Path) -> list[tuple[int, str, str]]:
    return [(r["provenance"]["record"], r["reason"], r["details"]) for r in lines(out / "dropped.jsonl")]
