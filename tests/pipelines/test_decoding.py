"""Decoders that hang, crash and eat memory, in real processes."""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from processes import until
from test_video import textured, video

from pipelines import cluster
from pipelines.catalog import read_catalog
from pipelines.clips import PartMaker
from pipelines.decoding import DecodePool, TooLarge
from pipelines.video import DECODERS, BadVideo, PyAVDecoder, fit

LIMIT = 3.0  # seconds; a small video takes milliseconds
WANTED = [3, 11, 19]

pytestmark = pytest.mark.slow  # every child imports torch


class Perilous(PyAVDecoder):
    """Does what the bytes say."""

    def __init__(self, data: bytes) -> None:
        self._peril = data if len(data) < 20 else b""
        self._do(b"open: ")
        super().__init__(data if data.startswith(b"\0") else video(textured(20)))

    def frames(self, wanted: list[int]) -> np.ndarray:
        self._do(b"frames: ")
        return super().frames(wanted)

    def _do(self, stage: bytes) -> None:
        match self._peril.removeprefix(stage):
            case b"hang":
                os.write(1, b"hangs\n")
                ctypes.PyDLL(None).sleep(1000)  # with the GIL held
            case b"crash":
                ctypes.string_at(0)
            case b"abort":
                os.abort()
            case b"exit":
                os._exit(3)
            case b"memory":
                resource.setrlimit(resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,) * 2)
                np.ones((1 << 16, 1 << 16))
            case b"much":
                np.ones(50 << 30, np.uint8)
            case b"defect":
                raise ZeroDivisionError("a defect of ours")
            case b"wait":
                time.sleep(0.5)


GOOD = video(textured(20))
RIGHT = fit(PyAVDecoder(GOOD).frames(WANTED), 32, 40)


def wanted(count: int, fps: float) -> list[int]:
    return WANTED


def decode(pool: DecodePool, data: bytes = GOOD) -> torch.Tensor:
    return pool(data, wanted, 32, 40).frames


def pid(pool: DecodePool) -> int:
    return pool._children[0]._process.pid


def gone(process: int) -> bool:
    return not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def perilous():
    with DecodePool(Perilous, LIMIT) as pool:
        yield pool


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_are_those_of_the_decoder_made_to_fit(decoder):
    with DecodePool(DECODERS[decoder], LIMIT) as pool:
        for height, width in [(64, 96), (32, 40), (100, 60)]:
            clip = pool(GOOD, lambda count, fps: range(count - 1, 0, -round(fps / 10)), height, width)
            assert (clip.count, clip.fps, clip.indices) == (20, 30.0, list(range(19, 0, -3)))
            frames = DECODERS[decoder](GOOD).frames(clip.indices)
            assert torch.equal(clip.frames, fit(frames, height, width))


def test_frames_belong_to_the_caller(perilous):
    clips = [decode(perilous) for _ in range(3)]
    clips[0].zero_()
    assert torch.equal(clips[1], RIGHT)
    assert torch.equal(clips[2], RIGHT)


def test_a_video_larger_than_any_pipe_arrives_whole(perilous):
    data = video(np.random.default_rng(0).integers(0, 255, (20, 480, 640, 3), np.uint8), crf="1")
    assert len(data) > 5_000_000
    assert torch.equal(decode(perilous, data), fit(PyAVDecoder(data).frames(WANTED), 32, 40))


def test_a_refusal_of_the_caller_reaches_the_caller_and_costs_no_process(perilous):
    before = pid(perilous)

    def too_short(count: int, fps: float) -> list[int]:
        raise BadVideo("too_short", f"{count} frames")

    with pytest.raises(BadVideo, match="20 frames"):
        perilous(GOOD, too_short, 32, 40)
    assert torch.equal(decode(perilous), RIGHT)
    assert pid(perilous) == before


@pytest.mark.parametrize("data", [b"", b"<html>"], ids=str)
def test_a_bad_video_has_its_reason_and_costs_no_process(data):
    with DecodePool(DECODERS["pyav"], LIMIT) as pool:
        before = pid(pool)
        with pytest.raises(BadVideo) as error:
            decode(pool, data)
        assert error.value.reason == "not_a_video"
        assert str(error.value)
        assert torch.equal(decode(pool), RIGHT)
        assert pid(pool) == before


@pytest.mark.parametrize("stage", ["open", "frames"])
def test_a_decode_that_hangs_with_the_gil_held_costs_only_its_own_row(perilous, stage):
    decode(perilous)
    before, begin = pid(perilous), time.monotonic()
    with pytest.raises(BadVideo, match=r"not done within 3 s; another one: not done within 6 s") as error:
        decode(perilous, f"{stage}: hang".encode())
    assert error.value.reason == "hung"
    assert 3 * LIMIT <= time.monotonic() - begin < 3 * LIMIT + 8  # of which are the starts of two processes
    assert gone(before)
    assert torch.equal(decode(perilous), RIGHT)


@pytest.mark.parametrize("stage", ["open", "frames"])
@pytest.mark.parametrize(
    ("peril", "said"),
    [("crash", "SIGSEGV"), ("abort", "SIGABRT"), ("exit", "exit code 3"), ("memory", "exit code 1")],
)
def test_a_decode_that_dies_costs_only_its_own_row(perilous, stage, peril, said):
    with pytest.raises(BadVideo, match=said) as error:
        decode(perilous, f"{stage}: {peril}".encode())
    assert error.value.reason == "decoder_died"
    assert torch.equal(decode(perilous), RIGHT)


@pytest.mark.parametrize("stage", ["open", "frames"])
def test_a_decode_that_takes_more_memory_than_it_may_dies_whatever_the_machine_has(stage):
    with DecodePool(Perilous, LIMIT, most=10**7) as pool:
        with pytest.raises(BadVideo, match=r"exit code 1|SIGALRM") as error:  # on a busy machine it ends slowly
            decode(pool, f"{stage}: much".encode())
        assert error.value.reason == "decoder_died"
        assert torch.equal(decode(pool), RIGHT)


def test_frames_stay_as_they_are_where_no_size_is_asked_for_and_more_than_is_allowed_is_refused_before_it_is_decoded():
    right, allowed = PyAVDecoder(GOOD).frames(WANTED), 10**5
    assert right.nbytes < allowed < 20 * right.nbytes // 3
    with DecodePool(Perilous, LIMIT, most=allowed) as pool:
        assert torch.equal(pool(GOOD, wanted).frames, torch.from_numpy(right))
        before = pid(pool)
        with pytest.raises(TooLarge, match=r"^20 frames of 96x64 are 0\.000369 GB, and 0\.0001 GB are allowed$"):
            pool(b"frames: hang", lambda count, fps: range(count))
        with pytest.raises(TooLarge, match=r"^the file is larger than the 0\.0001 GB that are allowed$"):
            pool(bytes(allowed + 1), wanted)
        assert pid(pool) == before


def test_a_video_that_the_machine_held_up_is_decoded_by_the_next_process(perilous):
    decode(perilous)
    before, asked = pid(perilous), []

    def stop_once(count: int, fps: float) -> list[int]:
        if not asked:
            os.kill(before, signal.SIGSTOP)
        asked.append(count)
        return WANTED

    assert torch.equal(perilous(GOOD, stop_once, 32, 40).frames, RIGHT)
    assert asked == [20, 20]
    assert gone(before)


def test_a_slow_video_has_twice_the_time_when_it_is_tried_again():
    with DecodePool(Perilous, 0.45) as pool:  # and its frames wait for 0.5
        assert decode(pool, b"frames: wait").shape == RIGHT.shape


def test_opening_and_decoding_have_the_limit_together():
    with DecodePool(Perilous, 0.45) as pool, pytest.raises(BadVideo) as error:
        decode(pool, b"wait")  # 0.5 s each: more than twice 0.45
    assert error.value.reason == "hung"


def test_how_long_the_processes_decode_is_told():
    with DecodePool(Perilous, LIMIT, processes=2) as pool:
        decode(pool)
        time.sleep(0.3)  # of the caller's own work
        idle = pool.busy
        [future.result() for future in pool.ahead(lambda data: decode(pool, data), [b"frames: wait"] * 2)]
        assert idle < 0.3
        assert 1.0 <= pool.busy - idle < 4


def kill_while_it_decodes(pool: DecodePool, times: int) -> threading.Thread:
    """One process after the other, each in the middle of its video."""

    def work() -> None:
        for _ in range(times):
            victim = pid(pool)
            until(lambda: pool._children[0]._started)
            time.sleep(0.2)  # of the 0.5 that the video waits
            os.kill(victim, signal.SIGKILL)
            until(lambda victim=victim: pid(pool) != victim)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_video_whose_process_is_killed_is_decoded_by_the_next_one(perilous):
    right = decode(perilous, b"frames: wait")
    before, asked = pid(perilous), []
    killer = kill_while_it_decodes(perilous, 1)
    clip = perilous(b"frames: wait", lambda count, fps: asked.append(count) or WANTED, 32, 40)
    killer.join()
    assert pid(perilous) != before
    assert torch.equal(clip.frames, right)
    assert asked == [20, 20]


def test_a_video_whose_process_is_killed_twice_costs_only_its_own_row(perilous):
    decode(perilous)
    killer = kill_while_it_decodes(perilous, 2)
    with pytest.raises(BadVideo, match=r"killed by SIGKILL.*another one: killed by SIGKILL") as error:
        decode(perilous, b"frames: wait")
    killer.join()
    assert error.value.reason == "decoder_died"
    assert torch.equal(decode(perilous), RIGHT)


def test_a_process_killed_while_it_starts_costs_no_row():
    with DecodePool(Perilous, LIMIT) as pool:
        os.kill(pid(pool), signal.SIGSTOP)
        killer = threading.Timer(0.3, os.kill, (pid(pool), signal.SIGKILL))  # while decode() waits for it
        killer.start()
        assert torch.equal(decode(pool), RIGHT)
        killer.join()


def test_a_process_killed_between_two_videos_costs_no_row(perilous):
    decode(perilous)
    process = perilous._children[0]._process
    process.kill()
    process.wait()  # a process is dead when the last of its threads is
    assert torch.equal(decode(perilous), RIGHT)


def test_a_defect_of_a_decoder_is_raised_where_it_was_called(perilous):
    with pytest.raises(ZeroDivisionError, match="a defect of ours"):
        decode(perilous, b"frames: defect")
    assert torch.equal(decode(perilous), RIGHT)


def test_a_decoder_that_cannot_be_imported_is_an_error_and_no_bad_video():
    class Local(PyAVDecoder):
        pass

    Local.__qualname__ = "Elsewhere"
    globals()["Elsewhere"] = Local  # here, but not in the child
    with DecodePool(Local, LIMIT) as pool, pytest.raises(RuntimeError, match="cannot start"):
        decode(pool)


def test_videos_are_decoded_ahead_in_order_and_no_further_than_the_processes_reach():
    taken = []

    def items():
        for i in range(8):
            taken.append(i)
            yield i

    with DecodePool(Perilous, LIMIT, processes=2) as pool:
        for i, future in enumerate(pool.ahead(lambda i: (i, decode(pool)), items())):
            number, frames = future.result()
            assert number == i
            assert torch.equal(frames, RIGHT)
            assert len(taken) <= i + 1 + 2
    assert taken == list(range(8))


def test_the_next_video_is_decoded_while_the_caller_works(perilous):
    futures = perilous.ahead(lambda data: decode(perilous, data), [b"frames: wait"] * 3)
    next(futures).result()
    second = next(futures)
    until(second.done)  # nobody asked for its result
    assert len(list(futures)) == 1


def test_processes_decode_at_the_same_time():
    with DecodePool(Perilous, LIMIT, processes=4) as pool:
        for child in pool._children:
            child._await_start()
        begin = time.monotonic()
        for future in pool.ahead(lambda data: decode(pool, data), [b"frames: wait"] * 4):
            future.result()
        assert time.monotonic() - begin < 4 * 0.5


def test_what_fails_ahead_fails_only_where_it_is_asked_for(perilous):
    videos, found = [GOOD, b"open: crash", GOOD, b"\0", GOOD], []
    for future in perilous.ahead(lambda data: decode(perilous, data), videos):
        error = future.exception()
        found.append(error.reason if error else torch.equal(future.result(), RIGHT))
    assert found == [True, "decoder_died", True, "not_a_video", True]


def test_an_iteration_that_ends_early_leaves_a_pool_that_works(perilous):
    for future in perilous.ahead(lambda data: decode(perilous, data), [GOOD] * 100):
        future.result()
        break
    assert torch.equal(decode(perilous), RIGHT)


def test_a_closed_pool_leaves_nothing_and_refuses():
    decode_once = DecodePool(Perilous, LIMIT)
    decode(decode_once)
    decode_once.close()
    handles = len(os.listdir("/proc/self/fd"))
    pool = DecodePool(Perilous, LIMIT, processes=2)
    decode(pool)
    with pytest.raises(BadVideo):
        decode(pool, b"open: crash")
    children = [child._process.pid for child in pool._children]
    assert not any("/dev/shm/" in Path(f"/proc/{child}/maps").read_text() for child in children)  # it would stay
    pool.close()
    pool.close()
    assert all(gone(child) for child in children)
    assert len(os.listdir("/proc/self/fd")) == handles
    with pytest.raises(RuntimeError, match="closed"):
        decode(pool)


PARENT = """
import sys
from test_decoding import *
pool = DecodePool(Perilous, seconds=2)
decode(pool)
print(pid(pool), flush=True)
if sys.argv[1] == "hang":
    decode(pool, b"frames: hang")
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "hang"])
def test_a_process_does_not_outlive_a_parent_that_was_killed(state):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    child = int(parent.stdout.readline())
    assert not gone(child)
    if state == "hang":
        assert parent.stdout.readline() == b"hangs\n"
    parent.kill()
    parent.wait()
    until(lambda: gone(child), seconds=10)


def test_the_kernel_takes_the_decoder_before_its_parent(perilous):
    decode(perilous)
    assert Path(f"/proc/{pid(perilous)}/oom_score_adj").read_text() == "1000\n"


def test_a_ray_actor_has_its_own_process_that_ends_with_it():
    import ray

    class Actor:
        def __init__(self) -> None:
            self.pool = DecodePool(DECODERS["pyav"], 60)

        def decode(self, data: bytes) -> tuple[int, np.ndarray]:
            return pid(self.pool), decode(self.pool, data).numpy()

    cluster.connect()  # or the one that other tests have started
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    actor = ray.remote(Actor).options(runtime_env=environment).remote()
    child, frames = ray.get(actor.decode.remote(GOOD))
    np.testing.assert_array_equal(frames, RIGHT)
    assert not gone(child)
    ray.kill(actor)
    until(lambda: gone(child))


# -- the keys of `cache` that a part's decoding has, through what makes parts ------------------------------------------


@pytest.fixture
def part_maker(settings, tmp_path):
    """part_maker("key=value", ...) -> a PartMaker of one large video, with processes of its own."""
    (tmp_path / "videos").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (20, 480, 640, 3), np.uint8)
    (tmp_path / "videos/large.mp4").write_bytes(video(noise, crf="10"))
    (tmp_path / "videos.csv").write_text("videoid,name\nlarge,noise\n")
    csv = (f"catalog.csv={tmp_path}/videos.csv", f"catalog.videos={tmp_path}/videos")
    made = []

    def make(*overrides: str) -> PartMaker:
        config = settings(tmp_path, *csv, "cache.stride=19", *overrides)
        made.append(PartMaker(config.model_dump(), str(tmp_path / "parts"), read_catalog(config.catalog, "")))
        return made[-1]

    yield make
    for maker in made:
        maker.decoders.close()


def rejects(maker: PartMaker) -> list[str]:
    """The messages of the one part."""
    index = pa.ipc.open_file(maker({"name": "part", "start": 0, "stop": 1}).data).read_all()
    return [reject["message"] for reject in json.loads(index.schema.metadata[b"rejects"])]


def test_a_video_that_needs_longer_than_decode_seconds_is_rejected(part_maker):
    assert rejects(part_maker()) == []
    (message,) = rejects(part_maker("cache.decode_seconds=0.02"))
    assert "not done within 0.02 s" in message


@pytest.mark.parametrize(("decoder", "loaded"), [("pyav", False), ("decord", True)])
def test_a_part_is_decoded_by_the_decoder_that_is_asked_for(part_maker, decoder, loaded):
    maker = part_maker(f"cache.decoder={decoder}")
    assert rejects(maker) == []
    assert ("libdecord" in Path(f"/proc/{pid(maker.decoders)}/maps").read_text()) == loaded


def test_a_worker_has_as_many_processes_as_decoders_are_asked_for(part_maker):
    children = psutil.Process().children
    before = set(children())
    part_maker("cache.decoders=3")
    assert len(set(children()) - before) == 3
