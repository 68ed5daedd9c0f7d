from __future__ import annotations

import json
import sys

import psutil
import pytest
import torch

from tilewise.bench import machine


def test_facts_are_short_texts(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/tilewise", "bench", "--suite", "quick"])
    facts = machine.facts("cpu")
    assert json.loads(json.dumps(facts)) == facts
    assert all(isinstance(value, str) and value for value in facts.values())
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == str(torch.get_num_threads())
    assert facts["device"] == "cpu"
    assert facts["command"] == "tilewise bench --suite quick"


def test_a_module_run_is_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/tilewise/__main__.py", "compare"])
    assert machine.command_line() == "tilewise compare"


def test_devices_are_checked(monkeypatch):
    assert machine.check_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="device"):
        machine.check_device("abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA"):
        machine.check_device("cuda")


def test_memory_is_the_least_of_system_and_container(monkeypatch, tmp_path):
    limit, use = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(machine, "_CGROUP_LIMIT", limit)
    monkeypatch.setattr(machine, "_CGROUP_USE", use)
    assert 0 < machine.available_memory("cpu") <= psutil.virtual_memory().total
    limit.write_text("5000\n")
    use.write_text("1000\n")
    assert machine.available_memory("cpu") == 4000
    limit.write_text("max\n")
    assert machine.available_memory("cpu") > 4000
