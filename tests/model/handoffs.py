"""The model: hand-offs of KV from one prefill worker to decode workers, over channels that misbehave.

The real step functions of kvstore/transfer/states.py, and around them, as values, the shells that call them. Who may
do what in which order is the explorer's choice:

- A data connection may keep a message for any time, and change their order. As a fault it may lose or double one.
- A control stream keeps the order. As a fault it may break.
- A write begins, and ends; a sender reads block after block; a worker that was told to stop goes on until it has.
- As faults, a client cancels, a lease expires although both sides live, a worker crashes and is back, empty.

A message that is lost takes its connection with it: both ends learn that, each in its time.
"""

from collections.abc import Iterator

from tests.model.decode_side import DecodeSide
from tests.model.explore import Step, Violation
from tests.model.prefill_side import PrefillSide, break_connection
from tests.model.world import Asker, Block, Bounds, Message, Rules, World


class Handoffs:
    """Implements explore.Model."""

    def __init__(self, bounds: Bounds, rules: Rules | None = None) -> None:
        self._bounds = bounds
        rules = rules or Rules()
        self._prefill = PrefillSide(bounds, rules)
        self._decode = DecodeSide(bounds, rules)

    def start(self) -> World:
        bounds = self._bounds
        return World(
            faults_left=bounds.num_faults,
            incarnation=0,
            prefill=(Block(),) * bounds.prefill_blocks,
            decode=((Block(),) * bounds.decode_blocks,) * (max(bounds.workers) + 1),
            askers=(Asker(),) * len(bounds.prompts),
        )

    def steps(self, world: World) -> Iterator[tuple[Step, World]]:
        for side in (self._prefill, self._decode):
            for step, after in side.steps(world):
                yield step, self._settled(after)
        for message in dict.fromkeys(world.messages):
            if not message.to_sender:
                after = self._decode.deliver(_without(world, message), message)
                yield Step("decode receives", (message,)), self._settled(after)
            elif self._prefill.hears(world, message):
                after = self._prefill.deliver(_without(world, message), message)
                yield Step("prefill receives", (message,)), self._settled(after)

    def faults(self, world: World) -> Iterator[tuple[Step, World]]:
        if not world.faults_left:
            return
        world = world._replace(faults_left=world.faults_left - 1)
        for side in (self._prefill, self._decode):
            for step, after in side.faults(world):
                yield step, self._settled(after)
        for message in dict.fromkeys(world.messages):
            # These say that a connection is over, which cannot get lost.
            if message.kind not in ("close", "nack"):
                lost = break_connection(_without(world, message), message.ticket)
                yield Step("lost:", (message,)), self._settled(lost)
                doubled = world._replace(messages=(*world.messages, message))
                yield Step("doubled:", (message,)), self._settled(doubled)

    def check_quiet(self, world: World) -> None:
        for handoff, asker in enumerate(world.askers):
            if not asker.verdict:
                raise Violation(f"hand-off {handoff} waits for ever: it is {asker.phase}")
        if world.runs or world.messages or world.writes:
            raise Violation(f"something is left over: {world.runs} {world.messages} {world.writes}")
        for pool in (world.prefill, *world.decode):
            if any(block.holders for block in pool):
                raise Violation(f"leaked blocks: {pool}")

    def _settled(self, world: World) -> World:
        """The same, in the form in which worlds are compared: without what can make no difference any more."""
        messages: list[Message] = []
        for message in world.messages:
            heard = not self._prefill.is_dead(world, message.ticket)
            if message.to_sender:
                kept = heard
            elif self._decode.refuses(world, message):
                # For good: all that comes of it, now or later, is that the sender learns it.
                kept, message = heard and message.kind != "close", Message("nack", message.ticket)
            else:
                kept = True
            if kept and (message.kind not in ("nack", "close") or message not in messages):
                messages.append(message)
        runs = tuple(run for run in world.runs if not (run.left and run.over and run.work is None))
        return world._replace(runs=runs, messages=tuple(sorted(messages)))


def _without(world: World, message: Message) -> World:
    messages = list(world.messages)
    messages.remove(message)
    return world._replace(messages=tuple(messages))
