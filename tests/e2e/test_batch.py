"""`pdmesh batch` over a real mesh: killed again and again, or the mesh under it, it ends with the same answers."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ProcessMesh, kill

pytestmark = pytest.mark.e2e

NUM_REQUESTS = 160
_COMMAND = (sys.executable, "-m", "pdmesh.cli.main", "batch")
_TIMEOUT_S = 60


def write_input(path: Path) -> None:
    """Greedy requests of many lengths, so that they end in another order than they began."""
    with path.open("w") as file:
        for number in range(NUM_REQUESTS):
            limits = {"temperature": 0, "max_tokens": 20 + 37 * number % 160, "ignore_eos": True}
            prompt = f"Request {number} " * (1 + number % 20)
            if number % 2:
                url, body = "/v1/completions", {"prompt": prompt, **limits}
            else:
                url, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}], **limits}
            json.dump({"custom_id": f"id-{number}", "method": "POST", "url": url, "body": body}, file)
            file.write("\n")


class BatchRun:
    """A process that runs the input, and what it has written."""

    def __init__(self, mesh: ProcessMesh, source: Path, output: Path) -> None:
        self.output = output
        self._ahead = output.with_name(output.name + ".ahead")
        self._log = output.with_suffix(".log")
        self._command = (*_COMMAND, str(source), str(output), "--address", mesh.address, "--concurrency", "12")

    async def start(self) -> None:
        with self._log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(*self._command, stderr=log)

    async def end(self) -> int:
        async with asyncio.timeout(_TIMEOUT_S):
            return await self.process.wait()

    async def until_finished(self, num_results: int) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            while len(self.lines()) < num_results:
                assert self.process.returncode is None, self.log()
                await asyncio.sleep(0.005)

    async def until_said(self, words: str) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            while words not in self.log():
                assert self.process.returncode is None, self.log()
                await asyncio.sleep(0.005)

    async def send(self, number: signal.Signals) -> int:
        os.kill(self.process.pid, number)
        return await self.end()

    def lines(self) -> dict[str, bytes]:
        """Whole results, in their place or ahead of it, by custom_id."""
        lines = [
            line
            for path in (self.output, self._ahead)
            if path.exists()
            for line in path.read_bytes().splitlines(keepends=True)
        ]
        return {json.loads(line)["custom_id"]: line for line in lines if line.endswith(b"\n")}

    def answers(self) -> list[tuple[str, Any]]:
        """Of each result in order: what may not differ from run to run."""
        found = []
        for line in self.output.read_bytes().splitlines():
            result = json.loads(line)
            assert result["error"] is None, result
            found.append((result["custom_id"], result["response"]["body"]["choices"]))
        return found

    def log(self) -> str:
        return self._log.read_text()


async def uninterrupted(mesh: ProcessMesh, source: Path, tmp_path: Path) -> list[tuple[str, Any]]:
    whole = BatchRun(mesh, source, tmp_path / "whole.jsonl")
    await whole.start()
    assert await whole.end() == 0, whole.log()
    answers = whole.answers()
    assert [custom_id for custom_id, _ in answers] == [f"id-{number}" for number in range(NUM_REQUESTS)]
    return answers


async def test_killed_and_started_again_it_ends_as_if_nothing_had_been(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write_input(source)
    async with ProcessMesh(tiny_model, tmp_path) as mesh:
        expected = await uninterrupted(mesh, source, tmp_path)
        run = BatchRun(mesh, source, tmp_path / "out.jsonl")
        kept: dict[str, bytes] = {}
        for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            await run.start()
            await run.until_finished(len(kept) + 20)
            code = await run.send(number)
            assert code == (130 if number is signal.SIGINT else -number)
            before, kept = kept, run.lines()
            assert len(kept) < NUM_REQUESTS, "it was stopped in the midst"
            assert before.items() <= kept.items(), "a result was lost, or made anew"
        await run.start()
        assert await run.end() == 0, run.log()
        assert f"has {len(kept)} of {NUM_REQUESTS} results already" in run.log()
        assert kept.items() <= run.lines().items()
        assert run.answers() == expected
        assert not (tmp_path / "out.jsonl.ahead").exists()
        await mesh.assert_idle()


@pytest.mark.slow
async def test_the_mesh_dies_under_it_and_comes_back(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write_input(source)
    async with ProcessMesh(tiny_model, tmp_path) as mesh:
        expected = await uninterrupted(mesh, source, tmp_path)
        run = BatchRun(mesh, source, tmp_path / "out.jsonl")
        await run.start()
        await run.until_finished(20)
        await kill(mesh.router)
        await run.until_said("waiting up to")
        await mesh.router.start()
        await run.until_finished(60)
        await kill(mesh.decodes[0])
        num_before = len(run.lines())
        assert num_before < NUM_REQUESTS, "it was in the midst"
        await mesh.decodes[0].start()
        assert await run.end() == 0, run.log()
        assert run.answers() == expected
        await mesh.assert_idle()
