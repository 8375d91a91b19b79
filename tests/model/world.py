"""The state of the model: one prefill worker, decode workers, hand-offs between them, and what is on its way.

All of it are named tuples and not dataclasses, because millions of them are hashed and compared, in C.

A block is one unit of bytes, a part of a transfer is one block, and what a block holds is the number of the tokens
whose KV it is. Both sides know the numbers; a hash is the same number as bytes.
"""

from dataclasses import dataclass
from typing import NamedTuple

from kvstore.transfer.states import Receiving, Sending
from pdmesh.hashing import HASH_BYTES, BlockHash

# What a block holds that no complete KV was written to.
GARBAGE = 0
# What a block holds while it is being written, or when that was cut short.
MIXED = -1
NO_HASH = 0
BLOCK_BYTES = 1


def tokens_of(prompt: int, num_blocks: int) -> tuple[int, ...]:
    """The tokens of each block of a prompt."""
    return tuple(10 * prompt + index for index in range(num_blocks))


def hash_of(tokens: int) -> BlockHash:
    return BlockHash(tokens.to_bytes(HASH_BYTES, "little"))


class Block(NamedTuple):
    """One block of a pool.

    Attributes:
        holders: Who holds it: numbers of hand-offs, or of runs on the prefill side. Sorted.
        tokens: Under which it is committed, or NO_HASH.
        content: Whose tokens' KV lies there.
    """

    holders: tuple[int, ...] = ()
    tokens: int = NO_HASH
    content: int = GARBAGE


Blocks = tuple[Block, ...]


class Ticket(NamedTuple):
    """Names a grant, its ticket and the one data connection on which it is presented."""

    handoff: int
    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.handoff}/{self.epoch}/{self.number}"


class Message(NamedTuple):
    """On a data connection, which keeps no order. To the receiver: open, part, finish, close. To the sender: the rest.

    Attributes:
        kind: open, part, finish, close (the sender's end is closed); ack (of open), nack, verified (all of it).
        incarnation: Of the sender, in an open.
        place: In a part: of the block, among those that travel.
        tokens: In a part: the hash that the sender names.
        checksum: In a part: what lay in the block when the sender looked.
        content: In a part whose bytes travel.
        source: In a part that is to be pulled: the sender's block. Otherwise -1.
        num_parts: In a finish.
    """

    kind: str
    ticket: Ticket
    incarnation: int = -1
    place: int = -1
    tokens: int = NO_HASH
    checksum: int = GARBAGE
    content: int = GARBAGE
    source: int = -1
    num_parts: int = 0

    @property
    def to_sender(self) -> bool:
        return self.kind in ("ack", "nack", "verified")

    def __str__(self) -> str:
        of = f"[{self.place}]" if self.kind == "part" else ""
        return f"{self.kind}{of} of {self.ticket}" + (f" (in block {self.source})" if self.source >= 0 else "")


class Write(NamedTuple):
    """A part that is being written on the receiving side; `seen` is what lay in the source when it began."""

    part: Message
    block_id: int
    seen: int


class Signal(NamedTuple):
    """On the control stream of a run: start, grant and leave to the prefill side; started, failed and over from it."""

    kind: str
    number: int = -1

    def __str__(self) -> str:
        return self.kind if self.number < 0 else f"{self.kind} {self.number}"


class Work(NamedTuple):
    """What a sender does: open, send, finish, or give up.

    Attributes:
        next: Of a send: the block that is read next.
        end: Of a send: the block after the last.
        closing: It was told to stop; until it has, it goes on.
        outcome: "", "done" or "failed".
    """

    kind: str
    next: int = 0
    end: int = 0
    closing: bool = False
    outcome: str = ""


class Run(NamedTuple):
    """One attempt of a hand-off: its control stream, and the prefill side of it.

    Attributes:
        incarnation: Of the prefill worker that is asked.
        sending: None until the prefill worker has heard of it, and when it has forgotten it.
        block_ids: On the prefill side; all of the prompt's.
        num_computed: Of these.
        connection: That the sender has open.
        to_prefill: Signals on their way, in order.
        to_decode: Likewise.
        left: The decode side listens no more.
        over: The prefill side is.
    """

    handoff: int
    epoch: int
    incarnation: int
    sending: Sending | None = None
    block_ids: tuple[int, ...] = ()
    num_computed: int = 0
    work: Work | None = None
    connection: Ticket | None = None
    to_prefill: tuple[Signal, ...] = ()
    to_decode: tuple[Signal, ...] = ()
    left: bool = False
    over: bool = False

    @property
    def holder(self) -> int:
        """Its number as a holder of blocks."""
        return 10 * self.handoff + self.epoch


class Asker(NamedTuple):
    """The decode side of one hand-off.

    Attributes:
        phase: idle, asked, reserving, receiving, closing, committed or ended.
        epoch: Of the attempt, from 0.
        number: Of the grant in this attempt.
        block_ids: Its lease.
        receiving: What it awaits now.
        then: In closing, what comes next: grant, retry or end.
        verdict: When ended: done, failed, cancelled, crashed.
    """

    phase: str = "idle"
    epoch: int = 0
    number: int = -1
    block_ids: tuple[int, ...] = ()
    receiving: Receiving | None = None
    then: str = ""
    verdict: str = ""


class World(NamedTuple):
    """Everything.

    Attributes:
        faults_left: How many may still happen.
        incarnation: Of the prefill worker.
        prefill: Its blocks.
        decode: The blocks of each decode worker.
        askers: Of each hand-off, its decode side.
        runs: By hand-off and epoch.
        messages: On data connections, sorted: they come in any order.
        writes: Under way on the decode workers, sorted.
    """

    faults_left: int
    incarnation: int
    prefill: Blocks
    decode: tuple[Blocks, ...]
    askers: tuple[Asker, ...]
    runs: tuple[Run, ...] = ()
    messages: tuple[Message, ...] = ()
    writes: tuple[Write, ...] = ()

    def __str__(self) -> str:
        return "\n".join(f"  {name}: {value!r}" for name, value in self._asdict().items())


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large a world is.

    Attributes:
        prompts: Of each hand-off, the prompt that it wants.
        workers: Of each hand-off, its decode worker.
        num_blocks: Of a prompt.
        prefill_blocks: In the prefill worker's pool.
        decode_blocks: In each decode worker's.
        pulled: Of each grant of an attempt, whether the receiver pulls the bytes.
        num_attempts: That a hand-off makes.
        num_faults: Of all kinds together.
    """

    prompts: tuple[int, ...]
    workers: tuple[int, ...]
    num_blocks: int
    prefill_blocks: int
    decode_blocks: int
    pulled: tuple[bool, ...]
    num_attempts: int
    num_faults: int

    def __str__(self) -> str:
        grants = " then ".join("pulled" if pulled else "pushed" for pulled in self.pulled)
        return (
            f"prompts {self.prompts} of {self.num_blocks} blocks to workers {self.workers}, {self.prefill_blocks} and "
            f"{self.decode_blocks} blocks each, {grants}, {self.num_attempts} attempts, {self.num_faults} faults"
        )


@dataclass(frozen=True, slots=True)
class Rules:
    """What the mesh does, so that a test can have it do otherwise.

    Attributes:
        receiving: The receiving side's states.
        sending: The sending side's.
        waits_for_quiet: A decode worker frees blocks of a failed transfer only when nobody writes to them.
        checks_ticket: What presents one ticket is not taken for another.
        checks_checksum: What was written is compared with what the sender saw.
    """

    receiving: type[Receiving] = Receiving
    sending: type[Sending] = Sending
    waits_for_quiet: bool = True
    checks_ticket: bool = True
    checks_checksum: bool = True
