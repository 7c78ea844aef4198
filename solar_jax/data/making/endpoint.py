"""A client of an OpenAI-compatible endpoint: retries, waits as it is asked to, and gives up in one sentence."""

import dataclasses
import http
import json
import random
import re
import threading
import time
import urllib.parse
from typing import Any

from solar_jax.data.making.web import WEB_FAILURES, Response, Web, api_base
from solar_jax.errors import UserError, phrase

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the first retry, doubled for each further one
LONGEST_ASKED = 600.0  # seconds that an endpoint may ask to wait
MOST_FAILURES = 5  # requests in a row, each with all its retries
_REFUSED = {400, 413, 422}  # of one request: the next may be answered
_PASSING = {408, 409, 425, 429}  # tried again, as is any status from 500 on
_SHOWN = 200  # characters of what was found


@dataclasses.dataclass(frozen=True)
class Reply:
    text: str
    finish: str  # "stop", "length", ...; "" if the endpoint does not say
    model: str  # as the endpoint names it
    tokens_in: int = 0
    tokens_out: int = 0
    retries: int = 0


class Unanswered(Exception):
    """Raised for one request that got no answer; `refused` if asking again would not help."""

    def __init__(self, why: str, refused: bool = False):
        super().__init__(why)
        self.refused = refused


class _Passing(Exception):
    def __init__(self, why: str, after: float | None = None):
        super().__init__(why)
        self.after = after


class _Nonsense(Exception):
    pass


class Endpoint:
    """The endpoint at a URL, for any number of threads."""

    def __init__(self, url: str, key: str = "", *, timeout: float = 300.0, retries: int = 5):
        self.url, self._key, self._retries = api_base(url), key, retries
        self._path = urllib.parse.urlsplit(self.url).path
        self._web = Web(self.url, timeout)
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "solar_jax"}
        self._headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._failures, self._answered, self._not_before = 0, False, 0.0

    def served_model(self, name: str | None) -> str:
        """Returns the model to ask: `name`, or the only one that the endpoint lists.

        Raises:
          UserError: the endpoint is away, refuses the key, or lists no model or several while no name is given.
        """
        try:
            response = self._web.request("GET", f"{self._path}/models", self._headers)
        except WEB_FAILURES as e:
            raise UserError(f"{self.url}: cannot be reached: {self._why(e)}.") from e
        if name is not None and response.status not in (401, 403):
            return name  # not every endpoint lists its models
        if response.status != http.HTTPStatus.OK:
            raise UserError(f"{self.url}/models: {self._said(response)}.")
        try:
            names = [str(entry["id"]) for entry in json.loads(response.body)["data"]]
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            found = self._found(response.body)
            raise UserError(f"{self.url}/models: expected JSON with a list of models, found {found}.") from e
        if len(names) != 1:
            listed = ", ".join(sorted(names)[:20]) + ", ..." * (len(names) > 20) if names else "none"
            raise UserError(f"{self.url}: serves {len(names)} models; name one by --model: {listed}.")
        return names[0]

    def chat(self, request: dict[str, Any]) -> Reply:
        """Returns the answer to a request of /chat/completions.

        Raises:
          Unanswered: this request failed, with all its retries, or the client was closed.
          UserError: no other request would be answered either.
        """
        why = ""
        for tried in range(self._retries + 1):
            self._wait_until(self._not_before)
            try:
                reply = self._ask(request)
            except _Nonsense as e:
                if not self._answered:
                    raise UserError(f"{self.url}: expected an answer of a chat endpoint, found {e}.") from e
                why = f"found {e}"
                wait = self._backoff(tried)
            except _Passing as e:
                why = str(e)
                wait = self._backoff(tried) if e.after is None else e.after + random.uniform(0, FIRST_WAIT)
                if wait > LONGEST_ASKED:
                    raise UserError(
                        f"{self.url}: {why}, and asks to come back in {wait:.0f} s; the same command goes on then."
                    ) from e
                if e.after is not None:  # it means all of us
                    self._not_before = max(self._not_before, time.monotonic() + e.after)
            else:
                with self._lock:
                    self._failures, self._answered = 0, True
                return dataclasses.replace(reply, retries=tried)
            if tried < self._retries:
                self._wait_until(time.monotonic() + wait)
        self._count(why)
        raise Unanswered(why)

    def close(self) -> None:
        """Ends all requests that are under way or wait for their next try."""
        self._closed.set()
        self._web.close()

    def _ask(self, request: dict[str, Any]) -> Reply:
        body = json.dumps(request).encode()
        try:
            response = self._web.request("POST", f"{self._path}/chat/completions", self._headers, body)
        except WEB_FAILURES as e:
            raise _Passing(self._why(e)) from e
        status = response.status
        if status in _PASSING or status >= 500:
            raise _Passing(self._said(response), response.retry_after)
        if status in _REFUSED:
            self._count(self._said(response))
            raise Unanswered(self._said(response), refused=True)
        if status != http.HTTPStatus.OK:
            raise UserError(f"{self.url}/chat/completions: {self._said(response)}.")
        return self._reply(response.body, str(request.get("model", "")))

    def _reply(self, body: bytes, model: str) -> Reply:
        try:
            value = json.loads(body)
            choice = value["choices"][0]
            text = choice["message"]["content"] or ""
            usage = value.get("usage") or {}
            tokens = [int(usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens")]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as e:
            raise _Nonsense(self._found(body)) from e
        text = text.encode(errors="replace").decode()  # JSON may hold half of a surrogate pair
        return Reply(text, str(choice.get("finish_reason") or ""), str(value.get("model") or model), *tokens)

    def _count(self, why: str) -> None:
        """Counts a request that failed for good.

        Raises:
          UserError: it is one of too many in a row.
        """
        with self._lock:
            self._failures += 1
            failures = self._failures
        if failures >= MOST_FAILURES and not self._closed.is_set():
            raise UserError(
                f"{self.url}: {failures} requests in a row failed, the last: {why}; the same command goes on from "
                "what is complete."
            )

    def _wait_until(self, moment: float) -> None:
        """Sleeps until a moment of the monotonic clock.

        Raises:
          Unanswered: the client is closed.
        """
        if self._closed.wait(max(0.0, moment - time.monotonic())):
            raise Unanswered("the client was closed")

    @staticmethod
    def _backoff(tried: int) -> float:
        return min(LONGEST_WAIT, FIRST_WAIT * 2**tried) * random.uniform(0.5, 1.5)

    def _why(self, e: BaseException) -> str:
        return self._short(f"{phrase(e)}")

    def _said(self, response: Response) -> str:
        """Describes a response that is no answer by its status and the message in it."""
        known = {s.value: s.phrase for s in http.HTTPStatus}
        status = f"answered {response.status} {known.get(response.status, '')}".rstrip()
        if 300 <= response.status < 400:
            return f"{status}, to {self._short(response.header('Location') or 'nowhere')}"
        return f"{status}: {self._found(response.body)}" if response.body.strip() else status

    def _found(self, body: bytes) -> str:
        """Describes what was found in place of an answer."""
        text = body.decode(errors="replace").strip()
        if not text:
            return "an empty answer"
        if text[0] == "<":
            title = re.search(r"<title[^>]*>(.*?)</title>", text, re.DOTALL | re.IGNORECASE)
            return f"an HTML page{f' {self._short(title[1])!r}' if title else ''}"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return f"no JSON but {self._short(text)!r}"
        if not isinstance(value, dict):
            return f"JSON that is no object but {type(value).__name__}"
        if error := next((value[key] for key in ("error", "detail", "message") if value.get(key)), None):
            said = error.get("message", error) if isinstance(error, dict) else error
            return f"an error: {self._short(str(said))}"
        if "choices" not in value:
            return self._short(f"JSON without 'choices', with the keys {sorted(value)}")
        if not value["choices"]:
            return "JSON with empty 'choices'"
        return self._short(f"JSON with choices of another form: {json.dumps(value['choices'])}")

    def _short(self, text: str) -> str:
        """Puts a text on one line, without the key, which some endpoints repeat."""
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:_SHOWN].rstrip(" .,")
