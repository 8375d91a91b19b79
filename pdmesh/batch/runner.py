"""Requests in flight: so many at once, each until it has its result."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

from pdmesh.async_client import AsyncClient
from pdmesh.batch.body import Call
from pdmesh.batch.input_file import InputFile, Line
from pdmesh.batch.output_file import OutputFile
from pdmesh.batch.patience import DEFINITE_ERRORS, Attempts, ClusterLostError, Patience
from pdmesh.batch.progress import Progress
from pdmesh.batch.request_line import custom_id_of, parse_line
from pdmesh.batch.result_line import answer_line, error_line
from pdmesh.errors import MeshError
from pdmesh.generation import Chunk, EventCollector, GenerationResult, Started

# How far past the oldest unfinished request others may run: each of these has an entry in memory, its result on disk.
MAX_AHEAD = 16384


class Runner:
    """See the module. `run` it once.

    Args:
        output: Of `source`.
        concurrency: Requests in flight at most.
    """

    def __init__(
        self,
        source: InputFile,
        output: OutputFile,
        client: AsyncClient,
        concurrency: int,
        patience: Patience,
        progress: Progress,
    ) -> None:
        self._source = source
        self._output = output
        self._client = client
        self._concurrency = concurrency
        self._patience = patience
        self._progress = progress
        self._moved = asyncio.Condition()

    async def run(self) -> None:
        """Returns when every request of the input has its result.

        Raises ClusterLostError where nobody answers for too long, ConfigError where results cannot be written.
        """
        lines = self._source.lines(self._output.num_written)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, self._source.num_requests)):
                    group.create_task(self._take_turns(lines))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed

    async def _take_turns(self, lines: Iterator[Line]) -> None:
        for line in lines:
            if self._output.has(line.index):
                continue
            async with self._moved:
                await self._moved.wait_for(lambda: line.index < self._output.num_written + MAX_AHEAD)  # noqa: B023
            await self._run_line(line)
            async with self._moved:
                self._moved.notify_all()

    async def _run_line(self, line: Line) -> None:
        digest = self._source.digest
        try:
            request = parse_line(line.content)
            result = await self._generate(request.call)
            answer = answer_line(digest, line.index, request.custom_id, result, chat=request.call.chat)
        except ClusterLostError:
            raise
        except MeshError as error:
            custom_id = custom_id_of(line.content)
            self._output.add(line.index, error_line(digest, line.index, custom_id, error), failed=True)
            self._progress.failed(line.number, error)
        else:
            self._output.add(line.index, answer, failed=False)

    async def _generate(self, call: Call) -> GenerationResult:
        """Raises the error that the request ends with, or ClusterLostError."""
        attempts = Attempts()
        while True:
            try:
                return await self._try(call, attempts)
            except DEFINITE_ERRORS:
                raise
            except MeshError as error:
                await self._patience.pause(error, attempts)

    async def _try(self, call: Call, attempts: Attempts) -> GenerationResult:
        collector = EventCollector()
        # Values that no message can hold are refused here, by nobody's answer.
        async with aclosing(self._client.stream(call.text, **call.options)) as events:
            try:
                async for event in events:
                    collector.add(event)
                    if isinstance(event, Started):
                        attempts.admitted = True
                    elif isinstance(event, Chunk):
                        self._patience.answered()
                        self._progress.num_tokens += len(event.token_ids)
            except DEFINITE_ERRORS:
                self._patience.answered()
                raise
        return collector.result()
