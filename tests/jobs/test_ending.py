"""How a job ends, as the one who started it sees it: its exit code and its last line."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOB = """
import ctypes, time
from pipelines.command import ending

def begun(): print("begun", flush=True)

with ending("a_job"):
    {body}
"""
STOPPED = "a_job: stopped by SIGTERM; what is made stays, and the same command goes on from there"


def stopped(body: str) -> tuple[int, list[str], float]:
    """A job that is sent SIGTERM: its exit code, its lines, and how long it took to end."""
    with subprocess.Popen(
        [sys.executable, "-c", JOB.format(body=body)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        assert job.stdout.readline() == "begun\n"
        begin = time.monotonic()
        job.send_signal(signal.SIGTERM)
        lines = job.stdout.read().splitlines()
        job.wait(timeout=20)
        return job.returncode, lines, time.monotonic() - begin


def test_a_job_that_is_stopped_unwinds_and_says_so_last():
    code, lines, _ = stopped("try: begun(); time.sleep(60)\n    finally: print('unwound')")
    assert code == 143
    assert lines == ["unwound", STOPPED]


@pytest.mark.parametrize(
    "body",
    [
        "try: begun(); time.sleep(60)\n    finally: time.sleep(60)",
        # A call of C's that no signal interrupts: a lock that its own thread has.
        "m = ctypes.create_string_buffer(64); begun(); [ctypes.CDLL(None).pthread_mutex_lock(m) for _ in range(2)]",
    ],
)
def test_a_job_that_does_not_unwind_ends_before_ray_kills_it(body):
    code, lines, seconds = stopped(body)
    assert code == 143
    assert lines == [STOPPED]
    assert seconds < 3


@pytest.mark.parametrize(
    ("raised", "code", "last"),
    [
        ("__import__('pipelines.errors').errors.UserError('mend this')", 2, "a_job: mend this"),
        ("__import__('pipelines.errors').errors.Unfinished('try again')", 1, "a_job: try again"),
        ("OSError('a cable')", 1, "a_job: a cable. If that passes, the same command goes on from here"),
        ("KeyboardInterrupt", 130, "a_job: interrupted; the same command goes on from here"),
        ("ValueError('3')", 1, "a_job: stopped by what nobody expected (ValueError: 3); what is made stays"),
        ("SystemExit(15)", 143, STOPPED),  # as Ray ends a process that is stopped while it connects
        ("SystemExit(7)", 7, "begun"),
    ],
)
def test_however_a_job_ends_its_last_line_and_exit_code_say_how(raised, code, last):
    done = subprocess.run(
        [sys.executable, "-c", JOB.format(body=f"begun(); raise {raised}")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == code
    assert done.stdout.splitlines()[-1] == last
    assert ("Traceback" in done.stdout) == ("ValueError" in raised)
