"""Who does what: warps inside a tile, and two warpgroups that take turns.

Inside one processor of a GPU, four to eight warps share a tile. Q, K and V lie in shared memory,
which every warp can read; results of its products a warp holds in its own registers. Section 3.3 of
FlashAttention-2 (Dao, 2023, arXiv:2307.08691) asks how to divide the tile:

    split-K (FlashAttention-1)  each of W warps takes 1/W of the keys, and all queries. Each gets a
                                part of every row's softmax and of every row of O. The parts must be
                                written to shared memory, waited for, read and added.
    split-Q (FlashAttention-2)  each warp takes 1/W of the queries, and all keys. Rows are whole
                                within a warp. Nothing is exchanged and nobody waits.

It is not free: under split-Q each warp reads all of K and V, W times in total, where split-K read
them once. The exchange of split-K costs more whenever the tile has more queries than keys, and it
stops all warps three times a tile. This rung runs both on real numbers and counts each read, each
write and each stop.

FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608) looks at what is busy when. A tile alternates
between two units: tensor cores for S = Q K^T and P V, and the special-function unit for exp. On an
H100 the tensor cores do 4096 FLOP a cycle on each processor and the other unit 16 exponentials
(section 3.1 gives 989 and 3.9 TFLOP/s). For a tile of 128 x 128 with d = 128 that is

    2 x 128 x 128 x 128 / 4096 = 1024 cycles for each product,    128 x 128 / 16 = 1024 for the exp.

One warpgroup in a row leaves the tensor cores idle for a third of the time. Two warpgroups take
turns (ping-pong scheduling): while one computes its softmax, the other has the tensor cores. Within
a warpgroup too, the next S can be computed before the present P is used (Algorithm 2 of that
paper). Its authors measured 570 TFLOP/s without ping-pong and 620 to 640 with it.

The schedules below are simulated with the costs above and no others: no loads, no barriers, no
maxima or sums. They show the bound, which no kernel reaches. The tiles are real: the steps are
executed in the order in which the timeline starts them, and the result is compared with float64.

Next: look at ``tilewise.backends``. The same named steps are written there for every device, with
every mask, and with gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from ...testing.cases import Call, Case
from ..rung import Check, Cost, Findings, compare, seconds
from .memory import Memory, blocks

WARPS = 4
BLOCK_Q, BLOCK_KV, D = 128, 64, 64
TILES = 2
PRODUCT, EXP = 1024, 1024
"""Cycles of one product and of one tile's exponentials on an H100, as computed above."""
COLUMN = 512
"""Cycles that one character of the timeline stands for."""


def split_q(shared: Memory) -> int:
    """Each warp its own rows: reads q ``[Br, d]``, k and v ``[N, d]``; leaves out. No stops."""
    n, d = shared.arrays["k"].shape
    for rows in blocks(BLOCK_Q, BLOCK_Q // WARPS):
        q = shared.load("q", rows)  # once; it stays in registers
        m, l = torch.full((len(q),), -torch.inf), torch.zeros(len(q))  # noqa: E741
        out = torch.zeros(len(q), d)
        for keys in blocks(n, BLOCK_KV):
            s = q @ shared.load("k", keys).T / sqrt(d)
            m_new = torch.maximum(m, s.amax(1))
            p, shrink = (s - m_new[:, None]).exp(), (m - m_new).exp()
            m, l = m_new, l * shrink + p.sum(1)  # noqa: E741
            out = out * shrink[:, None] + p @ shared.load("v", keys)
        shared.arrays["out"][rows] = out / l[:, None]  # to HBM, not counted here
    return 0


def split_k(shared: Memory) -> int:
    """Each warp its own keys: as ``split_q``, but returns how often all warps had to stop."""
    n, d = shared.arrays["k"].shape
    for name, width in (("maxima", 1), ("sums", 1), ("parts", d)):
        shared.allocate(name, WARPS * BLOCK_Q, width)
    of_warp = blocks(WARPS * BLOCK_Q, BLOCK_Q)
    q = [shared.load("q") for _ in range(WARPS)]  # each warp holds all queries
    m, l = torch.full((BLOCK_Q, 1), -torch.inf), torch.zeros(BLOCK_Q, 1)  # noqa: E741
    out, stops = torch.zeros(BLOCK_Q, d), 0
    for tile in blocks(n, BLOCK_KV):
        mine = [
            slice(tile.start + part.start, tile.start + part.stop)
            for part in blocks(tile.stop - tile.start, BLOCK_KV // WARPS)
        ]
        s = [q[w] @ shared.load("k", mine[w]).T / sqrt(d) for w in range(WARPS)]
        for w in range(WARPS):
            shared.store("maxima", s[w].amax(1, keepdim=True), of_warp[w])
        stops += 1  # no warp may go on before every maximum is there
        for w in range(WARPS):  # every warp needs the maximum over all of them
            maxima = shared.load("maxima").view(WARPS, BLOCK_Q, 1)
            p = (s[w] - torch.maximum(m, maxima.amax(0))).exp()
            shared.store("sums", p.sum(1, keepdim=True), of_warp[w])
            shared.store("parts", p @ shared.load("v", mine[w]), of_warp[w])
        stops += 1  # nor add before every part is there
        m_new = torch.maximum(m, maxima.amax(0))
        shrink = (m - m_new).exp()
        l = l * shrink + shared.load("sums").view(WARPS, BLOCK_Q, 1).sum(0)  # noqa: E741
        out = out * shrink + shared.load("parts").view(WARPS, BLOCK_Q, d).sum(0)
        m = m_new
        stops += 1  # nor overwrite them before they were read
    shared.arrays["out"][:] = out / l
    return stops


@dataclass(frozen=True)
class Task:
    """One step of one warpgroup: ``S`` (product), ``e`` (exp) or ``O`` (product) of a tile."""

    group: int
    kind: str
    tile: int
    start: int = 0

    @property
    def unit(self) -> str:
        """The unit that it occupies."""
        return "exp" if self.kind == "e" else "tensor cores"

    @property
    def stop(self) -> int:
        """The cycle in which it ends."""
        return self.start + (EXP if self.kind == "e" else PRODUCT)


def in_turn(tiles: int) -> list[str]:
    """A warpgroup's order: S0 e0 O0 S1 e1 O1 ..."""
    return [f"{kind}{j}" for j in range(tiles) for kind in "SeO"]


def pipelined(tiles: int) -> list[str]:
    """Algorithm 2 of FlashAttention-3: S of the next tile before O of this one."""
    order = ["S0"]
    for j in range(tiles):
        order += [f"e{j}", f"S{j + 1}", f"O{j}"] if j + 1 < tiles else [f"e{j}", f"O{j}"]
    return order


def schedule(orders: list[list[str]], asynchronous: bool = False) -> list[Task]:
    """When each step starts, every unit serving one step at a time.

    A step starts when its inputs and its unit are ready: S needs nothing, e its S, O its e. Without
    ``asynchronous`` products a warpgroup also waits for its previous step. Of the steps that could
    start, the earliest does; of equals, the warpgroup whose turn it is.
    """
    done: dict[tuple[int, str], int] = {}
    unit_free = {"exp": 0, "tensor cores": 0}
    waiting = [list(order) for order in orders]
    started: list[Task] = []
    while any(waiting):
        ready = []
        for group, order in enumerate(waiting):
            if order:
                kind, tile = order[0][0], int(order[0][1:])
                task = Task(group, kind, tile)
                needs = {"S": None, "e": f"S{tile}", "O": f"e{tile}"}[kind]
                at = unit_free[task.unit]
                if needs is not None:
                    at = max(at, done[group, needs])
                previous = [t for t in started if t.group == group]
                if previous and not asynchronous:
                    at = max(at, previous[-1].stop)
                ready.append(Task(group, kind, tile, at))
        last = started[-1].group if started else -1
        task = min(ready, key=lambda t: (t.start, (t.group - last - 1) % len(orders)))
        waiting[task.group].pop(0)
        started.append(task)
        unit_free[task.unit] = done[task.group, f"{task.kind}{task.tile}"] = task.stop
    return sorted(started, key=lambda t: (t.start, t.kind == "e"))


def execute(tasks: list[Task], q: Tensor, k: Tensor, v: Tensor, block_kv: int) -> Tensor:
    """Do the steps on real tiles in the order of the timeline; warpgroups split the queries."""
    groups = q.chunk(1 + max(task.group for task in tasks))
    keys = blocks(len(k), block_kv)
    m = [torch.full((len(part), 1), -torch.inf) for part in groups]
    l = [torch.zeros(len(part), 1) for part in groups]  # noqa: E741
    out = [torch.zeros(len(part), v.shape[1]) for part in groups]
    tiles: dict[tuple[int, int], Tensor] = {}
    shrink: dict[tuple[int, int], Tensor] = {}
    for task in tasks:
        g, at = task.group, (task.group, task.tile)
        if task.kind == "S":
            tiles[at] = groups[g] @ k[keys[task.tile]].T / sqrt(q.shape[1])
        elif task.kind == "e":
            m_new = torch.maximum(m[g], tiles[at].amax(1, keepdim=True))
            tiles[at] = (tiles[at] - m_new).exp()
            shrink[at] = (m[g] - m_new).exp()
            l[g] = l[g] * shrink[at] + tiles[at].sum(1, keepdim=True)
            m[g] = m_new
        else:
            out[g] = out[g] * shrink.pop(at) + tiles.pop(at) @ v[keys[task.tile]]
    return torch.cat([part / total for part, total in zip(out, l, strict=True)])


def picture(tasks: list[Task]) -> Iterator[str]:
    """The timeline, a line for each unit: digits name the warpgroup, dots are idle time."""
    end = max(task.stop for task in tasks)
    for unit in ("tensor cores", "exp"):
        line = ["."] * (end // COLUMN)
        for task in tasks:
            if task.unit == unit:
                width = (task.stop - task.start) // COLUMN
                line[task.start // COLUMN : task.stop // COLUMN] = str(task.group + 1) * width
        yield f"  {unit:<12} {''.join(line)}"


def run() -> Findings:
    """The two ways to split a tile, counted; then three timelines of eight tiles."""
    call = Case(
        batch=1, q_heads=1, kv_heads=1, q_len=BLOCK_Q, kv_len=TILES * BLOCK_KV, head_dim=D, v_dim=D
    ).make()
    checks: list[Check] = []
    costs: list[Cost] = []
    notes: list[str] = []

    def again(way: Callable[[Memory], int]) -> None:
        way(shared_memory(call))

    for way in (split_k, split_q):
        shared = shared_memory(call)
        stops = way(shared)
        name = "split-K, FlashAttention-1" if way is split_k else "split-Q, FlashAttention-2"
        checks += compare(call, {"out": shared.arrays["out"][None, None]}, tiles=8, what=name)
        took = seconds({name: partial(again, way)}, budget_s=0.1)[name]
        costs.append(Cost(name, took, shared.intermediate, shared.moved))
        notes.append(
            f"{name}: {TILES} tiles of {BLOCK_Q} x {BLOCK_KV}, {WARPS} warps, shared memory read "
            f"{shared.read:,}, written {shared.written:,} bytes; all warps stop {stops} times"
        )
    q, k, v = call.q[0, 0], call.k[0, 0], call.v[0, 0]
    count = 4
    timelines = {
        "two warpgroups, one after the other": one_after_the_other(count),
        "ping-pong": schedule([in_turn(count), in_turn(count)]),
        "one warpgroup, pipelined": schedule([pipelined(2 * count)], asynchronous=True),
    }
    for name, tasks in timelines.items():
        tiles = 1 + max(task.tile for task in tasks)
        got = execute(tasks, q, k, v, block_kv=len(k) // tiles)
        checks += compare(call, {"out": got[None, None]}, tiles=8, what=name)
        cycles = max(task.stop for task in tasks)
        busy = sum(t.stop - t.start for t in tasks if t.unit == "tensor cores") / cycles
        notes.append(f"{name}: {cycles:,} cycles (simulated), tensor cores busy {busy:.0%}")
        notes += picture(tasks)
    problem = f"{BLOCK_Q} queries, {TILES * BLOCK_KV} keys, d = {D}, float32; moved: shared memory"
    return Findings(problem, tuple(checks), tuple(costs), tuple(notes))


def one_after_the_other(tiles: int) -> list[Task]:
    """Two warpgroups that never overlap: the second starts when the first has ended."""
    first = schedule([in_turn(tiles)])
    end = max(task.stop for task in first)
    return first + [Task(1, task.kind, task.tile, end + task.start) for task in first]


def shared_memory(call: Call) -> Memory:
    """Q, K and V of one tile's queries, with room for the result."""
    memory = Memory(q=call.q[0, 0], k=call.k[0, 0], v=call.v[0, 0])
    memory.allocate("out", BLOCK_Q, D, result=True)
    return memory
