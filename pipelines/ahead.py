"""Work done in threads while its results are used, of which no more than are worked on wait in memory."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Future[Result]]:
    """function(item) of each, in order, as many items ahead of the caller as there are threads.

    Who ends early does not wait for what was begun ahead.
    """
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        items = iter(items)
        waiting.extend(pool.submit(function, item) for item in itertools.islice(items, threads))
        while waiting:
            first = waiting.popleft()
            waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
            yield first
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
