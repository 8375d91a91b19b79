"""`pdmesh demo`: a small model, a cluster, a few prompts, and where each of them ran.

Ends with exit code 0 only if it all happened: every answer has text, KV moved between two workers, the prefix cache
was used, and the first token came in time.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from pdmesh.cli.answers import Answer, mib, receive
from pdmesh.cli.model_download import is_cached, smollm2
from pdmesh.cli.terminal import make_console
from pdmesh.cli.up import Signals, StoppedError, running, warnings_on
from pdmesh.client import Client
from pdmesh.config import option, parse
from pdmesh.local.cluster import LocalCluster
from pdmesh.local.config import LocalConfig

_FIRST_TOKEN_WITHIN_S = 15.0

_PROMPTS = (
    "What is the capital of France? Answer in one sentence.",
    "Write a haiku about the sea.",
    "Why is the sky blue? Explain it to a child in two or three sentences.",
    "Name three uses of a paper clip.",
)

_LONG_PROMPT = (
    "Here are notes from a ship's log.\n"
    + "".join(
        f"Day {day}: wind from the {wind}, {day * 7 % 23 + 2} knots; the crew of {day % 5 + 9} is well, "
        f"and {day * 13 % 40 + 3} miles were sailed.\n"
        for day, wind in enumerate(("north", "east", "south-west", "west", "north-east") * 4, start=1)
    )
    + "What kind of text is this? Answer in one sentence."
)


@dataclass(frozen=True, slots=True)
class DemoConfig:
    model: str | None = option("model to use; default: SmolLM2-135M-Instruct, downloaded at first use", default=None)
    max_tokens: int = option("tokens of each answer at most", default=64)


def main(argv: Sequence[str]) -> int:
    config = parse(DemoConfig, argv, prog="pdmesh demo", description="Shows a small model at work on a cluster.")
    return asyncio.run(_demo(config, make_console()))


async def _demo(config: DemoConfig, console: Console) -> int:
    if config.model is None and not is_cached():
        console.print("Downloading SmolLM2-135M-Instruct (about 90 MB) …")
    model = config.model or str(smollm2())
    signals = Signals()
    try:
        await signals.interrupt(_compile_kernels())
    except StoppedError:
        return 130
    started_at = time.monotonic()
    # Short prompts, too, go to the prefill worker: there is more to see.
    cluster = LocalCluster(LocalConfig(model=model, port=0, short_prefill_tokens=16), warnings_on(console))
    console.print(f"[bold]A cluster[/bold] of one prefill and one decode worker, at {cluster.address}")
    try:
        async with running(cluster, signals, console) as workers:
            for worker in workers:
                console.print(f"  {worker.worker_id}  pid {worker.pid}  {worker.info.address if worker.info else ''}")
            console.print(f"  ready in {time.monotonic() - started_at:.1f} s")
            # On a thread: the client has no event loop, and a signal is to end the demo at any time.
            session = _Session(cluster.address, config.max_tokens, console, started_at)
            failures = await signals.interrupt(asyncio.to_thread(session.run))
    except StoppedError:
        return 130
    cluster.remove_logs()
    for failure in failures:
        console.print(f"[red]{failure}[/red]")
    return 1 if failures else 0


async def _compile_kernels() -> None:
    """Where they are not there yet: once for this machine, and not what the demo measures. It says so itself."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "engine.cpu.build", "--here")
    try:
        await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()


class _Session:
    """The questions and what became of them."""

    def __init__(self, address: str, max_tokens: int, console: Console, started_at: float) -> None:
        self._address = address
        self._max_tokens = max_tokens
        self._console = console
        self._started_at = started_at
        self._first_token_s: float | None = None

    def run(self) -> list[str]:
        """What did not happen as it should; empty if all did."""
        with Client(self._address) as client:
            answers = [self._ask(client, prompt, prompt) for prompt in _PROMPTS]
            cold = self._ask(client, _LONG_PROMPT, "A long prompt")
            warm = self._ask(client, _LONG_PROMPT, "The same again")
        self._console.print(
            f"\nThe prefix cache: {warm.result.usage.cached_tokens} of {warm.result.usage.prompt_tokens} prompt tokens "
            f"were not computed again; first token after {warm.ttft_s * 1000:.0f} ms "
            f"instead of {cold.ttft_s * 1000:.0f} ms."
        )
        moved = [answer.result.report for answer in (*answers, cold, warm) if answer.result.report.kv_bytes]
        num_bytes, transports = sum(report.kv_bytes for report in moved), {report.kv_transport for report in moved}
        self._console.print(
            f"{mib(num_bytes)} of KV moved from prefill to decode for {len(moved)} of {len(answers) + 2} prompts"
            + (f", over {', '.join(sorted(transports))}." if moved else ".")
        )
        self._console.print(f"First token {self._first_token_s or 0.0:.1f} s after the cluster began to start.\n")
        return self._failures([*answers, cold, warm], warm)

    def _ask(self, client: Client, prompt: str, title: str) -> Answer:
        self._console.print(f"\n[bold]› {title}[/bold]", markup=True)
        answer = receive(
            client.stream(messages=[{"role": "user", "content": prompt}], max_tokens=self._max_tokens, temperature=0.0),
            self._write,
        )
        self._console.print(f"\n[dim]{answer.summary()}[/dim]")
        return answer

    def _write(self, text: str) -> None:
        if self._first_token_s is None:
            self._first_token_s = time.monotonic() - self._started_at
        sys.stdout.write(text)
        sys.stdout.flush()

    def _failures(self, answers: list[Answer], warm: Answer) -> list[str]:
        failures = []
        if not all(answer.result.text.strip() for answer in answers):
            failures.append("An answer has no text.")
        if not any(answer.result.report.kv_bytes for answer in answers):
            failures.append("No KV moved: the decode worker computed every prompt itself.")
        if not warm.result.usage.cached_tokens:
            failures.append("The prefix cache was not used for a prompt that had been there before.")
        if self._first_token_s is None or self._first_token_s > _FIRST_TOKEN_WITHIN_S:
            failures.append(f"The first token took longer than {_FIRST_TOKEN_WITHIN_S:g} s.")
        return failures
