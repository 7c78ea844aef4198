"""The routes of OpenAI's interface, as an ASGI application."""

import asyncio
import dataclasses
import hmac
import json
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from solar_jax.decoding.engine import Engine
from solar_jax.decoding.model import Loaded
from solar_jax.serving.api_errors import ApiError, server_closing
from solar_jax.serving.fields import quoted, read_object
from solar_jax.serving.prepared import PreparedCall, prepare_call
from solar_jax.serving.protocol import Call, read_chat, read_completion
from solar_jax.serving.responses import Responses
from solar_jax.serving.streams import AnswerStream, ClientGone, while_connected
from solar_jax.serving.token_bytes import TokenBytes
from solar_jax.serving.worker import CLOSING, READY, Worker

_MOST_BYTES = 1 << 25  # of a body
_GONE = 499  # status that nobody reads, nginx's for a client that left
_HEALTH = "/health"

Read = Callable[[Mapping[str, Any]], Call]


@dataclasses.dataclass(frozen=True)
class Service:
    """A model with its engine, as the routes use it."""

    name: str
    model: Loaded
    engine: Engine
    worker: Worker
    token_bytes: TokenBytes
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def prepared(self, read: Read, body: bytes) -> PreparedCall:
        """Reads a body; takes as long as its prompts are.

        Raises:
          ApiError: it cannot be answered.
        """
        call = read(read_object(body))
        self.check_name(call.model)
        return prepare_call(call, self.model, self.engine)

    def check_name(self, name: str | None) -> None:
        """Raises a ApiError for another model's name."""
        if name is not None and name != self.name:
            raise ApiError(
                f"there is no model {quoted(name)}; this server has {quoted(self.name)}.",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip

    def described(self) -> dict[str, Any]:
        """The model as an entry of /v1/models."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "solar_jax"}


def make_app(service: Service, keys: Sequence[bytes] = ()) -> "Gate":
    """Makes the application.

    Args:
      service: the model.
      keys: of which a client has to give one; anybody may ask if there are none.
    """
    routes = [
        Route(_HEALTH, _health),
        Route("/v1/models", _models),
        Route("/v1/models/{name:path}", _model),
        Route("/v1/completions", _completions, methods=["POST"]),
        Route("/v1/chat/completions", _chat, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        ApiError: _refused, HTTPException: _not_routed, ClientGone: _nobody, ClientDisconnect: _nobody,
        Exception: _broken,
    }  # fmt: skip
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.service = service
    return Gate(app, service.worker, keys)


class Gate:
    """Stands before all routes: counts what is under way, and turns away who has no key or comes too late."""

    def __init__(self, app: ASGIApp, worker: Worker, keys: Sequence[bytes]):
        self.under_way = 0
        self._app, self._worker, self._keys = app, worker, tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == _HEALTH:
            await self._app(scope, receive, send)
            return
        self.under_way += 1
        try:
            error = self._error(scope)
            await (_response(error) if error else self._app)(scope, receive, send)
        except Exception:  # a bug, which is answered; uvicorn would end the connection under the client's next request
            sys.stderr.write(traceback.format_exc())
        finally:
            self.under_way -= 1

    def _error(self, scope: Scope) -> ApiError | None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        # Every key is compared, each in a time that does not tell how much of it is right.
        known = [hmac.compare_digest(key.strip(), one) for one in self._keys]
        if self._keys and not (kind.lower() == b"bearer" and any(known)):
            said = "the key is wrong" if given else "a key is needed"
            return ApiError(
                f"{said}; give it as `Authorization: Bearer KEY`.", status=401, code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return server_closing() if self._worker.state == CLOSING else None


# ---- Routes ----------------------------------------------------------------------------------------------------------
async def _health(request: Request) -> Response:
    worker = _service(request).worker
    state = worker.state
    found: dict[str, Any] = {"status": state} | worker.counts
    if state == READY:
        return JSONResponse(found)
    error = ApiError(f"the server is not ready: {state}.", status=503, code=state)
    return JSONResponse(found | error.body, status_code=503)


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_service(request).described()]})


async def _model(request: Request) -> Response:
    service = _service(request)
    service.check_name(request.path_params["name"])
    return JSONResponse(service.described())


async def _completions(request: Request) -> "Response | EventStream":
    return await _answered(request, read_completion)


async def _chat(request: Request) -> "Response | EventStream":
    return await _answered(request, read_chat)


async def _answered(request: Request, read: Read) -> "Response | EventStream":
    service = _service(request)
    service.worker.check_open()
    body = await _body(request)
    prepared = await asyncio.to_thread(service.prepared, read, body)  # long prompts take seconds
    responses = Responses(prepared, service.model, service.name, service.token_bytes)
    stream = AnswerStream(service.worker, prepared.requests)
    if prepared.call.stream:
        return EventStream(stream, responses, with_usage=prepared.call.usage)
    try:
        found = await while_connected(request.receive, _all(stream))
    finally:
        stream.close()
    return Response(await asyncio.to_thread(_dumped, responses, found), media_type="application/json")


async def _all(stream: AnswerStream) -> list[tuple[int, Any]]:
    return [item async for item in stream.pieces()]


def _dumped(responses: Responses, found: list[tuple[int, Any]]) -> bytes:
    return _json(responses.whole(found))


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


async def _body(request: Request) -> bytes:
    """Receives a body.

    Raises:
      ApiError: it is too large.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            raise ApiError(f"the body has more than {_MOST_BYTES:,} bytes.", status=413, code="body_too_large")
    return bytes(body)


def _service(request: Request) -> Service:
    return request.app.state.service


class EventStream:
    """A response of server-sent events. Its status is known once the first piece is there."""

    def __init__(self, stream: AnswerStream, responses: Responses, *, with_usage: bool):
        self._stream, self._responses, self._with_usage = stream, responses, with_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(scope, receive, send))
        except ClientGone:
            return
        finally:
            self._stream.close()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_begun = False
        try:
            async for event in self._events():
                if not is_begun:
                    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    is_begun = True
                await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
        except ApiError as e:
            if not is_begun:
                await _response(e)(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": b"data: " + _json(e.body) + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        async for index, piece in self._stream.pieces():
            # A prompt's log-probabilities are many.
            chunks = self._responses.chunks
            made = chunks(index, piece) if piece.prompt is None else await asyncio.to_thread(chunks, index, piece)
            for chunk in made:
                yield _json(chunk)
        if self._with_usage:
            yield _json(self._responses.last_chunk)
        yield b"[DONE]"


# ---- Refusals --------------------------------------------------------------------------------------------------------
def _response(error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _refused(request: Request, e: Exception) -> Response:
    del request
    assert isinstance(e, ApiError)
    return _response(e)


async def _not_routed(request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    code = {404: "unknown_path", 405: "method_not_allowed"}.get(e.status_code)
    said = f"{request.method} {request.url.path}: {HTTPStatus(e.status_code).phrase.lower()}."
    return _response(ApiError(said, status=e.status_code, code=code, headers=e.headers))


async def _nobody(request: Request, e: Exception) -> Response:
    del request, e
    return Response(status_code=_GONE)


async def _broken(request: Request, e: Exception) -> Response:
    """Responses for a bug, whose traceback goes to the log alone."""
    del request, e
    return _response(ApiError("the server failed on this request.", status=500, code="internal_error"))
