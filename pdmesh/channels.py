"""gRPC channels as all of pdmesh opens them: peers that die, stop or vanish behind a cut link are noticed in seconds.

Keepalive alone does not see a stopped process (its kernel still acknowledges TCP); `http2.ping_timeout_ms` does.
"""

import grpc

MAX_MESSAGE_BYTES = 32 * 1024 * 1024

KEEPALIVE_MS = 1500

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Despite its name: how long an attempt to connect may take. A busy peer, or one far away, needs its time.
    ("grpc.min_reconnect_backoff_ms", KEEPALIVE_MS),
    # A worker that restarts at its old address is reached at once, not after a back-off of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # No proxy variable of the user's shell stands between two of our processes.
    ("grpc.enable_http_proxy", 0),
)

# What a peer may send ahead of being read. gRPC would let it grow with the link's speed, and a ping that waits behind
# megabytes on a slow link is one that is not answered in time.
WINDOW_BYTES = 512 * 1024

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    # The server's side of the pings above: without these it answers them with GOAWAY.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 3),
    # Where processors are short, pings arrive in heaps: that is no reason to end every call of the connection.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 2 * KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Two servers on one port would share its connections without a word.
    ("grpc.so_reuseport", 0),
)


class ChannelPool:
    """One open channel per address, made at first use. Owned by one event loop; `aclose` closes all."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return channel

    async def discard(self, address: str) -> None:
        """Closes the channel of a peer that is gone; calls on it end."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()

    async def aclose(self) -> None:
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.close()
