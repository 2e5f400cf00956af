"""An HTTP proxy in front of an S3 endpoint, that answers wrongly when it is told to."""

import contextlib
import http.client
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERROR = "<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>"
HOP = {"connection", "keep-alive", "transfer-encoding", "server", "date"}

# What becomes of a request; None: it is answered as it should be.
Fault = str | None  # "500", "503", "reset", and with a body: "broken", "stalled"


class FaultyStore(ThreadingHTTPServer):
    """`fault(method, path, times)` decides, `times` this request has been seen before."""

    daemon_threads = True

    def __init__(self, endpoint: str, fault: Callable[[str, str, int], Fault]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = endpoint.removeprefix("http://")
        self.fault, self.lock = fault, threading.Lock()
        self.seen, self.faults = Counter[str](), Counter[str]()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients leave when they lose patience."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyStore

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = f"{self.command} {self.path} {self.headers.get('Range', '')}"
        with self.server.lock:
            fault = self.server.fault(self.command, self.path, self.server.seen[name])
            self.server.seen[name] += 1
            self.server.faults[fault or "none"] += 1
        if fault in ("500", "503"):
            code = "InternalError" if fault == "500" else "SlowDown"
            return self.answer(int(fault), {}, ERROR.format(code=code).encode())
        if fault == "reset":
            return self.reset()
        upstream = http.client.HTTPConnection(self.server.behind)
        upstream.request(self.command, self.path, body or None, dict(self.headers))
        reply = upstream.getresponse()
        data, headers = reply.read(), {k: v for k, v in reply.getheaders() if k.lower() not in HOP}
        upstream.close()
        if fault is None or len(data) < 2:
            return self.answer(reply.status, headers, data)
        self.answer(reply.status, headers, data[: len(data) // 2])
        if fault == "stalled":
            self.server.closing.wait(60)
        return self.reset()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

    def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for key, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def reset(self) -> None:
        """RST, not the end of a stream."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            os.close(self.connection.detach())

    def log_message(self, *about: object) -> None:
        """Nothing."""
