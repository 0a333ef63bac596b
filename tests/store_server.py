"""An S3 server on the loopback that fails on purpose: moto's, behind a proxy that breaks a share of the requests.

>>> with start_store(fault_rate=0.05) as store:
...     subprocess.run(["synthgen", ..., "--run", store.url("run")], env=os.environ | store.env)
...     assert store.faults["cut"]

Both run in threads of this process. Other processes reach them by ``store.env`` alone; this process too, once
:meth:`Store.enter` has been called (fsspec reads its environment only when it is first imported).
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

__all__ = ["FAULTS", "Store", "forget_connections", "start_store"]

#: What a broken request ends with. Each may come before the server has heard of the request, or after it has done it.
FAULTS = ("500", "503", "timeout", "cut")
BUCKET = "bucket"
PATIENCE = 1.0  # seconds that a client waits for an answer (``store.env`` tells it)
_BETWEEN_HOSTS = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "proxy-connection", "expect"}


@dataclass
class Store:
    """A running server. ``fault_rate`` and ``kinds`` may be changed while it runs."""

    endpoint: str = ""
    bucket: str = BUCKET
    fault_rate: float = 0.0  # share of the requests that are broken
    kinds: tuple[str, ...] = FAULTS
    seed: int = 0
    env: dict[str, str] = field(default_factory=dict)  # what a process needs to reach it
    faults: Counter[str] = field(default_factory=Counter)  # kind → how many requests were broken so
    requests: Counter[str] = field(default_factory=Counter)  # method → how many came in, broken ones too
    lines: list[str] = field(default_factory=list)  # "PUT /bucket/run/run.yaml", in the order of their coming
    on_request: Callable[[str, str], None] = lambda method, path: None  # called with each, before it is forwarded

    def __post_init__(self) -> None:
        self.draws, self._lock = random.Random(self.seed), threading.Lock()

    def url(self, path: str) -> str:
        """The URL of a place in the bucket."""
        return f"s3://{self.bucket}/{path}"

    def draw(self, method: str, path: str) -> tuple[str, bool]:
        """The fault of a request ("" for none), and whether the server does what it was asked for all the same."""
        with self._lock:
            self.requests[method] += 1
            self.lines.append(f"{method} {path}")
            kind = self.draws.choice(self.kinds) if self.draws.random() < self.fault_rate else ""
            done = self.draws.random() < 0.5
            self.faults.update([kind] if kind else [])
        return kind, done

    @contextmanager
    def enter(self) -> Iterator[Store]:
        """Let this process reach the server while the block lasts."""
        import fsspec.config

        before, options = dict(os.environ), fsspec.config.conf.get("s3")
        os.environ.update(self.env)
        fsspec.config.conf["s3"] = json.loads(self.env["FSSPEC_S3"])
        try:
            yield self
        finally:
            os.environ.clear()
            os.environ.update(before)
            fsspec.config.conf.pop("s3")
            if options is not None:
                fsspec.config.conf["s3"] = options
            forget_connections()

    # -- to look into it and to spoil it, past the proxy

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Every object under ``prefix``."""
        return {item.name: item.value for item in self._objects() if item.name.startswith(prefix)}

    def put(self, key: str, data: bytes) -> None:
        """Put an object there, or another in its place."""
        self._backend().put_object(self.bucket, key, data)

    def delete(self, key: str) -> None:
        """Take an object away."""
        self._backend().delete_object(self.bucket, key)

    def unfinished_uploads(self) -> int:
        """Multipart uploads that were begun, and neither completed nor given up."""
        return len(self._backend().get_bucket(self.bucket).multiparts)

    def _objects(self) -> list[Any]:
        return list(self._backend().get_bucket(self.bucket).keys.values())

    def _backend(self) -> Any:
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


@contextmanager
def start_store(fault_rate: float = 0, seed: int = 0) -> Iterator[Store]:
    """A server with one empty bucket, and a proxy before it that breaks ``fault_rate`` of the requests."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with suppress(Exception):  # another server of this process may have left it: moto keeps one account
        _ask(host, port, "POST", "/moto-api/reset")
    _ask(host, port, "PUT", f"/{BUCKET}")
    store = Store(fault_rate=fault_rate, seed=seed)
    proxy = _Proxy(("127.0.0.1", 0), store, (host, port))
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    store.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    store.env = {
        "AWS_ENDPOINT_URL": store.endpoint,
        "AWS_ACCESS_KEY_ID": "AKIALOOPBACKONLY0000",
        "AWS_SECRET_ACCESS_KEY": "no-secret-but-the-loopback",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "FSSPEC_S3": json.dumps({"config_kwargs": {"read_timeout": PATIENCE, "connect_timeout": 5}}),
    }
    try:
        yield store
    finally:
        proxy.ended.set()
        proxy.shutdown()
        proxy.server_close()
        server.stop()


def _ask(host: str, port: int, method: str, path: str) -> None:
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.request(method, path, headers={"Content-Length": "0"})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    if answer.status >= 300:
        raise RuntimeError(f"{method} {path}: {answer.status} {body[:200]!r}")


def forget_connections() -> None:
    """Make the next file system from the environment as it is then."""
    import fsspec

    from synthgen.stores import remote

    fsspec.get_filesystem_class("s3").clear_instance_cache()
    remote._answered.clear()


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], store: Store, behind: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self.store, self.behind, self.ended = store, behind, threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Proxy

    def serve(self) -> None:
        """Forward a request and bring the answer back, or break it."""
        store = self.server.store
        body = self._body()
        store.on_request(self.command, urlsplit(self.path).path)
        fault, done = store.draw(self.command, self.path)
        if fault == "cut":
            done = True  # in the middle of the answer
        status, headers, answer = self._forwarded(body) if done or not fault else (0, [], b"")
        if not fault:
            self._reply(status, headers, answer)
        elif fault == "timeout":
            self.server.ended.wait(3 * PATIENCE)
            self.close_connection = True
        elif fault == "cut":
            self.close_connection = True
            if len(answer) > 1 and self.command == "GET":  # the head promises more than comes
                self._reply(status, headers, answer, end=len(answer) // 2)
        else:
            word = {"500": "InternalError", "503": "SlowDown"}[fault]
            error = f"<?xml version='1.0'?><Error><Code>{word}</Code><Message>on purpose</Message></Error>".encode()
            self._reply(int(fault), [("Content-Type", "application/xml"), ("Content-Length", str(len(error)))], error)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = bytearray()
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return bytes(data)

    def _forwarded(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.server.behind, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _BETWEEN_HOSTS}
        connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _BETWEEN_HOSTS]
        if self.command != "HEAD":  # which says how long the answer would be
            kept = [(name, value) for name, value in kept if name.lower() != "content-length"]
            kept.append(("Content-Length", str(len(data))))
        return answer.status, kept, data

    def _reply(self, status: int, headers: list[tuple[str, str]], data: bytes, end: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:end])
            self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def main() -> None:
    """Serve until stopped, and print what to put into the environment: to try things by hand."""
    with start_store() as store:
        for name, value in store.env.items():
            print(f"export {name}='{value}'")
        print(f"# {store.url('run')}", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
