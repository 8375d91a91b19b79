"""What a node that joined may say, over a real connection."""

import asyncio
import json
from collections.abc import Sequence

import pytest

from pdmesh.ranks.config import GroupConfig
from pdmesh.ranks.hello import Hello
from pdmesh.ranks.rendezvous import Rendezvous

_COMMAND = ("python", "-m", "decode")
_NONSENSE: Sequence[object] = (
    {"stop": "now"},
    {"ended": {}},
    {"ended": "yes"},
    {"ended": {"reason": 1, "exit_code": 0, "fatal": False}},
    {"started": 1},
    7,
)


@pytest.mark.parametrize("nonsense", _NONSENSE, ids=json.dumps)
async def test_a_node_that_talks_nonsense_is_lost_and_may_join_again(nonsense: object, unused_tcp_port: int) -> None:
    config = GroupConfig(tp=2, nnodes=2, rendezvous=f"127.0.0.1:{unused_tcp_port}")
    rendezvous = Rendezvous(config, Hello.of(config, _COMMAND), lambda count: None)
    hello = Hello(node_rank=1, nnodes=2, tp=2, pp=1, digest=Hello.of(config, _COMMAND).digest).to_message()
    await rendezvous.open()
    try:
        for _ in range(2):
            _, writer = await asyncio.open_connection("127.0.0.1", unused_tcp_port)
            writer.write(json.dumps(hello).encode() + b"\n")
            async with asyncio.timeout(5):
                (peer,) = await rendezvous.gathered()
                writer.write(json.dumps(nonsense).encode() + b"\n")
                end = await peer.ended
                await peer.left.wait()
            assert end.reason == f"{peer.name} is lost: it sent what no supervisor sends"
            assert end.exit_code == 1
            writer.close()
    finally:
        await rendezvous.aclose()
