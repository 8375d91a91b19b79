"""The prefill side of the model: what prefill/worker.py, transfer/shipment.py and the sending transports do."""

from collections.abc import Iterator

from kvstore.transfer.states import (
    LEASE_S,
    Abandon,
    Close,
    Done,
    Failed,
    FinishSending,
    Granted,
    Open,
    Ready,
    Release,
    Send,
    SendingEvent,
    SendingState,
    TellFailed,
    Tick,
)
from tests.model import blocks
from tests.model.explore import Step, Violation
from tests.model.stepping import FAILURE, send
from tests.model.world import GARBAGE, NO_HASH, Bounds, Message, Rules, Run, Signal, Ticket, Work, World, tokens_of


class PrefillSide:
    """Steps of the one prefill worker. Every method that changes something returns the world after it."""

    def __init__(self, bounds: Bounds, rules: Rules) -> None:
        self._bounds = bounds
        self._rules = rules

    # What it does by itself.

    def steps(self, world: World) -> Iterator[tuple[Step, World]]:
        for run in world.runs:
            if run.to_prefill:
                yield Step("prefill hears", (run.to_prefill[0], "of", run.handoff, run.epoch)), self._hear(world, run)
            if run.sending is not None and not run.sending.ended:
                if not run.block_ids:
                    scheduled = self._schedule(world, run)
                    if scheduled is not None:
                        yield Step("prefill schedules", (run.handoff, run.epoch)), scheduled
                elif run.num_computed < self._bounds.num_blocks:
                    yield Step("prefill computes a block of", (run.handoff, run.epoch)), self._compute(world, run)
            if run.work is not None:
                if run.work.kind == "send" and run.work.next < run.work.end and not run.work.outcome:
                    yield Step("prefill sends a part of", (run.handoff, run.epoch)), self._send_part(world, run)
                if run.work.outcome or run.work.closing:
                    step = Step("prefill is done with", (run.work.kind, "of", run.handoff, run.epoch))
                    yield step, self._report(world, run)

    def _hear(self, world: World, run: Run) -> World:
        signal = run.to_prefill[0]
        run = run._replace(to_prefill=run.to_prefill[1:])
        match signal.kind:
            case "start":
                return _with_run(world, run._replace(sending=self._rules.sending(expires_at=LEASE_S)))
            case "grant":
                return self._step(world, run, Granted(signal.number))
        assert signal.kind == "leave"
        if run.sending is None:
            return _with_run(world, run._replace(over=True))
        return self._step(world, run, Abandon(FAILURE))

    def _schedule(self, world: World, run: Run) -> World | None:
        taken = blocks.take(world.prefill, self._tokens(run), run.holder)
        if taken is None:
            return None
        pool, block_ids = taken
        return _with_run(world._replace(prefill=pool), run._replace(block_ids=block_ids))

    def _compute(self, world: World, run: Run) -> World:
        index = run.num_computed
        block_id, tokens = run.block_ids[index], self._tokens(run)[index]
        pool = world.prefill
        if pool[block_id].tokens != tokens:
            pool = blocks.write(pool, block_id, tokens, run.holder)
            pool = blocks.commit(pool, block_id, tokens, run.holder)
        if not index:
            run = _tell(run, Signal("started"))
        run = run._replace(num_computed=index + 1)
        return self._step(world._replace(prefill=pool), run, Ready(index + 1, index + 1 == self._bounds.num_blocks))

    def _send_part(self, world: World, run: Run) -> World:
        work = run.work
        assert work is not None
        assert run.connection is not None
        index = work.next
        block_id = run.block_ids[index]
        block = world.prefill[block_id]
        if run.holder not in block.holders:
            raise Violation(f"use after free: {run.holder} reads block {block_id}, which is held by {block.holders}")
        part = Message(
            "part", run.connection, place=index, tokens=self._tokens(run)[index], checksum=block.content,
            content=block.content,
        )  # fmt: skip
        if self._bounds.pulled[run.connection.number]:
            part = part._replace(content=GARBAGE, source=block_id)
        work = work._replace(next=index + 1)
        if work.next == work.end and not work.closing:
            work = work._replace(outcome=work.outcome or "done")
        return _with_run(_send(world, part), run._replace(work=work))

    def _report(self, world: World, run: Run) -> World:
        work, sending = run.work, run.sending
        assert work is not None
        assert sending is not None
        succeeded = work.outcome == "done"
        if not succeeded or not sending.goes_on:
            if run.connection is not None and not (succeeded and work.kind == "finish"):
                world = _send(world, Message("close", run.connection))
            run = run._replace(connection=None)
        return self._step(world, run._replace(work=None), Done() if succeeded else Failed(FAILURE))

    # What the transports do.

    def hears(self, world: World, message: Message) -> bool:
        """The sender looks at what comes on its connection now."""
        run = self._connected(world, message.ticket)
        return run is not None and run.work is not None and not run.work.outcome and not run.work.closing

    def is_dead(self, world: World, ticket: Ticket) -> bool:
        """The sender has closed this connection."""
        return self._connected(world, ticket) is None

    def deliver(self, world: World, message: Message) -> World:
        """A message of the receiver; it is off the wire already."""
        run = self._connected(world, message.ticket)
        assert run is not None
        work = run.work
        assert work is not None
        match message.kind, work.kind:
            case ("ack", "open") | ("verified", "finish"):
                work = work._replace(outcome="done")
            case ("nack", _):
                work = work._replace(outcome="failed")
        return _with_run(world, run._replace(work=work))

    # What may happen besides.

    def faults(self, world: World) -> Iterator[tuple[Step, World]]:
        for run in world.runs:
            if run.sending is not None and not run.sending.ended:
                expired = self._step(world, run, Tick())
                yield Step("the sender's lease expires in", (run.handoff, run.epoch)), expired
            if not run.left and not run.over:
                broken = run._replace(to_prefill=(Signal("leave"),), to_decode=(Signal("over"),))
                yield Step("the control stream breaks of", (run.handoff, run.epoch)), _with_run(world, broken)
            if run.connection is not None:
                step = Step("the data connection breaks of", (run.handoff, run.epoch))
                yield step, break_connection(world, run.connection)
        yield Step("crash of the prefill worker"), self._crash(world)

    def _crash(self, world: World) -> World:
        """It is back at once, and empty. What is to be pulled from its memory is read as it was at the end."""
        memory = [block.content for block in world.prefill]

        def frozen(part: Message) -> Message:
            return part._replace(content=memory[part.source], source=-1) if part.source >= 0 else part

        messages = [frozen(message) for message in world.messages]
        messages += [Message("close", run.connection) for run in world.runs if run.connection is not None]
        runs = [
            run._replace(
                sending=None, block_ids=(), work=None, connection=None, to_prefill=(), over=True,
                to_decode=() if run.left else (*run.to_decode, Signal("over")),
            ) if not run.over else run
            for run in world.runs
        ]  # fmt: skip
        return world._replace(
            incarnation=world.incarnation + 1,
            prefill=tuple(block._replace(holders=(), tokens=NO_HASH, content=GARBAGE) for block in world.prefill),
            runs=tuple(runs),
            messages=tuple(messages),
            writes=tuple(write._replace(part=frozen(write.part)) for write in world.writes),
        )

    # Small parts of the above.

    def _step(self, world: World, run: Run, event: SendingEvent) -> World:
        assert run.sending is not None
        sending, actions = send(run.sending, event)
        run = run._replace(sending=sending)
        for action in actions:
            match action:
                case Open():
                    ticket = Ticket(run.handoff, run.epoch, action.grant)
                    world = _send(world, Message("open", ticket, incarnation=run.incarnation))
                    run = run._replace(connection=ticket, work=Work("open"))
                case Send():
                    run = run._replace(work=Work("send", action.first, action.end))
                case FinishSending():
                    assert run.connection is not None
                    world = _send(world, Message("finish", run.connection, num_parts=sending.num_sent))
                    run = run._replace(work=Work("finish"))
                case Close():
                    if run.work is None:
                        run = run._replace(work=Work("give up", outcome="failed"))
                    elif not run.work.outcome:
                        run = run._replace(work=run.work._replace(closing=True))
                case TellFailed():
                    run = _tell(run, Signal("failed", action.grant))
                case Release():
                    world = world._replace(prefill=blocks.free(world.prefill, run.block_ids, run.holder))
                    run = _tell(run, Signal("complete" if sending.state is SendingState.DONE else "over"))
                    run = run._replace(over=True, to_prefill=())
        return _with_run(world, run)

    def _tokens(self, run: Run) -> tuple[int, ...]:
        return tokens_of(self._bounds.prompts[run.handoff], self._bounds.num_blocks)

    def _connected(self, world: World, ticket: Ticket) -> Run | None:
        return next((run for run in world.runs if run.connection == ticket), None)


def break_connection(world: World, ticket: Ticket) -> World:
    """Both ends learn of it, each in its time; what is on its way may arrive first."""
    ends = [message for message in (Message("close", ticket), Message("nack", ticket)) if message not in world.messages]
    return world._replace(messages=(*world.messages, *ends))


def _tell(run: Run, signal: Signal) -> Run:
    return run if run.left else run._replace(to_decode=(*run.to_decode, signal))


def _send(world: World, message: Message) -> World:
    return world._replace(messages=(*world.messages, message))


def _with_run(world: World, run: Run) -> World:
    return world._replace(runs=tuple(run if run[:2] == other[:2] else other for other in world.runs))
