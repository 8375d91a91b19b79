"""Commands as a person meets them, against a server that echoes."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from pdmesh.cli.loading import loading_display
from pdmesh.cli.main import main
from pdmesh.local.cluster import WorkerProcess
from pdmesh.types import Load, Role, WorkerInfo, WorkerState
from pdmesh.v1 import cluster_pb2, common_pb2
from tests.unit.pdmesh.conftest import EchoServer

Run = Callable[..., "asyncio.Future[int]"]


@pytest.fixture
def pdmesh(echo: EchoServer) -> Run:
    """Runs a command against the echo server, on a thread since that lives on the event loop."""

    def run(*argv: str) -> "asyncio.Future[int]":
        return asyncio.ensure_future(asyncio.to_thread(main, [*argv, "--address", echo.address]))

    return run


async def test_generate_prints_the_text(pdmesh: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert await pdmesh("generate", "hello") == 0
    assert capsys.readouterr() == ("hello\n", "")


async def test_generate_passes_its_options_on(pdmesh: Run, echo: EchoServer) -> None:
    await pdmesh("generate", "x", "--max-tokens", "5", "--temperature", "0", "--seed", "9", "--model", "m")
    (request,) = echo.inference.requests
    params = request.sampling_params
    assert (params.max_tokens, params.temperature, params.seed, request.model) == (5, 0.0, 9, "m")


async def test_generate_as_a_chat(pdmesh: Run, echo: EchoServer) -> None:
    await pdmesh("generate", "hi", "--chat")
    assert [(turn.role, turn.content) for turn in echo.inference.requests[0].chat.messages] == [("user", "hi")]


async def test_generate_json_is_the_whole_result(pdmesh: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert await pdmesh("generate", "ab", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    (completion,) = result["completions"]
    assert (completion["text"], completion["finish_reason"]) == ("ab", "stop")
    assert (result["seed"], completion["report"]["decode_worker_id"]) == (7, "w")


async def test_a_refusal_is_one_line(pdmesh: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert await pdmesh("generate", "full") == 1
    assert capsys.readouterr().err == "pdmesh: no room for you\n"


async def test_status_names_each_worker_and_why_it_gets_nothing(
    pdmesh: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await pdmesh("status") == 0
    head, _, columns, row = capsys.readouterr().out.splitlines()
    assert "0 of 8" in head
    assert columns.split()[:3] == ["worker", "role", "state"]
    assert row.split()[:3] == ["w", "decode", "loading"]
    assert "no requests: loading" in row
    assert "shm, tcp" in row


async def test_status_says_of_a_store_what_it_holds_and_nothing_of_requests(
    pdmesh: Run, echo: EchoServer, capsys: pytest.CaptureFixture[str]
) -> None:
    load = Load(num_blocks=500, num_free_blocks=100)
    infos = [WorkerInfo(name, "i", Role.STORE, WorkerState.READY, "a:1", load=load) for name in ("s0", "s1")]
    echo.cluster.workers = [
        cluster_pb2.WorkerView(info=infos[0].to_pb(), age_s=0.5),
        cluster_pb2.WorkerView(info=infos[1].to_pb(), age_s=0.5, excluded_because="out of reach"),
    ]
    assert await pdmesh("status") == 0
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["s0", "store", "ready", "a:1", *["100", "of", "500"], *["0.5", "s", "ago"]]
    assert second.split() == [*first.replace("s0", "s1").split(), *["no", "KV", "from", "it:", "out", "of", "reach"]]


async def test_status_json(pdmesh: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert await pdmesh("status", "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert status["router"]["version"] == "1.2.3"
    assert [(worker["info"]["worker_id"], worker["info"]["state"]) for worker in status["workers"]] == [
        ("w", "loading")
    ]


def status_of_two_ranks() -> cluster_pb2.GetStatusResponse:
    load = Load(num_blocks=512, num_free_blocks=500)
    info = WorkerInfo("d0", "i", Role.DECODE, WorkerState.READY, "h:1", load=load, tp_size=2)
    return cluster_pb2.GetStatusResponse(
        info=info.to_pb(), num_requests=3, num_leases=2, num_tickets=1, num_cached_blocks=40, uptime_s=90, num_steps=7,
        ranks=[
            cluster_pb2.RankStatus(rank=0, host="10.0.0.1", pid=11, weight_bytes=70_000_000, kv_bytes=500_000),
            cluster_pb2.RankStatus(rank=1, host="10.0.0.2", pid=12, weight_bytes=65_000_000, kv_bytes=500_000),
        ],
    )  # fmt: skip


async def test_status_of_one_worker_has_its_ranks(
    pdmesh: Run, echo: EchoServer, capsys: pytest.CaptureFixture[str]
) -> None:
    echo.cluster.status = status_of_two_ranks()
    assert await pdmesh("status", "d0") == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        "worker d0 decode TP 2 ready at h:1 up 1 min 30 s",
        "requests 3 steps 7 leases 2 tickets 1 blocks 500 of 512 free, 40 of these hold KV",
        "",
        "rank host pid weights KV cache",
        "0 10.0.0.1 11 70.0 MB 500.0 kB",
        "1 10.0.0.2 12 65.0 MB 500.0 kB",
    ]


async def test_status_of_one_worker_as_json(pdmesh: Run, echo: EchoServer, capsys: pytest.CaptureFixture[str]) -> None:
    echo.cluster.status = status_of_two_ranks()
    assert await pdmesh("status", "d0", "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert [rank["weight_bytes"] for rank in status["ranks"]] == [70_000_000, 65_000_000]
    assert (status["info"]["tp_size"], status["num_steps"]) == (2, 7)


async def test_status_of_a_worker_without_ranks_shows_none(pdmesh: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert await pdmesh("status", "w") == 0
    head, held = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["worker", "w", "decode"]
    assert held.startswith("requests 0")


async def test_status_of_nobody_names_those_who_are(pdmesh: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert await pdmesh("status", "nobody") == 1
    assert capsys.readouterr().err == "pdmesh: no worker 'nobody'; known: w\n"


def report_of_everything() -> cluster_pb2.ClusterListTransfersResponse:
    report = cluster_pb2.TransferReport(
        num_live=1,
        num_tickets=2,
        num_leases=3,
        live=[
            cluster_pb2.LiveTransfer(
                direction=cluster_pb2.TRANSFER_DIRECTION_RECEIVING, request_id="r1", peer="prefill-0", transport="shm",
                state="waiting for [the] sender", num_blocks=4, num_bytes=2_500_000, age_s=1.25,
            )
        ],
        totals=[
            cluster_pb2.TransferTotal(
                direction=cluster_pb2.TRANSFER_DIRECTION_RECEIVING, transport="tcp", num_done=4, num_aborted=2,
                num_failed=1, num_bytes=8_000_000, num_parts=16, duration_s=0.5,
            )
        ],
        choices=[cluster_pb2.TransportChoice(peer="prefill-9", transport="tcp", reason="shm: other host", age_s=300)],
        fallbacks=[
            cluster_pb2.TransportFallback(
                from_transport="tcp", to_transport="grpc", reason="RECEIVER_LOST", count=7, age_s=2
            )
        ],
        failures=[
            cluster_pb2.TransferFailure(
                direction=cluster_pb2.TRANSFER_DIRECTION_RECEIVING, request_id="r0", peer="prefill-0", transport="tcp",
                outcome=cluster_pb2.TRANSFER_OUTCOME_LEASE_EXPIRED, reason="LEASE_EXPIRED: too late", age_s=5,
            )
        ],
    )  # fmt: skip
    well = cluster_pb2.WorkerTransfers(worker_id="d0", role=common_pb2.ROLE_DECODE, address="h:1", report=report)
    ill = cluster_pb2.WorkerTransfers(worker_id="p0", role=common_pb2.ROLE_PREFILL, address="h:2", error="too late")
    return cluster_pb2.ClusterListTransfersResponse(workers=[well, ill])


async def test_transfers_shows_what_each_worker_says_or_why_it_does_not(
    pdmesh: Run, echo: EchoServer, capsys: pytest.CaptureFixture[str]
) -> None:
    echo.cluster.transfers = report_of_everything()
    assert await pdmesh("transfers") == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row.startswith(("d0", "p0"))] == [
        "d0 decode h:1 1 2 3",
        "p0 prefill h:2 no answer: too late",
        "d0 receiving prefill-0 shm 4 2.5 MB 1.2 s r1 waiting for [the] sender",
        "d0 receiving tcp 4 2 1 8.0 MB 125.0 ms 16.0 MB/s",
        "d0 prefill-9 tcp 5 min ago shm: other host",
        "d0 tcp grpc 7 2 s ago RECEIVER_LOST",
        "d0 5 s ago receiving prefill-0 tcp lease expired 0 B r0 LEASE_EXPIRED: too late",
    ]


async def test_transfers_leaves_out_what_there_is_none_of(
    pdmesh: Run, echo: EchoServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await pdmesh("transfers") == 0
    assert capsys.readouterr().out == "no workers yet\n"
    idle = cluster_pb2.WorkerTransfers(worker_id="d0", role=common_pb2.ROLE_DECODE, report=cluster_pb2.TransferReport())
    echo.cluster.transfers.workers.append(idle)
    assert await pdmesh("transfers") == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()][1:] == [["d0", "decode", "0", "0", "0"]]


async def test_transfers_json(pdmesh: Run, echo: EchoServer, capsys: pytest.CaptureFixture[str]) -> None:
    echo.cluster.transfers = report_of_everything()
    assert await pdmesh("transfers", "--json") == 0
    well, ill = json.loads(capsys.readouterr().out)["workers"]
    assert well["report"]["live"][0]["direction"] == "receiving"
    assert well["report"]["failures"][0]["outcome"] == "lease_expired"
    assert (ill["role"], ill["report"], ill["error"]) == ("prefill", None, "too late")


async def test_drain(pdmesh: Run, echo: EchoServer) -> None:
    assert await pdmesh("drain", "w") == 0
    assert echo.cluster.drained == ["w"]


async def test_health_is_an_exit_code(pdmesh: Run, echo: EchoServer) -> None:
    assert await pdmesh("health") == 1
    await echo.grpc.set_serving(True)
    assert await pdmesh("health") == 0


@pytest.mark.parametrize("command", ["generate", "status", "transfers", "drain", "chat"])
def test_nobody_there_is_one_line_with_the_remedy(
    command: str, unused_tcp_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["x"] if command in ("generate", "drain") else []
    assert main([command, *prompt, "--address", f"127.0.0.1:{unused_tcp_port}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "nobody answers" in line
    assert "pdmesh up" in line


def test_help_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "up" in capsys.readouterr().out
    with pytest.raises(SystemExit) as raised:
        main(["upp"])
    assert raised.value.code == 2


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "/no/such/model"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pdmesh: /no/such/model: no such file or directory")


@pytest.mark.parametrize(
    ("module", "unwanted"), [("pdmesh.cli.main", "grpc"), ("pdmesh.types", "grpc"), ("pdmesh", "grpc")]
)
def test_what_need_not_be_imported_is_not(module: str, unwanted: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name.split('.')[0] == {unwanted!r} for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loading_without_a_terminal_is_a_line_for_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    def worker(state: WorkerState, loaded: int = 0, total: int = 0) -> WorkerProcess:
        info = WorkerInfo("w", "i", Role.DECODE, state, "a:1", loaded_bytes=loaded, total_bytes=total)
        return WorkerProcess("w", 1, info)

    loading, mb = WorkerState.LOADING, 10**6
    with loading_display(Console()) as show:
        show([WorkerProcess("w", 1, None)])
        show([worker(loading)])
        show([worker(loading, 30 * mb, 100 * mb)])
        show([worker(loading, 40 * mb, 100 * mb)])
        show([worker(loading, 80 * mb, 100 * mb)])
        show([worker(WorkerState.READY)])
        show([worker(WorkerState.READY)])
    *before, with_rate, last = capsys.readouterr().out.splitlines()
    assert before == ["w: starting", "w: loading", "w: loading weights, 25 % of 100 MB"]
    assert re.fullmatch(r"w: loading weights, 75 % of 100 MB, \d+ MB/s", with_rate)
    assert last == "w: ready"
