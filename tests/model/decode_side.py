"""The decode side of the model: what decode/handoff.py, transfer/receiver.py and the receiving transports do.

What the event loop does without waiting is one step. A write is two, and everything may happen between them.
"""

from collections.abc import Iterator

from kvstore.transfer.states import (
    LEASE_S,
    Abort,
    Accept,
    BeginWrite,
    Ended,
    EndWrite,
    Fail,
    Finish,
    Quiet,
    ReceivingEvent,
    Redeem,
    StopWriter,
    Tick,
    TransferState,
)
from tests.model import blocks
from tests.model.explore import Step, Violation
from tests.model.stepping import EXPIRED, FAILURE, receive
from tests.model.world import (
    BLOCK_BYTES,
    GARBAGE,
    MIXED,
    NO_HASH,
    Asker,
    Blocks,
    Bounds,
    Message,
    Rules,
    Run,
    Signal,
    Ticket,
    World,
    Write,
    hash_of,
    tokens_of,
)

# In which it listens to a run's stream.
_LISTENING = ("asked", "reserving", "receiving", "closing")


class DecodeSide:
    """Steps of the decode workers. Every method that changes something returns the world after it."""

    def __init__(self, bounds: Bounds, rules: Rules) -> None:
        self._bounds = bounds
        self._rules = rules

    # What it does by itself.

    def steps(self, world: World) -> Iterator[tuple[Step, World]]:
        for handoff, asker in enumerate(world.askers):
            match asker.phase:
                case "idle":
                    yield Step("decode asks for hand-off", (handoff,)), self._ask(world, handoff)
                case "reserving":
                    after = self._reserve(world, handoff)
                    if after is not None:
                        yield Step("decode reserves and grants for hand-off", (handoff,)), after
                case "receiving":
                    assert asker.receiving is not None
                    if asker.receiving.ended:
                        yield Step("decode learns how ended hand-off", (handoff,)), self._learn(world, handoff)
                case "closing":
                    assert asker.receiving is not None
                    if asker.receiving.quiet or not self._rules.waits_for_quiet:
                        yield Step("decode closes its transfer of hand-off", (handoff,)), self._closed(world, handoff)
                case "committed":
                    yield Step("decode has generated all of hand-off", (handoff,)), self._end(world, handoff, "done")
        for run in world.runs:
            if run.to_decode and not run.left:
                yield Step("decode hears", (run.to_decode[0], "of hand-off", run.handoff)), self._hear(world, run)
        for write in dict.fromkeys(world.writes):
            yield Step("a write ends:", (write.part,)), self.end_write(world, write, cut=False)

    def _ask(self, world: World, handoff: int) -> World:
        asker = world.askers[handoff]
        pool = self._pool(world, handoff)
        if not asker.block_ids and all(blocks.find(pool, tokens) is not None for tokens in self._tokens(handoff)):
            # All is here: its KV came with another hand-off.
            return self._asker(world, handoff, asker._replace(phase="ended", verdict="done"))
        run = Run(handoff, asker.epoch, world.incarnation, to_prefill=(Signal("start"),))
        world = world._replace(runs=tuple(sorted((*world.runs, run), key=lambda run: run[:2])))
        return self._asker(world, handoff, asker._replace(phase="asked", number=-1))

    def _reserve(self, world: World, handoff: int) -> World | None:
        asker = world.askers[handoff]
        if not asker.block_ids:
            taken = blocks.take(self._pool(world, handoff), (NO_HASH,) * self._bounds.num_blocks, handoff)
            if taken is None:
                return None
            pool, block_ids = taken
            for block_id in block_ids:
                pool = blocks.put(pool, block_id, pool[block_id]._replace(content=GARBAGE))
            world = self._with_pool(world, handoff, pool)
            world = self._asker(world, handoff, asker._replace(block_ids=block_ids))
        return self._grant(world, handoff)

    def _grant(self, world: World, handoff: int) -> World:
        asker = world.askers[handoff]
        number = asker.number + 1
        run = self._run(world, handoff)
        receiving = self._rules.receiving(
            request_id=str(handoff),
            epoch=asker.epoch,
            sender_incarnation=str(run.incarnation),
            block_hashes=tuple(map(hash_of, self._tokens(handoff))),
            block_bytes=BLOCK_BYTES,
            expires_at=LEASE_S,
        )
        if not run.over:
            world = _with_run(world, run._replace(to_prefill=(*run.to_prefill, Signal("grant", number))))
        return self._asker(world, handoff, asker._replace(phase="receiving", number=number, receiving=receiving))

    def _learn(self, world: World, handoff: int) -> World:
        asker = world.askers[handoff]
        receiving = asker.receiving
        assert receiving is not None
        if receiving.state is TransferState.DONE:
            return self._commit(world, handoff)
        assert receiving.failure is not None
        last = asker.number + 1 == len(self._bounds.pulled)
        then = "retry" if last or receiving.failure == EXPIRED else "grant"
        return self._asker(world, handoff, asker._replace(phase="closing", then=then))

    def _commit(self, world: World, handoff: int) -> World:
        asker = world.askers[handoff]
        pool = self._pool(world, handoff)
        for block_id, tokens in zip(asker.block_ids, self._tokens(handoff), strict=True):
            pool = blocks.commit(pool, block_id, tokens, handoff)
        world = self._with_pool(world, handoff, pool)
        run = self._run(world, handoff)
        if not run.over:
            run = run._replace(to_prefill=(*run.to_prefill, Signal("leave")))
        world = _with_run(world, run._replace(to_decode=(), left=True))
        return self._asker(world, handoff, asker._replace(phase="committed", receiving=None))

    def _closed(self, world: World, handoff: int) -> World:
        asker = world.askers[handoff]
        world = self._asker(world, handoff, asker._replace(receiving=None, then=""))
        match asker.then:
            case "grant":
                return self._grant(world, handoff)
            case "retry":
                return self._retry(world, handoff)
            case _:
                return self._end(world, handoff, "cancelled")

    def _retry(self, world: World, handoff: int) -> World:
        """Gives this attempt up; its blocks stay for the next."""
        asker = world.askers[handoff]
        if asker.epoch + 1 == self._bounds.num_attempts:
            return self._end(world, handoff, "failed")
        world = self._leave(world, handoff)
        return self._asker(world, handoff, asker._replace(phase="idle", epoch=asker.epoch + 1, receiving=None))

    def _end(self, world: World, handoff: int, verdict: str) -> World:
        asker = world.askers[handoff]
        world = self._leave(world, handoff)
        pool = blocks.free(self._pool(world, handoff), asker.block_ids, handoff)
        world = self._with_pool(world, handoff, pool)
        return self._asker(world, handoff, Asker("ended", asker.epoch, verdict=verdict))

    def _leave(self, world: World, handoff: int) -> World:
        """Cancels the stream, if it is listened to."""
        asker = world.askers[handoff]
        if asker.phase not in _LISTENING:
            return world
        run = self._run(world, handoff)
        return _with_run(
            world, run._replace(left=True, to_decode=(), to_prefill=() if run.over else (Signal("leave"),))
        )

    def _hear(self, world: World, run: Run) -> World:
        signal = run.to_decode[0]
        world = _with_run(world, run._replace(to_decode=run.to_decode[1:]))
        handoff = run.handoff
        asker = world.askers[handoff]
        match signal.kind:
            case "started":
                return self._asker(world, handoff, asker._replace(phase="reserving"))
            case "failed":
                if asker.receiving is None or signal.number != asker.number:
                    return world
                return self._step(world, handoff, Abort(FAILURE))
            case "complete":
                return world
        assert signal.kind == "over"
        if asker.phase == "receiving":
            world = self._step(world, handoff, Abort(FAILURE))
            return self._asker(world, handoff, world.askers[handoff]._replace(phase="closing", then="retry"))
        if asker.phase == "closing":
            then = "retry" if asker.then == "grant" else asker.then
            return self._asker(world, handoff, asker._replace(then=then))
        return self._retry(world, handoff)

    # What the transports do.

    def deliver(self, world: World, message: Message) -> World:
        """A message of a sender that is not refused for good; it is off the wire already."""
        handoff = message.ticket.handoff
        receiving = world.askers[handoff].receiving
        assert receiving is not None
        if receiving.state is TransferState.EXPECTED and message.kind != "open":
            # Nobody has opened this connection, so what comes on it is nobody's.
            return _nack(world, message.ticket) if message.kind != "close" else world
        world, accepted = self._ask_state(world, handoff, _event_of(message))
        match message.kind:
            case "open":
                return _send(world, Message("ack", message.ticket)) if accepted else _nack(world, message.ticket)
            case "part":
                return self._begin_write(world, message) if accepted else self._refused(world, message.ticket)
            case "finish" if accepted:
                return _send(world, Message("verified", message.ticket))
            case "finish":
                return self._refused(world, message.ticket)
        return world

    def refuses(self, world: World, message: Message) -> bool:
        """Nothing will come of this message, now or later: it is for a transfer that is over."""
        if not self._is_known(world, message.ticket):
            return True
        receiving = world.askers[message.ticket.handoff].receiving
        assert receiving is not None
        return receiving.ended and Accept() not in receive(receiving, _event_of(message))[1]

    def _is_known(self, world: World, ticket: Ticket) -> bool:
        asker = world.askers[ticket.handoff]
        if asker.receiving is None:
            return False
        return not self._rules.checks_ticket or (asker.epoch, asker.number) == (ticket.epoch, ticket.number)

    def _begin_write(self, world: World, part: Message) -> World:
        block_id = world.askers[part.ticket.handoff].block_ids[part.place]
        seen = world.prefill[part.source].content if part.source >= 0 else part.content
        write = Write(part, block_id, seen)
        return self._land(world._replace(writes=tuple(sorted((*world.writes, write)))), write, MIXED)

    def end_write(self, world: World, write: Write, *, cut: bool) -> World:
        """The last bytes land, or, if it is cut short, no more do."""
        part = write.part
        handoff = part.ticket.handoff
        writes = list(world.writes)
        writes.remove(write)
        world = world._replace(writes=tuple(writes))
        content = MIXED
        if not cut:
            now = world.prefill[part.source].content if part.source >= 0 else part.content
            content = now if now == write.seen else MIXED
        world = self._land(world, write, content)
        intact = not cut and (content == part.checksum or not self._rules.checks_checksum)
        if not self._is_known(world, part.ticket):
            return world
        world = self._step(world, handoff, EndWrite(BLOCK_BYTES if intact else 0))
        return world if intact else self._refused(world, part.ticket)

    def _land(self, world: World, write: Write, content: int) -> World:
        ticket = write.part.ticket
        handoff = ticket.handoff
        asker = world.askers[handoff]
        if asker.receiving is None or (asker.epoch, asker.number) != (ticket.epoch, ticket.number):
            raise Violation(
                f"use after free: a write under {ticket} lands in block {write.block_id} of hand-off {handoff}, which "
                f"is at {asker.epoch}/{asker.number} and {asker.phase}"
            )
        pool = blocks.write(self._pool(world, handoff), write.block_id, content, handoff)
        return self._with_pool(world, handoff, pool)

    def _refused(self, world: World, ticket: Ticket) -> World:
        """What a transport does when a part or a finish was refused: its connection is over."""
        return _nack(self._step(world, ticket.handoff, Fail(FAILURE)), ticket)

    # What may happen besides.

    def faults(self, world: World) -> Iterator[tuple[Step, World]]:
        for handoff, asker in enumerate(world.askers):
            if asker.phase != "ended" and asker.then != "end":
                yield Step("the client cancels hand-off", (handoff,)), self._cancel(world, handoff)
            if asker.receiving is not None and not asker.receiving.ended:
                yield Step("the receiver's lease expires in hand-off", (handoff,)), self._step(world, handoff, Tick())
        for worker in range(len(world.decode)):
            yield Step("crash of decode worker", (worker,)), self._crash(world, worker)
        for write in dict.fromkeys(world.writes):
            yield Step("a write is cut short:", (write.part,)), self.end_write(world, write, cut=True)

    def _cancel(self, world: World, handoff: int) -> World:
        asker = world.askers[handoff]
        if asker.phase not in ("receiving", "closing"):
            return self._end(world, handoff, "cancelled")
        world = self._step(world, handoff, Abort(FAILURE))
        return self._asker(world, handoff, world.askers[handoff]._replace(phase="closing", then="end"))

    def _crash(self, world: World, worker: int) -> World:
        """It is back at once, and empty; whoever asked for something asks again, if attempts are left."""
        pool: Blocks = tuple(
            block._replace(holders=(), tokens=NO_HASH, content=GARBAGE) for block in world.decode[worker]
        )
        world = world._replace(decode=(*world.decode[:worker], pool, *world.decode[worker + 1 :]))
        here = [handoff for handoff, home in enumerate(self._bounds.workers) if home == worker]
        world = world._replace(writes=tuple(write for write in world.writes if write.part.ticket.handoff not in here))
        for run in world.runs:
            if run.handoff in here and run.connection is not None:
                world = _nack(world, run.connection)
        for handoff in here:
            world = self._leave(world, handoff)
            asker = world.askers[handoff]
            if asker.phase == "ended":
                continue
            again = asker.phase != "committed" and asker.epoch + 1 < self._bounds.num_attempts
            asker = Asker(epoch=asker.epoch + 1) if again else Asker("ended", asker.epoch, verdict="crashed")
            world = self._asker(world, handoff, asker)
        return world

    # Small parts of the above.

    def _step(self, world: World, handoff: int, event: ReceivingEvent) -> World:
        return self._ask_state(world, handoff, event)[0]

    def _ask_state(self, world: World, handoff: int, event: ReceivingEvent) -> tuple[World, bool]:
        """Steps the transfer and tells whether it accepted the event."""
        asker = world.askers[handoff]
        assert asker.receiving is not None
        receiving, actions = receive(asker.receiving, event)
        if Ended() in actions and asker.receiving.ended:
            raise Violation(f"hand-off {handoff} ends twice under one ticket")
        if asker.receiving.quiet and receiving != asker.receiving:
            raise Violation(f"the transfer of hand-off {handoff} changes after it was quiet")
        if (Quiet() in actions) != (receiving.quiet and not asker.receiving.quiet):
            raise Violation(f"hand-off {handoff} is told that its transfer is quiet when it is not, or not told")
        world = self._asker(world, handoff, asker._replace(receiving=receiving))
        if StopWriter() in actions:
            world = _nack(world, Ticket(handoff, asker.epoch, asker.number))
        return world, Accept() in actions

    def _tokens(self, handoff: int) -> tuple[int, ...]:
        return tokens_of(self._bounds.prompts[handoff], self._bounds.num_blocks)

    def _pool(self, world: World, handoff: int) -> Blocks:
        return world.decode[self._bounds.workers[handoff]]

    def _with_pool(self, world: World, handoff: int, pool: Blocks) -> World:
        worker = self._bounds.workers[handoff]
        return world._replace(decode=(*world.decode[:worker], pool, *world.decode[worker + 1 :]))

    def _asker(self, world: World, handoff: int, asker: Asker) -> World:
        return world._replace(askers=(*world.askers[:handoff], asker, *world.askers[handoff + 1 :]))

    def _run(self, world: World, handoff: int) -> Run:
        """The run that a hand-off listens to."""
        epoch = world.askers[handoff].epoch
        return next(run for run in world.runs if (run.handoff, run.epoch) == (handoff, epoch))


def _with_run(world: World, run: Run) -> World:
    return world._replace(runs=tuple(run if run[:2] == other[:2] else other for other in world.runs))


def _send(world: World, message: Message) -> World:
    return world._replace(messages=(*world.messages, message))


def _nack(world: World, ticket: Ticket) -> World:
    """The connection's receiving end is over; its sender learns that once."""
    nack = Message("nack", ticket)
    return world if nack in world.messages else _send(world, nack)


def _event_of(message: Message) -> ReceivingEvent:
    """What a message of the sender is to the receiver's states."""
    match message.kind:
        case "open":
            return Redeem(message.ticket.epoch, str(message.ticket.handoff), str(message.incarnation))
        case "part":
            return BeginWrite(message.place, message.place + BLOCK_BYTES, hash_of(message.tokens))
        case "finish":
            return Finish(message.num_parts, message.num_parts * BLOCK_BYTES)
    assert message.kind == "close"
    return Fail(FAILURE)
