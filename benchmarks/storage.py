"""Reading from S3 by pipelines.storage: from an endpoint that answers, and from one that never does.

    python -m benchmarks.storage

The endpoint is a process of ours on this machine, which serves the files of a folder: real ones hold too much of two
cores themselves (moto's server copies a whole object for each range of it). Objects have the size of WebVid's videos,
16 are in flight; the peer is boto3's get_object in as many threads. Then the silent one: it accepts, and says nothing.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from benchmarks import Row, alternately, main, paired
from pipelines import storage

ROOT = Path(__file__).parents[1]
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


# -- an endpoint -----------------------------------------------------------------------------------------------------


@contextmanager
def endpoint(port: int) -> Iterator[None]:
    """What S3's clients in this process and its children take for S3."""
    told = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    with mock.patch.dict(os.environ, told | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}):
        yield


@contextmanager
def served(folder: str, delay: float = 0) -> Iterator[int]:
    """The files of this folder as those of every bucket. Each answer waits `delay` seconds."""
    program = f"from benchmarks.storage import serve; serve({folder!r}, {delay})"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            with endpoint(port):
                yield port
        finally:
            process.kill()


def serve(folder: str, delay: float) -> None:
    class Bucket(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(delay)
            url = urlsplit(self.path)
            path = Path(folder, *unquote(url.path).split("/")[2:])
            asked = parse_qs(url.query)
            if "list-type" in asked:
                self._list(asked["prefix"][0])
            elif not path.is_file():
                self._answer(404, 0)
            else:
                self._send(path)

        do_HEAD = do_GET  # as http.server calls them

        def _send(self, path: Path) -> None:
            size = path.stat().st_size
            begin, end, code = 0, size, 200
            if asked := self.headers["Range"]:
                first, last = asked.removeprefix("bytes=").split("-")
                begin, end, code = int(first), min(int(last) + 1 if last else size, size), 206
            self._answer(code, end - begin)
            if self.command == "GET":
                with path.open("rb") as file:
                    while begin < end:
                        begin += os.sendfile(self.connection.fileno(), file.fileno(), begin, end - begin)

        def _list(self, prefix: str) -> None:
            paths = [
                p for p in Path(folder).rglob("*") if p.is_file() and str(p.relative_to(folder)).startswith(prefix)
            ]
            when = "<LastModified>2024-01-01T00:00:00.000Z</LastModified>"
            rows = (f"<Key>{p.relative_to(folder)}</Key><Size>{p.stat().st_size}</Size>{when}" for p in paths)
            body = "".join(f"<Contents>{row}</Contents>" for row in rows)
            text = f"<ListBucketResult><KeyCount>{len(paths)}</KeyCount>{body}</ListBucketResult>".encode()
            self._answer(200, len(text))
            self.wfile.write(text)

        def _answer(self, code: int, size: int) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(size))
            self.send_header("ETag", '"one"')
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            pass  # clients may leave in the middle of an answer

    with Server(("127.0.0.1", 0), Bucket) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(__doc__, measure)
