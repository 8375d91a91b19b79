"""Two machines as network namespaces of this one, for what spans machines: each has a link to the test, and one to the
other.

    test ── 198.18.<t>.1 ────── .2 ── host 0 ── 198.19.<t>.1
                                                     │ the link between them
    test ── 198.18.<t>.5 ────── .6 ── host 1 ── 198.19.<t>.2

Nothing is forwarded, whatever a firewall of this machine says. What has no name server here finds none, either.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

# Of this link layer nobody has this address: what is sent there is lost without a word.
_NOBODY = "02:00:00:00:00:01"


@dataclass(frozen=True)
class Host:
    """One of them.

    Attributes:
        name: Of its namespace.
        address: At which the test reaches it.
        link_address: At which the other host does.
        test_address: At which both hosts reach the test.
    """

    name: str
    address: str
    link_address: str
    test_address: str

    def command(self, *arguments: str) -> tuple[str, ...]:
        """That runs `arguments` on it, in the same process."""
        return ("ip", "netns", "exec", self.name, *arguments)

    def ip(self, *arguments: str) -> None:
        _ip("-n", self.name, *arguments)


@dataclass(frozen=True)
class TwoHosts:
    """Both, and the link between them."""

    hosts: tuple[Host, Host]

    def cut(self) -> None:
        """The link is down, and each machine knows it."""
        for host in self.hosts:
            host.ip("link", "set", "between", "down")

    def swallow(self) -> None:
        """The link loses all that is sent over it, and nobody is told."""
        for host, other in (self.hosts, self.hosts[::-1]):
            host.ip("neigh", "replace", other.link_address, "lladdr", _NOBODY, "dev", "between", "nud", "permanent")

    def mend(self) -> None:
        """It works again, whatever was done to it."""
        for host, other in (self.hosts, self.hosts[::-1]):
            host.ip("link", "set", "between", "up")
            host.ip("neigh", "flush", "to", other.link_address, "nud", "permanent")

    def connected(self) -> bool:
        """A packet gets from one to the other and back within half a second."""
        one, other = self.hosts
        reach = (sys.executable, "-c", _CONNECT, other.link_address)
        return subprocess.run(one.command(*reach), check=False).returncode == 0


# A port at which nobody listens: whoever is reached refuses at once.
_CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 1), timeout=0.5)
except ConnectionRefusedError:
    sys.exit(0)
except OSError:
    pass
sys.exit(1)
"""


def why_no_hosts() -> str:
    """Why this machine cannot have them; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    trial = f"pdmesh-trial-{os.getpid()}"
    veth = ("-n", trial, "link", "add", "one", "type", "veth", "peer", "name", "other")
    try:
        for command in (("netns", "add", trial), veth):
            made = subprocess.run(("ip", *command), capture_output=True, text=True, check=False)
            if made.returncode != 0:
                return f"no network namespaces here: {made.stderr.strip()}"
    finally:
        subprocess.run(("ip", "netns", "del", trial), capture_output=True, check=False)
    return ""


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """They are gone afterwards; what runs there must have ended."""
    # Several test runs may be under way.
    number = os.getpid() % 256
    hosts = [
        Host(
            f"pdmesh-{os.getpid()}-{host}",
            f"198.18.{number}.{4 * host + 2}",
            f"198.19.{number}.{host + 1}",
            f"198.18.{number}.1",
        )
        for host in range(2)
    ]
    with contextlib.ExitStack() as stack:
        for place, host in enumerate(hosts):
            _ip("netns", "add", host.name)
            stack.callback(_ip, "netns", "del", host.name)
            ours = f"pdm{os.getpid()}-{place}"
            gateway = f"198.18.{number}.{4 * place + 1}"
            _ip("link", "add", ours, "type", "veth", "peer", "name", "test", "netns", host.name)
            # Deleting the namespace deletes both ends, but later.
            stack.callback(_ip, "link", "del", ours)
            _ip("addr", "add", f"{gateway}/30", "dev", ours)
            _ip("link", "set", ours, "up")
            host.ip("addr", "add", f"{host.address}/30", "dev", "test")
            for device in ("lo", "test"):
                host.ip("link", "set", device, "up")
            if gateway != host.test_address:
                host.ip("route", "add", host.test_address, "via", gateway)
        one, other = hosts
        one.ip("link", "add", "between", "type", "veth", "peer", "name", "between", "netns", other.name)
        for host in hosts:
            host.ip("addr", "add", f"{host.link_address}/30", "dev", "between")
            host.ip("link", "set", "between", "up")
        yield TwoHosts((one, other))


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True)
