"""An S3 endpoint in a process of its own, of the files of a folder, for the benchmarks of reading and writing.

It is ours because moto's server copies a whole object for each range of it, and so holds the two cores itself.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).parents[1]


@contextmanager
def endpoint(port: int) -> Iterator[None]:
    """What S3's clients in this process and its children take for S3."""
    told = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    with mock.patch.dict(os.environ, told | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}):
        yield


@contextmanager
def served(folder: str, delay: float = 0, rate: float = 1e12) -> Iterator[int]:
    """The files of this folder as those of every bucket.

    Each answer waits `delay` seconds, and `rate` bytes a second are taken, of all who send together.
    """
    program = f"from benchmarks.endpoint import serve; serve({folder!r}, {delay}, {rate})"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            with endpoint(port):
                yield port
        finally:
            process.kill()


def serve(folder: str, delay: float, rate: float) -> None:
    taking = threading.Lock()

    class Bucket(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(delay)
            url = urlsplit(self.path)
            path = Path(folder, *unquote(url.path).split("/")[2:])
            asked = parse_qs(url.query)
            if "list-type" in asked:
                self._list(asked.get("prefix", [""])[0], "delimiter" in asked)
            elif not path.is_file():
                self._answer(404, 0)
            else:
                self._send(path)

        do_HEAD = do_GET  # as http.server calls them

        def do_PUT(self) -> None:
            """A file, or a part of one."""
            url = urlsplit(self.path)
            asked, path = parse_qs(url.query), Path(folder, *unquote(url.path).split("/")[2:])
            path.parent.mkdir(parents=True, exist_ok=True)
            if "partNumber" in asked:
                path = path.with_name(f".{path.name}.{int(asked['partNumber'][0]):05d}")
            left = int(self.headers["Content-Length"])
            with path.open("wb") as file:
                while left:
                    data = self.rfile.read(min(left, 2**18))
                    with taking:
                        time.sleep(len(data) / rate)
                    left -= file.write(data)
            self._answer(200, 0)

        def do_POST(self) -> None:
            """The beginning or the end of an upload in parts."""
            url = urlsplit(self.path)
            path = Path(folder, *unquote(url.path).split("/")[2:])
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            if "uploads" in parse_qs(url.query, keep_blank_values=True):
                text = b"<InitiateMultipartUploadResult><UploadId>one</UploadId></InitiateMultipartUploadResult>"
            else:
                with path.open("wb") as whole:
                    for part in sorted(path.parent.glob(f".{path.name}.*")):
                        whole.write(part.read_bytes())
                        part.unlink()
                text = b"<CompleteMultipartUploadResult></CompleteMultipartUploadResult>"
            self._answer(200, len(text))
            self.wfile.write(text)

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

        def _list(self, prefix: str, one_level: bool) -> None:
            paths = [
                p for p in Path(folder).rglob("*") if p.is_file() and str(p.relative_to(folder)).startswith(prefix)
            ]
            below: set[str] = set()
            if one_level:
                rest = {p: str(p.relative_to(folder)).removeprefix(prefix) for p in paths}
                below = {prefix + name.split("/")[0] + "/" for name in rest.values() if "/" in name}
                paths = [p for p in paths if "/" not in rest[p]]
            when = "<LastModified>2024-01-01T00:00:00.000Z</LastModified>"
            rows = (f"<Key>{p.relative_to(folder)}</Key><Size>{p.stat().st_size}</Size>{when}" for p in paths)
            body = "".join(f"<Contents>{row}</Contents>" for row in rows)
            body += "".join(f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in sorted(below))
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
