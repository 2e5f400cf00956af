"""Videos decoded in processes of their own, where one that hangs or crashes its decoder costs only its own row.

    with DecodePool(DECODERS["pyav"], seconds=60) as pool:
        clip = pool(data, wanted, height, width)  # frames, indices, count, fps
        for video, future in zip(videos, pool.ahead(read_and_decode, videos)):
            clip = future.result()  # while the next videos are read and decoded

`wanted(count, fps)` answers the indices of frames. It runs in the caller, may be a closure and may raise BadVideo.
Opening and decoding that takes longer than `seconds` is killed, and so is a process that dies by itself. Both may be
the machine's fault, as where others take its cores or its memory: a new process tries the video once more, for twice as
long at most, and `wanted` is called again. If that fails too, it is the video's fault (BadVideo "hung" or
"decoder_died"), which has cost three times `seconds` and the start of two processes. Whatever else a decoder raises is
raised in the caller.

Without a height and a width frames stay as they are. Where `most` is given, frames of more bytes than that are TooLarge
before they are decoded, as the file says how large they are; a process that takes much more all the same dies.

Nothing can be left behind: what is shared is a file in memory that has no name, an idle process ends when its parent
does, and one that hangs has the kernel's alarm set.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from pipelines.ahead import Item, Result, ahead
from pipelines.secrets import environment_without
from pipelines.video import BadVideo, Crop, Decoder, fit

STARTS = 3  # of a process that is killed while it starts
# What a process may take beside what it began with: the file three times, its frames one by one and together, and what
# a decoder works in.
SPACE, WORK = 6, 2**30


class TooLarge(ValueError):
    """More than the caller has memory for."""


@dataclass(frozen=True)
class Decoded:
    frames: Tensor  # uint8 [len(indices), height, width, 3]
    indices: list[int]
    count: int  # of the video's frames
    fps: float


class DecodePool:
    """May be called by several threads; each call has one of the processes to itself."""

    def __init__(self, decoder: type[Decoder], seconds: float, processes: int = 1, most: int | None = None) -> None:
        """`most`: bytes of a video's frames, and of its file."""
        self._children = [_Child(decoder, seconds, most) for _ in range(processes)]
        self._idle: SimpleQueue[_Child] = SimpleQueue()
        for child in self._children:
            self._idle.put(child)

    def __call__(
        self,
        data: bytes,
        wanted: Callable[[int, float], Sequence[int]],
        height: int | None = None,
        width: int | None = None,
        crop: Crop | None = None,
    ) -> Decoded:
        child = self._idle.get()
        try:
            return child.decode(data, wanted, height, width, crop)
        finally:
            self._idle.put(child)

    def ahead(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Future[Result]]:
        """function(item) of each, in order, as many items ahead of the caller as there are processes."""
        return ahead(function, items, len(self._children))

    def close(self) -> None:
        """Waits for calls that are under way in other threads. Later ones are refused."""
        for _ in self._children:
            child = self._idle.get()
            child.stop()
            self._idle.put(child)

    @property
    def busy(self) -> float:
        """Seconds that the processes have decoded, all together."""
        return sum(child.busy for child in self._children)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Failed(Exception):
    """A process died while it decoded, or was killed because that took too long."""

    def __init__(self, reason: Literal["hung", "decoder_died"], how: str) -> None:
        super().__init__(how)
        self.reason = reason


class _Child:
    """One process and the end of a pipe to it. Messages are small, so no send can block; bytes go through `_memory`."""

    def __init__(self, decoder: type[Decoder], seconds: float, most: int | None) -> None:
        self._decoder, self._seconds, self._most = decoder, seconds, most
        self.busy = 0.0
        self._start()

    def decode(self, data: bytes, wanted: Callable[[int, float], Sequence[int]], *size: Any) -> Decoded:
        """`size`: what `fit` takes, or None for frames as they are."""
        if self._most is not None and len(data) > self._most:
            raise TooLarge(f"the file is larger than the {_size(self._most)} that are allowed")
        if self._pipe.closed:
            raise RuntimeError("this DecodePool is closed")
        if self._process.poll() is not None:  # killed between two videos: no fault of this one
            self._restart()
        try:
            return self._attempt(self._seconds, data, wanted, *size)
        except _Failed as first:
            try:
                return self._attempt(2 * self._seconds, data, wanted, *size)
            except _Failed as second:
                message = f"the process that decoded it: {first}; another one: {second}"
                raise BadVideo(second.reason, message) from None

    def _attempt(
        self, seconds: float, data: bytes, wanted: Callable[[int, float], Sequence[int]], *size: Any
    ) -> Decoded:
        self._await_start()
        begin = time.monotonic()
        try:
            _write(self._memory.fileno(), data)
            count, fps = self._ask(begin, seconds, "open", len(data))
            indices = list(wanted(count, fps))
            frames = torch.empty(self._ask(begin, seconds, "frames", indices, *size), dtype=torch.uint8)
            _read(self._memory.fileno(), frames.numpy())
            return Decoded(frames, indices, count, fps)
        finally:
            self.busy += time.monotonic() - begin

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        self._memory.close()

    def _start(self) -> None:
        # Not multiprocessing's way: it would import the parent's main module, which may be Ray's worker, and refuses a
        # child to a daemon.
        self._pipe, theirs = Pipe()
        self._memory = open(os.memfd_create("decoding"), "r+b", buffering=0)  # noqa: SIM115  # open till stop()
        handles = theirs.fileno(), self._memory.fileno()
        command = f"from pipelines.decoding import _serve; _serve{handles}"
        path = os.pathsep.join(sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", command],
            stdin=subprocess.DEVNULL,
            pass_fds=handles,
            env=environment_without() | {"PYTHONPATH": path},  # strangers' bytes are decoded there
        )
        theirs.close()
        self._started = False

    def _await_start(self) -> None:
        killed = 0
        while not self._started:
            try:
                self._pipe.send((self._decoder, self._most))
                self._pipe.recv()
                self._started = True
            except (EOFError, OSError):
                code = self._process.wait()
                self._restart()
                killed += code == -signal.SIGKILL  # that was not its own doing
                if code != -signal.SIGKILL or killed == STARTS:
                    how = f"{_said(code)}, see its output"
                    raise RuntimeError(f"a process to decode videos cannot start: {how}") from None

    def _ask(self, begin: float, seconds: float, *question: Any) -> Any:
        left = max(0.0, begin + seconds - time.monotonic())
        try:
            self._pipe.send((left, *question))
            answer = self._pipe.recv() if self._pipe.poll(left) else None
        except (EOFError, OSError):
            how = _said(self._process.wait())
            self._restart()
            raise _Failed("decoder_died", how) from None
        except BaseException:  # an interrupt: what would be answered belongs to nobody
            self._restart()
            raise
        if answer is None:
            self._restart()
            raise _Failed("hung", f"not done within {seconds:g} s")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _restart(self) -> None:
        self.stop()
        self._start()


def _serve(pipe: int, memory: int) -> None:
    """The child: answers questions until its parent is gone."""
    with contextlib.suppress(OSError):  # where memory runs out, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the cores are kept busy by other videos
    connection = Connection(pipe)
    try:
        decoder, most = connection.recv()
    except EOFError:  # the parent ended before it had a video
        return
    if most is not None:
        room = _taken() + SPACE * most + WORK
        resource.setrlimit(resource.RLIMIT_DATA, (room, room))
    video: Decoder
    answer: Any = None
    while True:
        try:
            connection.send(answer)
            seconds, question, *about = connection.recv()
        except (EOFError, OSError):
            return
        # The parent kills sooner; this is for when there is none. A hang that holds the GIL does not stop the kernel.
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        try:
            if question == "open":
                data = bytearray(about[0])
                _read(memory, data)
                video = decoder(bytes(data))
                answer = video.count, video.fps
            else:
                indices, height, width, crop = about
                _refuse_large(3 * len(indices) * video.size[0] * video.size[1], most, indices, video)
                pictures = video.frames(indices)
                _refuse_large(pictures.nbytes, most, indices, video)  # the file may have said something else
                frames = torch.from_numpy(pictures) if height is None else fit(pictures, height, width, crop)
                _write(memory, frames.numpy())
                answer = tuple(frames.shape)
        except MemoryError:
            raise
        except Exception as error:
            answer = error
        signal.setitimer(signal.ITIMER_REAL, 0)


def _refuse_large(found: int, most: int | None, indices: Sequence[int], video: Decoder) -> None:
    if most is not None and found > most:
        height, width = video.size
        told = f"{len(indices)} frames of {width}x{height} are {_size(found)}"
        raise TooLarge(f"{told}, and {_size(most)} are allowed")


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _taken() -> int:
    """Bytes that this process has for itself, in memory or not yet."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def _write(memory: int, data: Any) -> None:
    view, at = memoryview(data).cast("B"), 0
    while at < len(view):  # 2 GB at a time
        at += os.pwrite(memory, view[at:], at)


def _read(memory: int, into: Any) -> None:
    view, at = memoryview(into).cast("B"), 0
    while at < len(view):
        at += os.preadv(memory, [view[at:]], at)


def _said(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
