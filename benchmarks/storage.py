"""Reading from S3 by pipelines.storage: from an endpoint that answers, and from one that never does.

    python -m benchmarks.storage

Objects have the size of WebVid's videos and come from benchmarks.endpoint, 16 in flight; the peer is boto3's get_object
in as many threads. Then a silent endpoint, which accepts and never answers.
"""

import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from benchmarks import Row, alternately, main, paired
from benchmarks.endpoint import ROOT, endpoint, served
from pipelines import storage

IN_FLIGHT = 16
SIZE = 2 * 10**6
ALLOWED = 20  # seconds


def measure(quick: bool) -> list[Row]:
    objects = 32 if quick else 160
    with tempfile.TemporaryDirectory(prefix="cil-") as folder:
        for number in range(objects):
            Path(folder, f"{number}.mp4").write_bytes(np.random.default_rng(number).bytes(SIZE))
        with served(folder), ThreadPoolExecutor(IN_FLIGHT) as pool:
            import boto3
            from botocore.config import Config

            client = boto3.client("s3", config=Config(max_pool_connections=IN_FLIGHT))
            names = [f"{number}.mp4" for number in range(objects)]

            def ours() -> None:
                assert sum(map(len, pool.map(lambda name: storage.read(f"s3://all/{name}"), names))) == objects * SIZE

            def plain() -> None:
                bodies = pool.map(lambda name: client.get_object(Bucket="all", Key=name)["Body"].read(), names)
                assert sum(map(len, bodies)) == objects * SIZE

            mine, theirs = alternately(ours, plain, rounds=3 if quick else 7)
    rates = [objects * SIZE / 1e6 / float(np.median(seconds)) for seconds in (mine, theirs)]
    waited = until_refused()
    return [
        Row("storage: boto3's get_object", *rates, None, "MB/s", paired(theirs, mine)),
        Row("storage: silent endpoint", waited, ALLOWED, None, "s until the error", ALLOWED / waited, 1.0),
    ]


def until_refused() -> float:
    """Of an endpoint that accepts and never answers, in a process of its own, which has no connections yet."""
    program = "from benchmarks.storage import waited; print(waited())"
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server, endpoint(server.getsockname()[1]):
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def waited() -> float:
    begin = time.monotonic()
    with suppress(OSError):
        storage.read("s3://all/0.mp4")
        sys.exit("benchmarks.storage: a silent endpoint has answered")
    return time.monotonic() - begin


if __name__ == "__main__":
    main(__doc__, measure)
