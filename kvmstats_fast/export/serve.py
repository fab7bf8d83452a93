"""Serve: metrics over HTTP, to Prometheus and to whoever else comes, none of whom can keep the others waiting."""

from __future__ import annotations

import re
import socket
import threading
import time
from contextlib import contextmanager, suppress
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app

from kvmstats_fast._text import describe_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvmstats_fast.export.collector import Collector

#: Seconds that a connection may take, from its first byte to the last.
DEADLINE = 30.0
#: Connections at a time. One more, and the oldest is cut.
_MOST = 64
_POLL = 0.5  # s between looks for those that are overdue, or for the end
_PAGE = b"""<!doctype html><title>kvmstats</title><h1>kvmstats export</h1><p><a href="/metrics">Metrics</a></p>"""
_ADDRESS = re.compile(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^:\[\]\s]*)):([0-9]{1,5})|([0-9]{1,5})")
LOOPBACK = "127.0.0.1"


def parse_address(text: str) -> tuple[str, int]:
    """Return the host and port of ``127.0.0.1:9000``, ``[::1]:9000``, ``name:9000``, or ``9000``, which is loopback's.

    Raises
    ------
    ValueError
        If it is none of these. ``:9000`` has to say which addresses it means.
    """
    found = _ADDRESS.fullmatch(text)
    port = int(found[3] or found[4]) if found else -1
    host = (found[1] or found[2] or (LOOPBACK if found[4] else "")) if found else ""
    if not host or not 0 <= port < 1 << 16:
        hint = "; 0.0.0.0:PORT listens on all addresses" if found and not host else ""
        raise ValueError(f"{text!r} is not an address such as {LOOPBACK}:9000, [::1]:9000 or 9000{hint}")
    return host, port


def _nobody(_: str) -> None:
    """Is told nothing that matters to it."""


def make_registry(collector: Collector, *, process: bool = True) -> CollectorRegistry:
    """Return a registry of the VMs of a collector, and of this process itself.

    Without `process` for node_exporter, which has metrics of these names of its own.
    """
    registry = CollectorRegistry(support_collectors_without_names=True)  # so that ?name[]= finds them
    registry.register(collector)
    if process:
        ProcessCollector(registry=registry)
    return registry


def make_app(registry: CollectorRegistry, say: Callable[[str], object] = _nobody) -> Callable[..., Iterable[bytes]]:
    """Return a WSGI application: a registry at ``/metrics``, for GET and HEAD; a link to it at ``/``.

    Parameters
    ----------
    registry : CollectorRegistry
    say : callable
        Told why a scrape failed; so is who scrapes, with status 500.
    """
    metrics: Any = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path, method = environ.get("PATH_INFO", "/"), environ["REQUEST_METHOD"]

        def answer(status: str, headers: list[tuple[str, str]], body: bytes) -> Iterable[bytes]:
            start_response(status, [*headers, ("Content-Length", str(len(body)))])
            return [b"" if method == "HEAD" else body]

        text = [("Content-Type", "text/plain; charset=utf-8")]
        if path not in ("/", "/metrics"):
            return answer("404 Not Found", text, b"Not found: metrics are at /metrics.\n")
        if method not in ("GET", "HEAD"):
            return answer("405 Method Not Allowed", [*text, ("Allow", "GET, HEAD")], b"Use GET or HEAD.\n")
        if path == "/":
            return answer("200 OK", [("Content-Type", "text/html; charset=utf-8")], _PAGE)
        begun: list[Any] = []
        try:
            body = b"".join(metrics({**environ, "REQUEST_METHOD": "GET"}, lambda *some: begun.extend(some)))
        except Exception as error:  # noqa: BLE001 - whatever it is, the next scrape may do better
            said = describe_error(error)
            say(f"a scrape failed: {said}")
            return answer("500 Internal Server Error", text, f"{said}\n".encode())
        return answer(begun[0], begun[1], body)

    return app


class _Handler(WSGIRequestHandler):
    """Logs nothing."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection. None lasts longer than `deadline`, and no thread outlives the program."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, port: int, deadline: float) -> None:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        self._deadline = deadline
        self._open: dict[socket.socket, float] = {}  # when each began, the oldest first
        self._guard = threading.Lock()
        super().__init__(address, _Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Bind, without asking who has the address, which may take as long as DNS does."""
        if self.address_family == socket.AF_INET6:  # [::] is all addresses, whatever net.ipv6.bindv6only says
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.allow_reuse_address = True
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    @property
    def url(self) -> str:
        """Where the metrics are."""
        host = f"[{self.server_name}]" if self.address_family == socket.AF_INET6 else self.server_name
        return f"http://{host}:{self.server_port}/metrics"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a connection."""
        with self._guard:
            self._open[request] = time.monotonic()
            if len(self._open) > _MOST:
                _cut(next(iter(self._open)))
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        with self._guard:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cut what is overdue; called every half second and after each connection."""
        with self._guard:
            late = time.monotonic() - self._deadline
            for one, began in self._open.items():
                if began < late:
                    _cut(one)

    def handle_error(self, *_: object) -> None:
        """Say nothing of a client that hung up or was cut."""


def _cut(connection: socket.socket) -> None:
    """Have its thread's next read or write end it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def listen(host: str, port: int, deadline: float = DEADLINE) -> _Server:
    """Return a server that has its address and does not answer yet; OSError names the address that cannot be had."""
    try:
        return _Server(host, port, deadline)
    except OSError as error:
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise OSError(error.errno, f"cannot listen on {where}: {error.strerror or error}") from None


@contextmanager
def serving(server: _Server, registry: CollectorRegistry, say: Callable[[str], object] = _nobody) -> Iterator[None]:
    """Answer, in threads of its own, until the block ends; then the address is free again."""
    server.set_app(make_app(registry, say))
    thread = threading.Thread(target=server.serve_forever, args=(_POLL,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
