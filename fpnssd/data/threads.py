"""A map over threads that keeps the order and a bounded number of results in memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 64) -> Iterator[Result]:
    """Yields function(item) for each item, in order, computed by one thread per core.

    Args:
        function: something that releases Python's lock, such as decoding a picture.
        items: may be endless; items are read as results are consumed.
        ahead: how many items beyond the one just yielded are computed or waiting at most.

    Raises:
        The exception of `function`, in place of the item's result; calls that have not started are cancelled.
    """
    running: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > ahead:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
