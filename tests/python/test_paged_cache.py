"""heed._paged_cache against attention over each request's keys, on lists as Transformers makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import oracle
from device import DEVICE, DTYPE, EXACT, ON_CPU
from heed import _paged_cache
from heed._paged_cache import LayerCache, Step

HEADS_Q, HEADS_K, DIM = 4, 2, 16
PAGE, WINDOW, PAGES = 4, 6, 40
TOLERANCE = 1e-5 if EXACT else 16 * torch.finfo(DTYPE).eps
# Of every request, keys in the cache and new ones.
BATCHES = {
    "prompts": [(0, 5), (0, 1), (0, 13)],
    "decode": [(4, 1), (0, 1), (23, 1), (5, 1), (6, 1), (7, 1), (11, 1)],
    "mixed": [(9, 1), (0, 7), (3, 6), (20, 1), (5, 2), (6, 9)],
}


@dataclass
class Requests:
    """Requests in a cache of one layer, and the lists of a step that adds their new keys.

    Page 0 and 1 belong to nobody: what padding reads and what it writes.
    """

    lengths: list[tuple[int, int]]
    window: int | None = None
    padding: int = 0  # tokens and empty requests that fill a step up for a CUDA graph
    keys: list[Tensor] = field(default_factory=list)  # [2, tokens, heads, dim] of every request
    pages: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        cache = torch.randn(2, PAGES, PAGE, HEADS_K, DIM).to(DTYPE)
        free = (2 + torch.randperm(PAGES - 2)).tolist()
        read, write = [], []
        for past, new in self.lengths:
            self.keys.append(torch.randn(2, past + new, HEADS_K, DIM).to(DTYPE))
            slots = past + new if self.window is None else min(past + new, self.window)
            self.pages.append([free.pop() for _ in range(-(-slots // PAGE))])
            for position in range(past):  # a ring ends up with the newest
                row = self.row(len(self.keys) - 1, position)
                cache.flatten(1, 2)[:, row] = self.keys[-1][:, position]
            rows = [self.row(len(self.keys) - 1, p) for p in range(past + new)]
            if self.window is None:
                read += rows
                write += rows[past:]
            else:
                seen = min(past, self.window - 1)
                read += rows[past - seen : past] + [1] * new
                lost = max(new - self.window, 0)
                write += [PAGE] * lost + rows[past + lost :]
        self.read = torch.tensor(read + [0] * self.padding)
        if all(past == 0 for past, _ in self.lengths):
            self.read = self.read[:0]
        self.write = torch.tensor(write + [PAGE] * self.padding)
        self.k, self.v = cache.to(DEVICE)
        self.new = torch.cat(
            [of[:, past:] for of, (past, _) in zip(self.keys, self.lengths, strict=True)]
            + [torch.randn(2, self.padding, HEADS_K, DIM).to(DTYPE)],
            dim=1,
        ).to(DEVICE)
        self.q = torch.randn(self.new.shape[1], HEADS_Q, DIM).to(DTYPE).to(DEVICE)

    def row(self, request: int, position: int) -> int:
        slot = position if self.window is None else position % self.window
        return self.pages[request][slot // PAGE] * PAGE + slot % PAGE

    def layer(self) -> LayerCache:
        return LayerCache(0, self.k, self.v, self.window, PAGE)

    def step(self, block_table: bool = False) -> Step:
        new = [new for _, new in self.lengths] + [0] * self.padding
        seen = [
            n + (past if self.window is None else min(past, self.window - 1))
            for past, n in self.lengths
        ] + [0] * self.padding
        cu_q, cu_k = (
            torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE) for lengths in (new, seen)
        )
        table = None
        if block_table:
            table = torch.full((1, len(new), 10), -1, dtype=torch.int32)
            for request, pages in enumerate(self.pages):
                table[0, request, : len(pages)] = torch.tensor(pages)
            table = table.to(DEVICE)
        kind = "full_attention" if self.window is None else "sliding_attention"
        longest = self.q.shape[0] if self.padding else max(new)
        lists = [self.read.to(DEVICE)], [self.write.to(DEVICE)]
        return Step(cu_q, {kind: cu_k}, longest, {kind: max(seen)}, *lists, table)

    def attend(self, step: Step | None = None, **scores) -> Tensor:
        step = step or self.step()
        return _paged_cache.attend(self.layer(), step, self.q, *self.new, self.window, **scores)

    def assert_attended(self, out: Tensor, **scores) -> None:
        """Every new token sees the keys up to its own; the cache holds all keys that it should."""
        first = 0
        scores = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in scores.items()}
        for request, (past, new) in enumerate(self.lengths):
            q = self.q[None, first : first + new].cpu()
            keys = self.keys[request]
            left = None if self.window is None else self.window - 1
            expected, _ = oracle.attention(q, *keys[:, None], causal=True, left=left, **scores)
            actual = out[first : first + new].cpu().double()
            torch.testing.assert_close(actual, expected[0], rtol=0, atol=4 * TOLERANCE)
            kept = range(0 if self.window is None else max(past + new - self.window, 0), past + new)
            rows = [self.row(request, position) for position in kept]
            for cached, own in ((self.k, keys[0]), (self.v, keys[1])):
                assert torch.equal(cached.flatten(0, 1)[rows].cpu(), own[list(kept)])
            first += new
        assert not out[first:].any()


@pytest.fixture
def calls(monkeypatch):
    """Key tensors and arguments of every call of heed.attention."""
    recorded = []
    attention = _paged_cache.attention

    def recording(q, k, v, **arguments):
        recorded.append((k, arguments))
        return attention(q, k, v, **arguments)

    monkeypatch.setattr(_paged_cache, "attention", recording)
    return recorded


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("batch", BATCHES)
def test_requests_see_their_own_keys(batch, window, padding):
    requests = Requests(BATCHES[batch], window, padding)
    requests.assert_attended(requests.attend())


@pytest.mark.parametrize("padding", [0, 3])
def test_block_table(padding):
    requests = Requests(BATCHES["decode"], padding=padding)
    requests.assert_attended(requests.attend(requests.step(block_table=True)))


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("batch", BATCHES)
def test_scores(batch, window):
    scores = {"scale": 0.3, "softcap": 2.0, "sink": torch.randn(HEADS_Q, device=DEVICE)}
    requests = Requests(BATCHES[batch], window)
    requests.assert_attended(requests.attend(**scores), **scores)


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("batch", BATCHES)
def test_pages_are_read_where_they_lie(batch, window, calls):
    requests = Requests(BATCHES[batch], window)
    requests.attend()
    (k, arguments), *more = calls
    assert not more
    in_place = k.untyped_storage().data_ptr() == requests.k.untyped_storage().data_ptr()
    # A prompt that nothing was cached of is packed as it is; the keys of a ring that a prompt
    # overwrites are copied.
    assert in_place == (batch == "decode" or (batch == "mixed" and window is None))
    assert ("page_table" in arguments) == in_place


def test_shared_pages():
    """Two requests with one page in common, as prefix sharing leaves them."""
    requests = Requests([(5, 1), (6, 3)])
    shared = requests.pages[0][0]
    own = requests.pages[1][0]
    requests.keys[1][:, :PAGE] = requests.keys[0][:, :PAGE]
    requests.pages[1][0] = shared
    moved = {own * PAGE + i: shared * PAGE + i for i in range(PAGE)}
    requests.read = torch.tensor([moved.get(row, row) for row in requests.read.tolist()])
    requests.assert_attended(requests.attend())


def test_layers_share_a_page_table_and_steps_do_not(monkeypatch):
    made = []
    pages = _paged_cache._pages

    def counting(*arguments):
        made.append(arguments)
        return pages(*arguments)

    monkeypatch.setattr(_paged_cache, "_pages", counting)
    requests = Requests(BATCHES["decode"])
    step = requests.step()
    for _ in range(3):
        requests.attend(step)
    assert len(made) == 1
    step.read_index[0].add_(0)  # Transformers writes the next step into the same memory
    requests.attend(step)
    assert len(made) == 2


# ---- bad input ----


def _foreign(requests: Requests, id: int) -> Step:
    step = requests.step(block_table=True)
    step.block_table[0, 0, 0] = id
    return step


@pytest.mark.parametrize("id", [-1, PAGES, 2**30])
def test_foreign_pages_leave_other_requests_alone(id):
    """A CPU refuses the page; a GPU cannot look, and does not see its keys."""
    requests = Requests(BATCHES["decode"])
    step = _foreign(requests, id)
    if ON_CPU:
        with pytest.raises(
            ValueError, match=rf"page_table\[0\]\[0\] = {id} must be in \[0, {PAGES}"
        ):
            requests.attend(step)
        return
    out = requests.attend(step)
    requests.lengths, requests.keys, requests.pages = (
        x[1:] for x in (requests.lengths, requests.keys, requests.pages)
    )
    requests.q = requests.q[1:]
    requests.assert_attended(out[1:])


@pytest.mark.parametrize("id", [-1, PAGES, 2**30])
def test_a_new_key_without_a_page_is_written_nowhere(id):
    requests = Requests([(2, 1), (5, 1)])  # the first one's new key goes to its page 0
    before = requests.k.clone()
    step = _foreign(requests, id)
    if ON_CPU:
        with pytest.raises(ValueError, match="page_table"):
            requests.attend(step)
    else:
        requests.attend(step)
    changed = (requests.k != before).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert set(changed) <= {1, *requests.pages[1]}  # the trash, and the other request


def test_a_table_that_is_too_short():
    requests = Requests([(5, 1), (9, 1)])
    step = requests.step(block_table=True)
    step = step._replace(block_table=step.block_table[:, :, :1].contiguous())
    if ON_CPU:
        with pytest.raises(ValueError, match=r"seqused_k\[0\] = 6 must be"):
            requests.attend(step)
    else:
        requests.attend(step)
        torch.cuda.synchronize()


def test_rows_that_begin_no_page():
    requests = Requests(BATCHES["decode"])
    requests.read[0] += 1
    if ON_CPU:
        with pytest.raises(ValueError, match=r"page_table\[0\]\[0\] = -1 must be in"):
            requests.attend()


def test_unknown_cache():
    with pytest.raises(NotImplementedError, match=r"cache = dict is not supported by heed"):
        _paged_cache.layer_cache({}, 0)


def test_windows_of_old_releases():
    rows = [torch.zeros(8, HEADS_K, DIM)]
    cache = SimpleNamespace(
        layer_index_to_group_indices={0: (0, 0), 1: (1, 0)},
        key_cache=rows,
        value_cache=rows,
        block_size=PAGE,
        sliding_windows={0: 1, 1: WINDOW},
    )
    assert _paged_cache.layer_cache(cache, 0).kind == "full_attention"
    with pytest.raises(NotImplementedError, match=f"sliding_window = {WINDOW} is not supported in"):
        _paged_cache.layer_cache(cache, 1)


# ---- CUDA graphs ----


@pytest.mark.skipif(ON_CPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("block_table", [False, True], ids=["lists", "block table"])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
def test_one_graph_serves_steps_of_its_size(window, block_table):
    """Captured on one step, replayed on another one that is copied into the same tensors."""
    if block_table and window:
        pytest.skip("Transformers has no block tables of rings")
    names = "decode" if block_table else "mixed"
    static, other = (Requests(BATCHES[names], window, padding=3) for _ in range(2))
    steps = [requests.step(block_table) for requests in (static, other)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        static.attend(steps[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = static.attend(steps[0])
    for to, source in ((static, other), (steps[0], steps[1])):
        for name in ("k", "v", "q", "new") if to is static else ("cu_seqlens_q",):
            getattr(to, name).copy_(getattr(source, name))
    for name in ("read_index", "write_index"):
        getattr(steps[0], name)[0].copy_(getattr(steps[1], name)[0])
    if block_table:
        steps[0].block_table.copy_(steps[1].block_table)
    graph.replay()
    other.k, other.v = static.k, static.v
    other.assert_attended(out)
