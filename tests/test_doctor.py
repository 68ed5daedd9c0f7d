from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch

import tilewise
from tilewise import doctor
from tilewise.cli import app
from tilewise.dispatch import BACKENDS


@pytest.fixture
def facts():
    return doctor.collect()


def test_facts_are_plain_json(facts):
    assert json.loads(json.dumps(facts)) == facts


def test_facts_are_this_machines(facts):
    assert facts["tilewise"] == tilewise.__version__
    assert facts["torch"] == torch.__version__
    assert facts["python"].startswith(".".join(map(str, sys.version_info[:3])))
    cpu = facts["cpu"]
    assert cpu["logical_cores"] == os.cpu_count()
    assert cpu["torch_threads"] == torch.get_num_threads()
    assert cpu["clock_mhz"] is None or 100 < cpu["clock_mhz"] < 10_000
    assert len(facts["devices"]) >= torch.cuda.device_count()


def test_every_backend_has_a_state(facts):
    assert tuple(facts["backends"]) == BACKENDS
    assert facts["backends"]["tiled"] == "available"


def test_missing_native_library_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWISE_LIBRARY", str(tmp_path / "nowhere.so"))
    facts = doctor.collect()
    assert facts["native_library"]["loaded"] is False
    assert "nowhere.so" in facts["native_library"]["error"]
    assert facts["cpu"]["features"] is None


def test_providers_come_from_metadata(monkeypatch):
    def version(package):
        if package == "transformers":
            return "4.0"
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    facts = doctor.collect()
    assert facts["providers"]["transformers"] == "4.0"
    assert facts["providers"]["flash_attn"] is None


def test_unreadable_clock_is_none(monkeypatch):
    def cpu_freq():
        raise NotImplementedError

    monkeypatch.setattr("psutil.cpu_freq", cpu_freq)
    assert doctor.cpu()["clock_mhz"] is None


def test_accelerators_are_listed(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "Some GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = [d for d in doctor.devices() if d["device"].startswith("cuda")]
    assert [d["device"] for d in found] == ["cuda:0", "cuda:1"]
    assert found[0] == {
        "device": "cuda:0",
        "name": "Some GPU",
        "capability": "9.0",
        "memory_gib": 80.0,
        "runtime": "13.0",
    }


def run_doctor(*options: str) -> str:
    code = "from tilewise.cli import main; main()"
    command = [sys.executable, "-c", code, "doctor", *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return done.stdout


def test_command_prints_json(facts):
    printed = json.loads(run_doctor("--json"))
    assert printed.keys() == facts.keys()
    assert printed["backends"] == facts["backends"]
    assert printed["native_library"] == facts["native_library"]


def test_command_prints_a_table(facts):
    table = run_doctor()
    for expected in (
        facts["torch"],
        "backends tiled",
        "available",
        "native_library path",
        "devices",
    ):
        assert expected in table


def test_command_is_registered():
    assert "doctor" in {command.callback.__name__ for command in app.registered_commands}
