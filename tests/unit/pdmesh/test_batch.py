"""`pdmesh batch` as a person meets it, against a server that echoes and can be told to fail."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from pdmesh.batch.patience import MAX_FAILURES, Attempts, ClusterLostError, Patience
from pdmesh.batch.progress import duration
from pdmesh.cli.main import main
from pdmesh.errors import InternalError, OverloadedError, UnavailableError
from pdmesh.server import GrpcServer
from pdmesh.v1 import common_pb2, inference_pb2
from tests.unit.pdmesh.conftest import EchoInference, EchoServer

Batch = Callable[..., Awaitable[int]]
Json = dict[str, Any]


class MoodyInference(EchoInference):
    """Echoes; "lost N …" loses its worker N times before that, "busy N …" is refused N times, "bad …" for good.

    "slow …" waits until every other request has been asked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_asked: dict[str, int] = {}
        self.num_running = self.most_running = 0
        self.released = asyncio.Event()

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        mood, _, rest = request.text.partition(" ")
        times = self.num_asked[request.text] = self.num_asked.get(request.text, 0) + 1
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            if mood == "busy" and times <= int(rest.split()[0]):
                raise OverloadedError("no room")
            if mood == "lost" and times <= int(rest.split()[0]):
                yield inference_pb2.GenerateResponse(started=inference_pb2.GenerateStarted(request_id="r"))
                raise UnavailableError("its worker died")
            if mood == "slow":
                await self.released.wait()
            async for response in super().Generate(request, context):
                yield response
        finally:
            self.num_running -= 1


@pytest.fixture
def moody() -> MoodyInference:
    return MoodyInference()


@pytest_asyncio.fixture
async def echo(moody: MoodyInference) -> AsyncIterator[EchoServer]:
    server = EchoServer(GrpcServer("127.0.0.1", 0), moody)
    try:
        await server.grpc.start()
        yield server
    finally:
        await server.grpc.stop()


@pytest.fixture
def batch(echo: EchoServer, tmp_path: Path) -> Batch:
    """Runs the command on a thread: the server lives on the event loop."""

    async def run(*flags: str) -> int:
        argv = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--address", echo.address, *flags]
        return await asyncio.to_thread(main, argv)

    return run


def ask(tmp_path: Path, *prompts: str | bytes) -> None:
    """Writes the input: a completion of each text, or a line as it stands."""
    lines = [
        prompt
        if isinstance(prompt, bytes)
        else json.dumps(
            {"custom_id": f"q{number}", "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt}}
        ).encode()
        for number, prompt in enumerate(prompts)
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))


def results(tmp_path: Path) -> list[Json]:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def text(result: Json) -> str:
    choice: str = result["response"]["body"]["choices"][0]["text"]
    return choice


async def test_a_result_has_openais_shape(batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}], "n": 2}
    ask(
        tmp_path,
        "abc",
        json.dumps({"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": chat}).encode(),
        b"{",
    )
    assert await batch() == 1
    completion, chatted, failed = results(tmp_path)
    created = completion["response"]["body"].pop("created")
    assert created > 1_600_000_000
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    identity = completion.pop("id")
    assert completion == {
        "custom_id": "q0",
        "response": {
            "status_code": 200,
            "request_id": "r1",
            "body": {
                "id": "cmpl-r1",
                "object": "text_completion",
                "model": "echo",
                "choices": [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop"}],
                "usage": usage,
            },
        },
        "error": None,
    }
    body = chatted["response"]["body"]
    assert (body["object"], body["id"]) == ("chat.completion", "chatcmpl-r1")
    assert [choice["message"]["role"] for choice in body["choices"]] == ["assistant", "assistant"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert (failed["custom_id"], failed["response"], failed["error"]["code"]) == (None, None, "INVALID_JSON")
    assert identity.removesuffix("_0") == failed["id"].removesuffix("_2")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("2 of 3 succeeded, 1 failed (the first of this run: line 3: the line is no JSON")


async def test_options_reach_the_router(batch: Batch, echo: EchoServer, tmp_path: Path) -> None:
    body = {"prompt": "x", "max_tokens": 5, "temperature": 0, "seed": 9, "stop": "y", "logit_bias": {"7": 1}}
    ask(
        tmp_path,
        json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}).encode(),
    )
    assert await batch() == 0
    (request,) = echo.inference.requests
    expected = common_pb2.SamplingParams(max_tokens=5, temperature=0, seed=9, stop=["y"], logit_bias={7: 1})
    assert request.sampling_params == expected


async def test_results_wait_for_their_turn_on_disk(batch: Batch, moody: MoodyInference, tmp_path: Path) -> None:
    ask(tmp_path, "slow one", *(f"text {number}" for number in range(20)))
    running = asyncio.ensure_future(batch("--concurrency", "4"))
    ahead = tmp_path / "out.jsonl.ahead"
    async with asyncio.timeout(20):
        while not ahead.exists() or ahead.read_bytes().count(b"\n") < 20:
            await asyncio.sleep(0.01)
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    moody.released.set()
    assert await running == 0
    assert [text(result) for result in results(tmp_path)] == ["slow one", *(f"text {number}" for number in range(20))]
    assert not ahead.exists()
    assert moody.most_running == 4


async def test_none_runs_too_far_ahead_of_the_oldest_unfinished_one(
    batch: Batch, moody: MoodyInference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdmesh.batch.runner.MAX_AHEAD", 5)
    ask(tmp_path, "slow one", *(f"text {number}" for number in range(20)))
    running = asyncio.ensure_future(batch("--concurrency", "2"))
    async with asyncio.timeout(20):
        while len(moody.num_asked) < 5:
            await asyncio.sleep(0.01)
    # Time enough for all the others, were they let.
    await asyncio.sleep(0.3)
    assert len(moody.num_asked) == 5
    moody.released.set()
    assert await running == 0
    assert len(results(tmp_path)) == 21


async def test_what_passes_is_tried_again_until_it_has_passed(
    batch: Batch, moody: MoodyInference, tmp_path: Path
) -> None:
    ask(tmp_path, "lost 2 a", "busy 2 b", "fine")
    assert await batch() == 0
    assert [text(result) for result in results(tmp_path)] == ["lost 2 a", "busy 2 b", "fine"]
    assert moody.num_asked == {"lost 2 a": 3, "busy 2 b": 3, "fine": 1}


async def test_a_finished_batch_asks_nobody_and_exits_as_before(
    batch: Batch, moody: MoodyInference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(tmp_path, "a", b"{", "b")
    assert await batch() == 1
    written, asked = (tmp_path / "out.jsonl").read_bytes(), dict(moody.num_asked)
    capsys.readouterr()
    assert await batch() == 1
    assert ((tmp_path / "out.jsonl").read_bytes(), moody.num_asked) == (written, asked)
    has, came_to = capsys.readouterr().err.splitlines()
    assert has.endswith("out.jsonl has 3 of 3 results already")
    assert came_to == "2 of 3 succeeded, 1 failed"


async def test_a_torn_line_and_what_follows_are_run_again_and_nothing_else(
    batch: Batch, moody: MoodyInference, tmp_path: Path
) -> None:
    ask(tmp_path, "a", "b", "c", "d")
    assert await batch() == 0
    out = tmp_path / "out.jsonl"
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1] + lines[2][:-20])
    moody.num_asked.clear()
    assert await batch() == 0
    assert moody.num_asked == {"c": 1, "d": 1}
    assert out.read_bytes().splitlines(keepends=True)[:2] == lines[:2]
    assert list(map(text, results(tmp_path))) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("flags", "content", "says"),
    [
        ((), b'{"custom_id": "a"}\n{"custom_id": "a"}\n', "line 2 has the custom_id 'a' of line 1"),
        ((), b"", "holds no request"),
        (("--concurrency", "0"), b"{}", "--concurrency is 0"),
        (("--wait-s", "-1"), b"{}", "--wait-s is -1"),
        (("--wait-s", "nan"), b"{}", "--wait-s is nan"),
    ],
)
async def test_a_wrong_call_is_one_line_and_sends_nothing(
    batch: Batch, echo: EchoServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...],
    content: bytes, says: str,
) -> None:  # fmt: skip
    (tmp_path / "in.jsonl").write_bytes(content)
    try:
        code = await batch(*flags)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else -1
    assert code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out.jsonl").exists()
    assert echo.inference.requests == []


async def test_a_changed_input_is_refused_before_anything_is_sent(
    batch: Batch, moody: MoodyInference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(tmp_path, "a", "b")
    assert await batch() == 0
    written = (tmp_path / "out.jsonl").read_bytes()
    ask(tmp_path, "a", "c")
    capsys.readouterr()
    assert await batch() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the input has changed" in line
    assert moody.num_asked == {"a": 1, "b": 1}
    assert (tmp_path / "out.jsonl").read_bytes() == written


async def test_a_cluster_that_answers_nobody_ends_the_run_and_no_request(
    batch: Batch, moody: MoodyInference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(tmp_path, "a", "busy 99 b")
    assert await batch("--wait-s", "1") == 1
    assert "no request was answered for 1 s (no room)" in capsys.readouterr().err.splitlines()[-1]
    assert [text(result) for result in results(tmp_path)] == ["a"]


async def test_a_router_that_is_not_there_is_waited_for(
    unused_tcp_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(tmp_path, "a")
    argv = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--wait-s", "1"]
    assert await asyncio.to_thread(main, [*argv, "--address", f"127.0.0.1:{unused_tcp_port}"]) == 1
    waiting, gave_up = capsys.readouterr().err.splitlines()
    assert waiting.startswith("waiting up to 1 s for the cluster: nobody answers at 127.0.0.1:")
    assert "the same command goes on" in gave_up
    assert results(tmp_path) == []


class Impatience(Patience):
    """Told what happens, by hand."""

    def __init__(self, wait_s: float = 60.0) -> None:
        self.said: list[str] = []
        super().__init__(wait_s, self.said.append)


def taken() -> Attempts:
    return Attempts(admitted=True)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdmesh.batch.patience._FIRST_PAUSE_S", 0.0)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("error", [UnavailableError("lost"), InternalError("broken")])
async def test_a_request_that_alone_is_lost_again_and_again_fails(error: UnavailableError | InternalError) -> None:
    patience, attempts = Impatience(), Attempts()
    for _ in range(MAX_FAILURES - 1):
        attempts.admitted = True
        await patience.pause(error, attempts)
        patience.answered()
    attempts.admitted = True
    with pytest.raises(type(error), match=error.message):
        await patience.pause(error, attempts)


@pytest.mark.usefixtures("no_pauses")
async def test_where_all_are_lost_none_is_to_blame() -> None:
    patience, attempts = Impatience(), Attempts()
    patience.answered()
    for _ in range(3 * MAX_FAILURES):
        attempts.admitted = True
        await patience.pause(UnavailableError("lost"), attempts)


@pytest.mark.usefixtures("no_pauses")
async def test_what_was_not_taken_or_found_no_room_is_not_to_blame() -> None:
    patience, untaken, crowded = Impatience(), Attempts(), Attempts()
    for _ in range(3 * MAX_FAILURES):
        crowded.admitted = True
        await patience.pause(UnavailableError("nobody", reason="NO_DECODE_WORKER"), untaken)
        await patience.pause(OverloadedError("full"), crowded)
        patience.answered()


async def test_a_cluster_that_is_lost_is_told_of_once_and_so_is_its_return() -> None:
    patience = Impatience()
    nobody = UnavailableError("nobody answers", reason="NO_CONNECTION")
    await asyncio.gather(*(patience.pause(nobody, Attempts()) for _ in range(8)))
    patience.answered()
    patience.answered()
    waiting, back = patience.said
    assert waiting == "waiting up to 60 s for the cluster: nobody answers"
    assert back.startswith("the cluster answers again")


async def test_patience_ends() -> None:
    patience = Impatience(wait_s=0.0)
    with pytest.raises(ClusterLostError, match="lost"):
        await patience.pause(UnavailableError("lost"), taken())


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.9, "1 h 00 min"), (12_345, "3 h 25 min")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
