"""Retries for bucket operations."""

import time
from collections.abc import Callable
from typing import Any

from solar_jax.errors import UserError, phrase

TRIES, FIRST_WAIT = 4, 1.0  # tries per action; seconds before the first retry, doubled for each further one


def retry(action: Callable[[], Any], what: str) -> Any:
    """Calls `action` until it succeeds, a few times at most; a UserError that it raises is not retried.

    Raises:
      UserError: every try failed.
    """
    for attempt in range(TRIES):
        try:
            return action()
        except UserError:
            raise
        except Exception as e:  # each cloud client has its own exception types
            if attempt == TRIES - 1:
                raise UserError(f"{what}: the bucket failed {TRIES} times ({phrase(e)}).") from e
            time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError
