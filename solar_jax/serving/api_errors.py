"""Error of a request: a status and OpenAI's error object."""

from collections.abc import Mapping
from typing import Any

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered, with what the client is shown."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def engine_failed() -> ApiError:
    """The error of everything once the model cannot go on."""
    return ApiError("the model failed and answers nothing until it is started again.", status=500, code="engine_failed")


def server_closing() -> ApiError:
    """The error of what comes while the server ends."""
    return ApiError("the server is ending; ask another one, or later.", status=503, code="ending")
