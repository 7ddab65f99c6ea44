"""Who waits for whom in src/cuda/sm90/forward.cuh and backward.cuh, without a GPU: models of warps.

Scheduler, loader and consumers are coroutines, each step of which another may follow; a consumer of
the forward is two, the warp that speaks for the others and one of these. They have the kernel's
barriers, and shared memory holds names instead of tiles. Random items in random orders of steps:
nobody waits for ever, and every consumer multiplies what it means to, once. A change of a kernel's
barriers begins with this file.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

Step = Iterator[None]
SOON = 3  # tiles of keys that are left to copy when the next item may be taken
WARPS = 2  # of a consumer, of which the first gives back what all have read


class Barrier:
    """An mbarrier in shared memory: `count` arrivals complete a phase."""

    def __init__(self, count: int) -> None:
        self.count, self.arrived, self.phases = count, 0, 0

    def arrive(self) -> None:
        self.arrived += 1
        if self.arrived == self.count:
            self.arrived, self.phases = 0, self.phases + 1

    def wait(self, phase: int) -> Step:
        while self.phases % 2 == phase:
            yield


class Meeting:
    """A named barrier of two: of both consumers, or of the warps of one."""

    def __init__(self) -> None:
        self.barrier, self.phase = Barrier(2), [0, 0]

    def sync(self, index: int) -> Step:
        self.barrier.arrive()
        yield from self.barrier.wait(self.phase[index])
        self.phase[index] ^= 1


@dataclass
class Ring:
    """A PipelineState."""

    stages: int
    stage: int = 0
    phase: int = 0

    def advance(self, count: int = 1) -> None:
        self.stage += count
        if self.stage >= self.stages:
            self.stage, self.phase = self.stage - self.stages, self.phase ^ 1

    def copy(self) -> Ring:
        return Ring(self.stages, self.stage, self.phase)


@dataclass
class Item:
    number: int
    own: list[tuple[int, int]]  # tiles of keys that a consumer's rows see
    begin: int = 0
    end: int = 0
    last: bool = False


@dataclass
class Kernel:
    consumers: int
    stages: int
    slots: int
    q_slots: int
    chained: bool
    counts: bool  # items are taken from a counter
    items: list[Item]
    done: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def barriers(n: int, count: int) -> list[Barrier]:
            return [Barrier(count) for _ in range(n)]

        n = self.consumers
        self.work_full, self.work_soon = barriers(self.slots, 1), barriers(self.slots, 1)
        self.work_empty = barriers(self.slots, WARPS * n + 1)
        self.q_full, self.q_empty = barriers(self.q_slots, 1), barriers(self.q_slots, 1)
        self.k_full, self.v_full = barriers(self.stages, 1), barriers(self.stages, 1)
        self.k_empty, self.v_empty = barriers(self.stages, n), barriers(self.stages, n)
        self.work: list[Item] = [None] * self.slots
        self.q: list = [None] * self.q_slots
        self.k: list = [None] * self.stages
        self.v: list = [None] * self.stages
        self.turn = [c == 0 for c in range(n)]
        self.joined, self.taken, self.passed = [Meeting() for _ in range(n)], [0] * n, [0] * n

    def schedule(self) -> Step:
        at, before = Ring(self.slots), None
        for item in [*self.items, Item(-1, [], last=True)]:
            yield from self.work_empty[at.stage].wait(at.phase ^ 1)
            if self.counts and before is not None:
                yield from self.work_soon[before.stage].wait(before.phase)
            self.work[at.stage] = item
            self.work_full[at.stage].arrive()
            yield
            before = at.copy()
            at.advance()

    def load(self) -> Step:
        item, at, q_at = Ring(self.slots), Ring(self.stages), Ring(self.q_slots)

        def copy(to: list, full: list[Barrier], empty: list[Barrier], n: int) -> Step:
            yield from empty[at.stage].wait(at.phase ^ 1)
            to[at.stage] = "on its way"
            yield
            to[at.stage] = (work.number, n)
            full[at.stage].arrive()

        while True:
            yield from self.work_full[item.stage].wait(item.phase)
            work = self.work[item.stage]
            if work.last:
                return
            n = work.end
            soon = min(n, work.begin + SOON)
            if n == soon:
                self.work_soon[item.stage].arrive()
            n -= 1
            if n >= work.begin:
                yield from copy(self.k, self.k_full, self.k_empty, n)
            for c in range(self.consumers):
                yield from self.q_empty[q_at.stage].wait(q_at.phase ^ 1)
                self.q[q_at.stage] = (work.number, c)
                self.q_full[q_at.stage].arrive()
                q_at.advance()
                yield
            while n >= work.begin:
                yield from copy(self.v, self.v_full, self.v_empty, n)
                at.advance()
                if n == soon:
                    self.work_soon[item.stage].arrive()
                n -= 1
                if n >= work.begin:
                    yield from copy(self.k, self.k_full, self.k_empty, n)
            self.work_empty[item.stage].arrive()
            item.advance()

    def consume(self, index: int, warp: int) -> Step:
        item, k_at, v_at = Ring(self.slots), Ring(self.stages), Ring(self.stages)
        q_at, most_between = Ring(self.q_slots, index), self.stages - 2

        def take_turn() -> Step:
            yield from self.joined[index].sync(warp)
            while not self.turn[index]:
                yield
            self.taken[index] += 1
            if self.taken[index] == WARPS:
                self.taken[index], self.turn[index] = 0, False

        def pass_turn() -> None:
            self.passed[index] += 1
            if self.passed[index] < WARPS:
                return
            self.passed[index], after = 0, (index + 1) % self.consumers
            assert not self.turn[after], "a turn was passed twice"
            self.turn[after] = True

        def product() -> Step:
            """Of all warps together, and complete in all of them."""
            yield from self.joined[index].sync(warp)
            yield

        def release(empty: Barrier) -> None:
            if warp == 0:
                empty.arrive()

        def begin_scores(work: Item, n: int) -> Step:
            yield from self.k_full[k_at.stage].wait(k_at.phase)
            yield from take_turn()
            assert self.k[k_at.stage] == (work.number, n)
            assert self.q[q_at.stage] == (work.number, index)

        def end_scores() -> None:
            release(self.k_empty[k_at.stage])
            k_at.advance()

        def end_queries() -> None:
            release(self.q_empty[q_at.stage])
            q_at.advance(self.consumers)

        def begin_out(work: Item, n: int) -> Step:
            yield from self.v_full[v_at.stage].wait(v_at.phase)
            assert self.v[v_at.stage] == (work.number, n)

        def end_out() -> None:
            release(self.v_empty[v_at.stage])
            v_at.advance()

        def skip_keys() -> Step:
            yield from self.k_full[k_at.stage].wait(k_at.phase)
            yield from take_turn()
            pass_turn()
            end_scores()

        def skip_values() -> Step:
            yield from self.v_full[v_at.stage].wait(v_at.phase)
            yield from self.joined[index].sync(warp)
            end_out()

        def skip(count: int) -> Step:
            for _ in range(count):
                yield from skip_keys()
                yield from skip_values()

        def step(of: Item, n: int, before: Item, m: int, between: int = 0) -> Step:
            """Scores of tile n under way with the output of tile m."""
            yield from begin_scores(of, n)
            yield from begin_out(before, m)
            pass_turn()
            yield from product()
            end_scores()
            if n == of.own[index][0]:
                end_queries()
            yield from product()
            end_out()
            seen.append(m)
            for _ in range(between):
                yield from skip_values()

        def leave(stage: int) -> None:
            self.done[self.work[stage].number, index, warp] = seen.copy()
            seen.clear()
            self.work_empty[stage].arrive()

        def attend() -> Step:
            work = self.work[item.stage]
            begin, n = work.own[index][0], work.own[index][1] - 1
            yield from begin_scores(work, n)
            pass_turn()
            yield from product()
            end_scores()
            if n == begin:
                end_queries()
            while True:
                for m in range(n, begin, -1):
                    yield from step(work, m - 1, work, m)
                n, between = begin, begin - work.begin
                if not self.chained or between > most_between:
                    break
                after = item.copy()
                after.advance()
                yield from self.work_full[after.stage].wait(after.phase)
                then = self.work[after.stage]
                if then.last or then.own[index][0] >= then.own[index][1]:
                    break
                between += then.end - then.own[index][1]
                if between > most_between:
                    break
                for _ in range(between):
                    yield from skip_keys()
                yield from self.q_full[q_at.stage].wait(q_at.phase)
                left = item.stage
                item.stage, item.phase = after.stage, after.phase
                yield from step(then, then.own[index][1] - 1, work, n, between)
                leave(left)
                work, begin, n = then, then.own[index][0], then.own[index][1] - 1
            yield from begin_out(work, n)
            yield from product()
            end_out()
            seen.append(n)
            yield from skip(begin - work.begin)

        seen: list[int] = []
        yield from self.work_full[item.stage].wait(item.phase)
        while not self.work[item.stage].last:
            work = self.work[item.stage]
            yield from self.q_full[q_at.stage].wait(q_at.phase)
            yield from skip(work.end - work.own[index][1])
            if work.own[index][0] < work.own[index][1]:
                yield from attend()
            else:
                yield from self.joined[index].sync(warp)
                end_queries()
            leave(item.stage)
            item.advance()
            yield from self.work_full[item.stage].wait(item.phase)

    def run(self, order: random.Random) -> None:
        consumers = [(c, warp) for c in range(self.consumers) for warp in range(WARPS)]
        warps = [self.schedule(), self.load(), *(self.consume(*which) for which in consumers)]
        run_all(warps, order, self.items)


def run_all(warps: list[Step], order: random.Random, what: list) -> None:
    speeds = [order.choice((1, 1, 5, 20)) for _ in warps]
    alive = list(range(len(warps)))
    for _ in range(200_000):
        if not alive:
            return
        warp = order.choices(alive, [speeds[w] for w in alive])[0]
        if next(warps[warp], warp) is not None:
            alive.remove(warp)
    pytest.fail(f"they wait for each other: {what}")


def random_items(draw: random.Random, consumers: int, mask: str) -> list[Item]:
    items = []
    some = 0.4 if mask == "padding" else 1.0  # of the items, whose rows see keys
    for number in range(draw.randint(1, 14)):
        own = []
        for _ in range(consumers):
            if draw.random() > some:
                own.append((0, 0))
                continue
            begin = {"causal": 0, "padding": 0, "documents": draw.choice((0, 0, 1, 5))}.get(
                mask, draw.randint(0, 6)
            )
            own.append((begin, begin + draw.randint(mask == "causal", 6)))
        seen = [tiles for tiles in own if tiles[0] < tiles[1]]
        first, end = min((b for b, _ in seen), default=0), max((e for _, e in seen), default=0)
        own = [tiles if tiles in seen else (first, first) for tiles in own]
        items.append(Item(number, own, first, end))
    return items


@pytest.mark.parametrize("mask", ["causal", "documents", "padding", "any"])
@pytest.mark.parametrize(
    ("consumers", "stages", "slots", "q_slots", "chained"),
    [
        (3, 3, 3, 3, True),
        (2, 2, 3, 2, True),
        (2, 2, 3, 2, False),
        (2, 2, 2, 2, False),
        (2, 2, 2, 3, False),
    ],
)
def test_nobody_waits_for_ever(consumers, stages, slots, q_slots, chained, mask) -> None:
    for seed in range(40):
        draw = random.Random(seed)
        items = random_items(draw, consumers, mask)
        counts = draw.random() < 0.7
        kernel = Kernel(consumers, stages, slots, q_slots, chained, counts, items)
        kernel.run(draw)
        assert kernel.done == {
            (item.number, c, warp): list(range(end - 1, begin - 1, -1))
            for item in items
            for c, (begin, end) in enumerate(item.own)
            for warp in range(WARPS)
        }


# ---- backward ----


class Backward:
    """One CTA; of every item whether rows of its steps' tiles are cleared by consumers."""

    SOON = 4

    def __init__(self, items: list[list[bool]], by_keys: bool, together: bool) -> None:
        self.items, self.by_keys, self.together = items, by_keys, together
        for name, count in (("q_full", 1), ("q_empty", 2), ("dout_full", 1), ("dout_empty", 2)):
            setattr(self, name, [Barrier(count) for _ in range(2)])
        for name, count in (("item_full", 1), ("item_soon", 1), ("item_empty", 3)):
            setattr(self, name, [Barrier(count) for _ in range(2)])
        for name in ("sums_full", "sums_empty"):  # of a consumer
            setattr(self, name, [Barrier(1) for _ in range(2)])
        self.keys_full, self.keys_empty = Barrier(1), Barrier(1)
        self.item, self.visits, self.q, self.dout, self.sums = ([None] * 2 for _ in range(5))
        self.keys = None
        self.weights, self.ds = ([[None, None] for _ in range(2)] for _ in range(2))
        self.joined, self.cleared = Meeting(), Meeting()
        self.leaving = 0  # copies of dk and dv that still read shared memory, where dS stands
        self.done: list[list[list[int]]] = [[], []]
        self.added: list[list[tuple[int, int]]] = [[], []]
        self.left: list[tuple[str, int]] = []

    def schedule(self) -> Step:
        at, keys = Ring(2), Ring(1)

        def bring_keys(number: int) -> Step:
            yield from self.keys_empty.wait(keys.phase ^ 1)
            keys.advance()
            self.keys = "on their way"
            yield
            self.keys = number
            self.keys_full.arrive()

        for number in range(len(self.items) + 1):
            last = number == len(self.items)
            yield from self.item_empty[at.stage].wait(at.phase ^ 1)
            if number == 0 and not last:
                yield from bring_keys(number)
            self.item[at.stage] = None if last else number
            self.item_full[at.stage].arrive()
            yield
            if last:
                return
            if number > 0:
                yield from bring_keys(number)
            yield from self.item_soon[at.stage].wait(at.phase)
            at.advance()

    def load(self) -> Step:
        item, at = Ring(2), Ring(2)
        while True:
            yield from self.item_full[item.stage].wait(item.phase)
            number = self.item[item.stage]
            if number is None:
                return
            ragged, told = self.items[number], False
            for step in range(len(ragged)):
                if not told and step + self.SOON >= len(ragged):
                    self.item_soon[item.stage].arrive()
                    told = True
                yield from self.dout_empty[at.stage].wait(at.phase ^ 1)
                self.dout[at.stage] = (number, step, not ragged[step])
                yield
                self.dout_full[at.stage].arrive()
                yield from self.q_empty[at.stage].wait(at.phase ^ 1)
                self.q[at.stage] = (number, step, not ragged[step])
                self.visits[at.stage] = (number, step)
                yield
                self.q_full[at.stage].arrive()
                at.advance()
            if not told:
                self.item_soon[item.stage].arrive()
            self.item_empty[item.stage].arrive()
            item.advance()

    def add(self, index: int) -> Step:
        at = Ring(1)
        while True:
            yield from self.sums_full[index].wait(at.phase)
            if self.sums[index] is None:
                return
            self.added[index].append(self.sums[index])
            yield
            self.sums[index] = "gone"
            self.sums_empty[index].arrive()
            at.advance()

    def consume(self, index: int) -> Step:
        item, keys, at, sums = Ring(2), Ring(1), Ring(2), Ring(1)

        def put(what: tuple[int, int] | None) -> Step:
            yield from self.sums_empty[index].wait(sums.phase ^ 1)
            assert self.sums[index] in (None, "gone")
            self.sums[index] = what
            self.sums_full[index].arrive()
            sums.advance()
            yield

        def clear_missing(at: Ring) -> Step:
            number, step = self.visits[at.stage]
            if self.items[number][step]:
                yield from self.dout_full[at.stage].wait(at.phase)
                (self.q, self.dout)[index][at.stage] = (number, step, True)
                yield from self.cleared.sync(index)

        def begin_scores(at: Ring) -> Step:
            yield from self.q_full[at.stage].wait(at.phase)
            assert self.q[at.stage][:2] == self.visits[at.stage]
            yield from clear_missing(at)

        def visit(number: int, step: int, last: bool) -> Step:
            there, now = (number, step, True), (number, step)
            yield from self.dout_full[at.stage].wait(at.phase)
            if self.by_keys:
                yield from begin_scores(at)
            assert self.visits[at.stage] == now
            assert self.dout[at.stage] == there
            assert self.keys == number
            yield
            assert not self.leaving
            if not self.by_keys:
                self.weights[at.stage][index] = now
                yield from self.joined.sync(index)
            self.ds[at.stage][index] = now
            yield from self.joined.sync(index)
            assert self.ds[at.stage] == [now, now]
            yield
            if self.by_keys:
                self.dout_empty[at.stage].arrive()
                yield from put(now)
            elif not last:
                after = at.copy()
                after.advance()
                yield from begin_scores(after)
            # dV and dQ are complete here at the latest, and then dK.
            if not self.by_keys:
                self.added[index].append(now)
                assert self.weights[at.stage] == [now, now]
                assert self.dout[at.stage] == there
                self.dout_empty[at.stage].arrive()
                yield
            assert self.ds[at.stage] == [now, now]
            assert self.q[at.stage] == there
            self.q_empty[at.stage].arrive()
            at.advance()
            yield

        def store(number: int) -> Step:
            for tiles in [["dv", "dk"]] if self.together else [["dv"], ["dk"]]:
                if tiles == ["dk"]:
                    if index == 0:
                        self.leaving = 0
                    yield from self.joined.sync(index)
                assert not self.leaving
                for stage in range(2):
                    self.ds[stage][index] = self.weights[stage][index] = (number, tiles)
                yield from self.joined.sync(index)
                if index == 0:
                    assert self.ds[0] == [(number, tiles)] * 2
                    self.left += [(tile, number) for tile in tiles]
                    self.leaving += len(tiles)
                yield

        while True:
            if index == 0:
                self.leaving = 0
            yield from self.joined.sync(index)
            yield from self.item_full[item.stage].wait(item.phase)
            number = self.item[item.stage]
            if number is None:
                break
            yield from self.keys_full.wait(keys.phase)
            steps = len(self.items[number])
            if not self.by_keys and steps > 0:
                yield from begin_scores(at)
            for step in range(steps):
                yield from visit(number, step, step == steps - 1)
            self.done[index].append(list(range(steps)))
            assert self.keys == number
            yield from self.joined.sync(index)
            if index == 0:
                self.keys_empty.arrive()
            yield from store(number)
            assert self.item[item.stage] == number
            self.item_empty[item.stage].arrive()
            item.advance()
            keys.advance()
        if self.by_keys:
            yield from put(None)

    def run(self, order: random.Random) -> None:
        warps = [self.schedule(), self.load(), self.consume(0), self.consume(1)]
        if self.by_keys:
            warps += [self.add(0), self.add(1)]
        run_all(warps, order, self.items)


@pytest.mark.parametrize(("by_keys", "together"), [(True, True), (True, False), (False, False)])
def test_nobody_waits_for_ever_in_the_backward(by_keys: bool, together: bool) -> None:
    for seed in range(200):
        draw = random.Random(seed)
        items = [
            [draw.random() < 0.2 for _ in range(draw.randint(0, 7))]
            for _ in range(draw.randint(0, 6))
        ]
        kernel = Backward(items, by_keys, together)
        kernel.run(draw)
        assert kernel.done == [[list(range(len(item))) for item in items]] * 2
        steps = [(i, step) for i, item in enumerate(items) for step in range(len(item))]
        assert kernel.added == [steps] * 2
        assert kernel.left == [(x, i) for i in range(len(items)) for x in ("dv", "dk")]
