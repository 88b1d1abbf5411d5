"""A second thread for tests: what hangs in it fails the test and does not hang with it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

PATIENCE = 60.0


class Worker:
    """Does one thing after the other in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name=name, daemon=True)
        self.thread.start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._todo.put((future, function, args))
        return future

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns or raises; TimeoutError if it hangs."""
        return self.submit(function, *args).result(PATIENCE)

    def end(self) -> None:
        self._todo.put(None)

    def _work(self) -> None:
        while (job := self._todo.get()) is not None:
            future, function, args = job
            try:
                future.set_result(function(*args))
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)
            del job, future, function, args


@contextmanager
def another_thread(name: str = "another") -> Iterator[Worker]:
    worker = Worker(name)
    try:
        yield worker
    finally:
        worker.end()
