"""``tilewise.enable`` and ``tilewise.disable``: when they hold, and what they leave behind."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.compiler.config
import torch.nn.functional as F

import tilewise
from tilewise.compat import sdpa_routing

Q = torch.randn(2, 3, 5, 8)


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    yield
    tilewise.disable()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call that reached tilewise."""
    found: list[int] = []
    original = sdpa_routing.run
    monkeypatch.setattr(sdpa_routing, "run", lambda *a: (found.append(1), original(*a))[1])
    return found


def is_on(runs: list[int]) -> bool:
    before = len(runs)
    F.scaled_dot_product_attention(Q, Q, Q)
    return len(runs) > before


def test_on_until_off(runs):
    assert not is_on(runs)
    tilewise.enable()
    tilewise.enable()
    assert is_on(runs)
    tilewise.disable()
    assert not is_on(runs)
    tilewise.disable()
    assert not is_on(runs)


def test_blocks_nest(runs):
    with tilewise.enable():
        with tilewise.enable():
            assert is_on(runs)
        assert is_on(runs)
    assert not is_on(runs)


def test_a_block_leaves_an_enable_around_it(runs):
    tilewise.enable()
    with tilewise.enable():
        assert is_on(runs)
    assert is_on(runs)


def test_disable_inside_a_block(runs):
    with tilewise.enable():
        tilewise.disable()
        assert not is_on(runs)
    assert not is_on(runs)


def test_a_block_ends_with_an_error(runs):
    with pytest.raises(KeyError), tilewise.enable():
        raise KeyError
    assert not is_on(runs)


def test_a_handle_can_be_entered_again(runs):
    handle = tilewise.enable()
    for _ in range(2):
        with handle:
            assert is_on(runs)
        assert not is_on(runs)


def test_it_holds_for_every_thread_and_blocks_overlap(runs):
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with tilewise.enable():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with tilewise.enable():
        thread.start()
        assert entered.wait(60)
    assert is_on(runs), "the other thread's block is still open"
    leave.set()
    thread.join()
    assert not is_on(runs)


def test_many_threads_at_once(runs):
    want = F.scaled_dot_product_attention(Q.double(), Q.double(), Q.double())
    wrong = []

    def work() -> None:
        for _ in range(20):
            out = F.scaled_dot_product_attention(Q, Q, Q)
            if not torch.allclose(out.double(), want, atol=1e-5):
                wrong.append(1)

    with tilewise.enable():
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and len(runs) == 80


def test_the_dispatcher_is_left_as_it_was():
    name = "aten::scaled_dot_product_attention"
    before = torch._C._dispatch_dump(name), torch._C._dispatch_dump_table(name)
    others = set(torch.library._impls)
    with tilewise.enable():
        assert torch._C._dispatch_dump(name) != before[0]
        assert len(torch.library._impls) == len(others) + 2
    assert (torch._C._dispatch_dump(name), torch._C._dispatch_dump_table(name)) == before
    assert torch.library._impls == others


def test_the_compilers_cache_is_told_in_every_thread(monkeypatch):
    config = torch.compiler.config

    def seen() -> str:
        tags = [config.cache_key_tag]
        thread = threading.Thread(target=lambda: tags.append(config.cache_key_tag))
        thread.start()
        thread.join()
        assert tags[0] == tags[1]
        return tags[0]

    before = seen()
    with tilewise.enable():
        assert seen() == before + "+tilewise"
    assert seen() == before
    with monkeypatch.context() as patch:
        patch.setattr(config._config["cache_key_tag"], "env_value_default", "mine")
        with tilewise.enable():
            assert seen() == "mine+tilewise"
        assert seen() == "mine"
    with config.patch(cache_key_tag="here"):
        with tilewise.enable():
            assert config.cache_key_tag == "here+tilewise"
        assert config.cache_key_tag == "here"
    assert seen() == before


def test_not_while_compiling(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for name in ("enable", "disable"):
        with pytest.raises(RuntimeError, match=rf"tilewise\.{name}: cannot be compiled"):
            getattr(tilewise, name)()


LIGHT = """
import sys, torch
from torch._dispatch.python import enable_python_dispatcher
import tilewise
assert not [n for n in sys.modules if n.startswith("tilewise.compat")]
with tilewise.enable():
    x = torch.randn(1, 2, 5, 8)
    torch.nn.functional.scaled_dot_product_attention(x, x, x)

# Tracers use PyTorch's dispatcher in Python, which remembers which kernel serves which key.
from tilewise.compat import sdpa_routing as routing
ran = []
run, routing.run = routing.run, lambda *args: ran.append(args) or run(*args)
for on in (False, True, False):
    if on:
        tilewise.enable()
    ran.clear()
    with enable_python_dispatcher():
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert len(ran) == on
    tilewise.disable()
assert "torch._dynamo" not in sys.modules, "turning it on or off must not load the compiler"
"""


def test_it_loads_little():
    subprocess.run([sys.executable, "-c", LIGHT], check=True, timeout=120)
