"""What `pdmesh up` is told, and the command lines that this becomes."""

import socket
import sys
from pathlib import Path

import pytest

from pdmesh.errors import ConfigError
from pdmesh.local.commands import cluster_commands
from pdmesh.local.config import LocalConfig, num_cores


def argument(command: tuple[str, ...], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_one_process_each_with_ids_and_a_valkey_of_its_own(tmp_path: Path) -> None:
    commands = cluster_commands(LocalConfig(model="m", prefill=1, decode=2), 50051, tmp_path)
    assert list(commands.workers) == ["prefill-0", "decode-0", "decode-1"]
    assert commands.router.command[:5] == (sys.executable, "-P", "-m", "router", "m")
    assert argument(commands.router.command, "--port") == "50051"
    assert commands.valkey is not None
    assert argument(commands.valkey.command, "--unixsocket") == str(tmp_path / "valkey.sock")
    for name, spec in commands.workers.items():
        assert spec.command[3] == name.partition("-")[0]
        assert argument(spec.command, "--worker-id") == name
        assert argument(spec.command, "--redis-url") == f"unix://{tmp_path}/valkey.sock"


def test_on_a_redis_that_others_use_worker_ids_are_this_clusters_own(tmp_path: Path) -> None:
    commands = cluster_commands(LocalConfig(model="m", redis_url="redis://r:1"), 1, tmp_path)
    assert commands.valkey is None
    assert all(name not in ("prefill-0", "decode-0") for name in commands.workers)
    assert argument(commands.router.command, "--redis-url") == "redis://r:1"


def test_settings_reach_those_whom_they_concern(tmp_path: Path) -> None:
    config = LocalConfig(
        model="m",
        dtype="bfloat16",
        quantization="int4",
        weights="packed",
        kv_cache_bytes=4096,
        max_model_len=64,
        transports="grpc",
        short_prefill_tokens=0,
    )
    commands = cluster_commands(config, 1, tmp_path)
    prefill, decode = commands.workers["prefill-0"].command, commands.workers["decode-0"].command
    for command in (prefill, decode):
        assert argument(command, "--dtype") == "bfloat16"
        assert argument(command, "--quantization") == "int4"
        assert argument(command, "--weights") == "packed"
        assert argument(command, "--kv-cache-bytes") == "4096"
        assert argument(command, "--max-model-len") == "64"
    assert argument(decode, "--transports") == "grpc"
    assert argument(decode, "--short-prefill-tokens") == "0"
    assert argument(commands.router.command, "--short-prefill-tokens") == "0"
    assert "--transports" not in prefill


def test_each_process_serves_its_metrics_on_a_port_of_its_own(tmp_path: Path) -> None:
    def ports(metrics_port: int) -> list[str]:
        commands = cluster_commands(LocalConfig(model="m", decode=2, metrics_port=metrics_port), 1, tmp_path)
        return [argument(spec.command, "--metrics-port") for spec in (commands.router, *commands.workers.values())]

    assert ports(9100) == ["9100", "9101", "9102", "9103"]
    assert ports(0) == ["0"] * 4


def test_stores_and_tiers_of_which_each_has_its_own(tmp_path: Path) -> None:
    config = LocalConfig(
        model="m", stores=2, transports="tcp", metrics_port=9100, redis_url="redis://r:1",
        kv_host_gib=0.5, kv_disk_gib=2, store_host_gib=3, store_disk_gib=4, kv_disk_dir=str(tmp_path / "kv"),
    )  # fmt: skip
    commands = cluster_commands(config, 1, tmp_path)
    places = []
    for name, spec in {**commands.workers, **commands.stores}.items():
        is_store = name in commands.stores
        assert argument(spec.command, "--kv-host-gib") == ("3" if is_store else "0.5")
        assert argument(spec.command, "--kv-disk-gib") == ("4" if is_store else "2")
        places.append(argument(spec.command, "--kv-disk-dir"))
    # The same at every start, on a Redis that others use too: what lies there is found again.
    assert places == [str(tmp_path / "kv" / name) for name in ("prefill-0", "decode-0", "store-0", "store-1")]
    for number, (name, spec) in enumerate(commands.stores.items()):
        assert spec.command[3] == "kvstore"
        assert argument(spec.command, "--store-id") == name
        assert name.startswith(f"store-{number}-")
        assert argument(spec.command, "--transports") == "tcp"
        assert argument(spec.command, "--metrics-port") == str(9103 + number)


def test_nothing_is_kept_and_no_store_runs_unless_asked(tmp_path: Path) -> None:
    commands = cluster_commands(LocalConfig(model="m"), 1, tmp_path)
    assert commands.stores == {}
    for spec in commands.workers.values():
        assert argument(spec.command, "--kv-host-gib") == argument(spec.command, "--kv-disk-gib") == "0.0"
        assert "--kv-disk-dir" not in spec.command


@pytest.mark.parametrize(
    "values", [{"kv_disk_gib": 1.0}, {"stores": 1, "store_disk_gib": 1.0}, {"kv_disk_dir": "d"}], ids=str
)
def test_a_size_on_disk_without_a_directory_or_the_reverse(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="--kv-disk-dir says where"):
        LocalConfig(model="m", **values)  # type: ignore[arg-type]


def test_a_socket_path_that_no_socket_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shorter --run-dir"):
        cluster_commands(LocalConfig(model="m"), 1, tmp_path / ("x" * 100))


def test_cores_are_divided_among_all_ranks() -> None:
    assert LocalConfig(model="m", prefill=0, decode=1).threads_per_rank == num_cores()
    assert LocalConfig(model="m", prefill=500, decode=500).threads_per_rank == 1
    assert LocalConfig(model="m", num_threads=3, decode_tp=2).threads_per_rank == 3


def test_several_ranks_share_what_one_worker_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdmesh.local.config.num_cores", lambda: 96)
    config = LocalConfig(model="m", prefill=2, prefill_tp=2, prefill_pp=3, decode=3, decode_tp=4)
    assert config.threads_per_rank == 96 // (2 * 6 + 3 * 4)


def test_each_role_has_degrees_of_its_own(tmp_path: Path) -> None:
    config = LocalConfig(model="m", decode=2, prefill_pp=3, decode_tp=2, num_threads=5)
    commands = cluster_commands(config, 1, tmp_path)
    degrees = {
        name: (argument(spec.command, "--tp"), argument(spec.command, "--pp"))
        for name, spec in commands.workers.items()
    }
    assert degrees == {"prefill-0": ("1", "3"), "decode-0": ("2", "1"), "decode-1": ("2", "1")}
    assert {argument(spec.command, "--num-threads") for spec in commands.workers.values()} == {"5"}


@pytest.mark.parametrize(
    "values",
    [
        {"decode": 0},
        {"prefill": -1},
        {"stores": -1},
        {"prefill_tp": 0},
        {"prefill_pp": 0},
        {"decode_tp": -1},
        {"decode_pp": 0},
        {"num_threads": 0},
        {"port": 65536},
        {"metrics_port": 65534},
        {"drain_s": -1.0},
    ],
    ids=str,
)
def test_values_that_make_no_sense(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="--" + next(iter(values)).replace("_", "-")):
        LocalConfig(model="m", **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["/no/such/model", "nothing", "dir/model.gguf", "a/b/c"])
def test_a_model_that_is_neither_path_nor_hub_id(model: str) -> None:
    with pytest.raises(ConfigError, match="no such file or directory"):
        LocalConfig(model=model).check_model()


def test_paths_and_hub_ids_pass(tmp_path: Path) -> None:
    LocalConfig(model=str(tmp_path)).check_model()
    LocalConfig(model="owner/name-1.5").check_model()


def test_a_taken_port_names_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port + 1}"):
            LocalConfig(model="m", port=port).free_port()


def test_port_0_is_some_port() -> None:
    assert LocalConfig(model="m", port=0).free_port() > 0
