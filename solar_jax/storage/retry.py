"""What is asked of a bucket again when it fails."""

import time
from collections.abc import Callable
from typing import Any

from solar_jax.errors import UserError, phrase

TRIES, FIRST_WAIT = 4, 1.0  # of one action; the wait in seconds doubles


def retry(action: Callable[[], Any], what: str) -> Any:
    """Calls `action` until it works, a few times; a UserError of its own is raised at once.

    Raises:
      UserError: it did not work.
    """
    for attempt in range(TRIES):
        try:
            return action()
        except UserError:
            raise
        except Exception as e:  # each cloud's client has exceptions of its own
            if attempt == TRIES - 1:
                raise UserError(f"{what}: the bucket failed {TRIES} times ({phrase(e)}).") from e
            time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError
