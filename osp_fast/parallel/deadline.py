"""Calls that may never return: a driver, a network, a lock."""

import threading
from collections.abc import Callable
from typing import Any


def in_time(call: Callable[[], Any], seconds: float) -> Any:
    """What `call()` returns or raises, if it does so within `seconds`.

    It runs in a daemon thread of its own. Raises TimeoutError otherwise; the thread is then left behind.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # raised again in the caller's thread
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="in_time")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer in {seconds:g} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
