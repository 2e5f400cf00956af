"""One line of progress, with rate and time left: rewritten in a terminal, now and then a new one in a log."""

import sys
import time

from pipelines import metrics


class Progress:
    def __init__(self, name: str, unit: str, total: int, done: int = 0) -> None:
        self.name, self.unit, self.total = name, unit, total
        self._begin, self._before, self.done = time.monotonic(), done, done
        self._terminal = sys.stdout.isatty()
        self._next = 0.0

    def advance(self, amount: int, note: str = "") -> None:
        self.done += amount
        metrics.PROGRESS(self.done / max(self.total, 1), self.name)
        now = time.monotonic()
        if now < self._next and self.done < self.total:
            return
        self._next = now + (0.2 if self._terminal else 5)
        rate = (self.done - self._before) / max(now - self._begin, 1e-6)
        left = (self.total - self.done) / rate if rate else 0
        line = f"{self.name}: {self.done}/{self.total} {self.unit}, {rate:.3g}/s, {clock(left)} left"
        line += f", {note}" if note else ""
        ends = "\n" if not self._terminal or self.done >= self.total else ""
        print(f"\r\033[K{line}" if self._terminal else line, end=ends, flush=True)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
