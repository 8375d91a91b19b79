"""A transport that fails gives way to the next within the same request, and somebody can see that it did."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstore.transfer.base import BlockMemory
from kvstore.transfer.connection import Connection
from kvstore.transfer.shm import ShmLink
from kvstore.transfer.tcp import TcpLink
from pdmesh.hashing import BlockHash
from pdmesh.sampling import SamplingParams
from tests.mesh import Mesh
from tests.tiny_models import VOCAB_SIZE

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPT = [(7 * i) % (VOCAB_SIZE - 64) for i in range(400)]
# Several chunks, so that there is something to fail in the middle of.
ENGINE = {"max_prefill_chunk": 64, "max_num_batched_tokens": 64}


class Breaking:
    """Breaks the connection at the `at`th part, every time; counts how often it did."""

    def __init__(self, link: type[ShmLink] | type[TcpLink], monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.num_broken = 0
        self._num_parts = 0
        send_part = link.send_part

        def sabotaged(
            this: ShmLink | TcpLink,
            connection: Connection,
            memory: BlockMemory,
            first: int,
            block_ids: Sequence[int],
            block_hash: BlockHash,
        ) -> int:
            self._num_parts += 1
            if self._num_parts == at:
                self._num_parts = 0
                self.num_broken += 1
                connection.shut()
            return send_part(this, connection, memory, first, block_ids, block_hash)  # type: ignore[arg-type]

        monkeypatch.setattr(link, "send_part", sabotaged)
        monkeypatch.setattr(link, "blocks_per_part", lambda this, block_bytes: 4)


async def expected(model: Path) -> tuple[int, ...]:
    async with Mesh(model, num_prefill=0, engine=ENGINE) as mesh:
        return tuple((await mesh.client.generate(tokens=PROMPT, sampling=GREEDY)).token_ids)


@pytest.mark.parametrize("at", [1, 3])
async def test_kv_takes_the_next_transport(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    tokens = await expected(tiny_model)
    broken = Breaking(ShmLink, monkeypatch, at)
    async with Mesh(tiny_model, transports="shm,tcp,grpc", engine=ENGINE) as mesh:
        result = await mesh.client.generate(tokens=PROMPT, sampling=GREEDY)
        assert broken.num_broken == 1
        assert tuple(result.token_ids) == tokens
        assert (result.report.kv_transport, result.report.prefill_worker_id) == ("tcp", "prefill-0")
        report = mesh.decodes[0].host.journal.report()
        [fallback] = report.fallbacks
        assert (fallback.from_transport, fallback.to_transport, fallback.count) == ("shm", "tcp", 1)
        await mesh.assert_idle()


async def test_where_every_transport_fails_the_decode_worker_computes(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = await expected(tiny_model)
    shm, tcp = Breaking(ShmLink, monkeypatch, 1), Breaking(TcpLink, monkeypatch, 1)
    async with Mesh(tiny_model, transports="shm,tcp", engine=ENGINE) as mesh:
        result = await mesh.client.generate(tokens=PROMPT, sampling=GREEDY)
        assert (shm.num_broken, tcp.num_broken) == (1, 1)
        assert tuple(result.token_ids) == tokens
        assert result.report.kv_transport == ""
        await mesh.assert_idle()


async def test_a_receiver_on_another_host_is_reached_over_the_network(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.transfer.senders.why_unreachable", lambda address: "it is on another host")
    async with Mesh(tiny_model, transports="shm,tcp,grpc", engine=ENGINE) as mesh:
        result = await mesh.client.generate(tokens=PROMPT, sampling=GREEDY)
        assert result.report.kv_transport == "tcp"
        [choice] = mesh.decodes[0].host.journal.report().choices
        assert (choice.peer, choice.transport, choice.reason) == ("prefill-0", "tcp", "shm: it is on another host")
        await mesh.assert_idle()
