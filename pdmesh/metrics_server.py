"""A process's metrics over HTTP, for Prometheus: GET /metrics.

Apart from `pdmesh.server`, so that what needs no metrics needs no prometheus-client.
"""

import asyncio
import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from pdmesh.errors import ConfigError


class MetricsServer:
    """Serves one registry on threads of its own; port 0 serves nothing.

    Args:
        host: Address to listen on, as gRPC takes it: an IPv6 address may stand in brackets.
        port: Of its own, beside gRPC's.
        registry: Read anew for every request.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self._host, self._port = host, port
        self._registry = registry
        self._running: tuple[WSGIServer, threading.Thread] | None = None

    def start(self) -> None:
        """Listens. Raises ConfigError where the address cannot be had."""
        if not self._port:
            return
        try:
            self._running = start_http_server(self._port, self._host.strip("[]"), self._registry)
        except OSError as error:
            raise ConfigError(
                f"cannot serve metrics on {self._host}:{self._port} ({error.strerror}): "
                "choose another --metrics-port, or 0 for none"
            ) from error

    async def aclose(self) -> None:
        """Stops listening; returns when the thread has ended. Idempotent."""
        running, self._running = self._running, None
        if running is not None:
            await asyncio.to_thread(_stop, *running)


def _stop(server: WSGIServer, thread: threading.Thread) -> None:
    server.shutdown()
    server.server_close()
    thread.join()
