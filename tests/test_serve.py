"""The serve command says what it serves, ends its streams, and refuses bad flags before the model is loaded."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import openai
import pytest

from solar_jax import serve
from solar_jax.errors import UserError
from solar_jax.serving import address
from tests.serving.servers import save_writer

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return save_writer(tmp_path_factory.mktemp("serve") / "writer")


@contextlib.contextmanager
def started(*flags: str) -> Iterator[tuple[subprocess.Popen, list[str]]]:
    """Starts the command; yields it with the lines up to the one that says ready."""
    arguments = [sys.executable, "-m", "solar_jax.serve", "--port=0", *flags]
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if line == "ready\n":
                break
        yield process, lines
    finally:
        process.kill()
        process.communicate()


def refused(*flags: str, without: str = "") -> str:
    """Runs the command, which must end with one sentence; `without` is a package that is then missing."""
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys({without.split()!r}))\n"
    code += f"sys.argv = ['serve', *{flags!r}]; runpy.run_module('solar_jax.serve', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert done.stdout == ""  # the model is not loaded yet
    return line


@pytest.mark.slow  # a command
def test_the_server_says_what_it_serves_and_a_signal_lets_running_streams_end(folder):
    with started(f"--model={folder}", "--rows=2", "--context=900") as (process, lines):
        shown = "\n".join(lines)
        assert re.search(r"model    writer: 1\d\d,\d\d\d parameters, float32, [\d,]+ bytes on 1 cpu device", shown)
        assert re.search(r"rows     2 of at most 900 tokens, cache of at most 1,382,400 bytes", shown)
        (url,) = re.findall(r"address  (http://127.0.0.1:\d+/v1), without a key", shown)
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        with httpx.Client(base_url=url.removesuffix("/v1"), trust_env=False, timeout=60) as web:
            assert web.get("/health").json() == {"status": "ready", "running": 0, "waiting": 0}
            stream = client.completions.create(model="writer", prompt="x", max_tokens=800, temperature=0, stream=True)
            text = next(stream).choices[0].text
            process.send_signal(signal.SIGTERM)
            while web.get("/health").status_code == 200:
                pass
            with pytest.raises(openai.InternalServerError, match="the server is ending") as late:
                client.completions.create(model="writer", prompt="x")
            assert late.value.status_code == 503
            rest = list(stream)
        assert len(text + "".join(chunk.choices[0].text for chunk in rest)) > 700
        assert rest[-1].choices[0].finish_reason == "length"
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.slow  # a command
def test_a_second_interrupt_ends_running_streams_at_once_and_the_exit_status_is_still_0(folder):
    with started(f"--model={folder}", "--rows=1", "--nowarm_up", "--name=mine") as (process, lines):
        (url,) = re.findall(r"(http\S+/v1)", "\n".join(lines))
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        stream = client.completions.create(model="mine", prompt="x", max_tokens=1000, temperature=0, stream=True)
        next(stream)
        process.send_signal(signal.SIGINT)
        twice = threading.Timer(0.2, process.send_signal, [signal.SIGINT])
        twice.start()
        with pytest.raises(openai.APIError, match="the server is ending"):
            list(stream)
        assert process.wait(10) == 0


@pytest.mark.slow  # commands
def test_what_cannot_work_is_refused_in_a_sentence_before_the_model_is_loaded(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "another program is listening" in refused(f"--model={folder}", f"--port={port}")
    assert "comes with the extra `serve`" in refused(f"--model={folder}", without="uvicorn")
    said = refused(f"--model={folder}", "--host=0.0.0.0", "--port=0")
    assert said == (
        "error: --host=0.0.0.0 lets other machines ask without a key; give --api_key_file FILE, or --host 127.0.0.1."
    )


@pytest.mark.parametrize(
    ("host", "said"),
    [("0.0.0.0", "without a key"), ("::", "without a key"), ("no.such.host.invalid", "no such address")],
)
def test_other_addresses_than_this_machines_own_need_a_key(host, said):
    with pytest.raises(UserError, match=said):
        address.bind_address(host, 0, has_keys=False)


def test_addresses_of_this_machine_need_none():
    for host in ("127.0.0.1", "localhost", "127.8.8.8"):
        sock = address.bind_address(host, 0, has_keys=False)
        assert address.url_of(sock).startswith("http://127.")
        sock.close()
    address.bind_address("0.0.0.0", 0, has_keys=True).close()


def test_keys_are_the_lines_of_a_file(tmp_path):
    (tmp_path / "keys").write_text("one \n\n two\n")
    assert address.read_keys(str(tmp_path / "keys")) == [b"one", b"two"]
    (tmp_path / "none").write_text("\n")
    with pytest.raises(UserError, match="none: expected a key on a line, found none"):
        address.read_keys(str(tmp_path / "none"))
    with pytest.raises(UserError, match="absent: No such file"):
        address.read_keys(str(tmp_path / "absent"))


def test_a_cache_that_cannot_fit_is_refused_at_the_start(folder, monkeypatch):
    from solar_jax.decoding import engine as engine_module
    from tests.serving.servers import load_alone

    engine = load_alone(folder).engine(rows=100)
    monkeypatch.setattr(engine_module.chips, "memory_bytes", lambda device: 30e6)
    with pytest.raises(UserError, match=r"rows fit. Give fewer --rows or a shorter --context."):
        serve._check_cache(engine)
