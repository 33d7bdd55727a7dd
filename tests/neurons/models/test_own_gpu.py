"""Under a launcher each process of a machine takes its own GPU, before and after the ranks have met."""

from types import SimpleNamespace

import pytest
import torch

from neurons.errors import UsageError
from neurons.models import processes
from neurons.models.placement import max_memory_per_device
from neurons.models.source import pick_device


@pytest.fixture
def gpus(monkeypatch):
    """(GPUs of the machine, processes on it, number of this one), without any of them being there."""

    def pretend(count, processes=1, number=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        names = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "LOCAL_RANK": number}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))

    return pretend


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_each_process_takes_its_own(gpus, device, number):
    gpus(count=3, processes=3, number=number)
    assert pick_device(device) == torch.device("cuda", number)


def test_one_process_takes_the_current_one(gpus):
    gpus(count=3)
    assert pick_device() == torch.device("cuda")


@pytest.mark.parametrize(("count", "offered"), [(0, "cpu or auto"), (1, "cpu, cuda or auto")])
def test_an_unknown_device_is_refused_with_those_that_are_there(gpus, count, offered):
    gpus(count=count)
    with pytest.raises(UsageError, match=f"choose {offered}$"):
        pick_device("nonsense")


@pytest.mark.parametrize("number", [0, 2])
def test_more_processes_than_gpus_are_refused_in_each(gpus, number):
    """Those that would find a GPU too, or they would wait for the others for ever."""
    gpus(count=2, processes=3, number=number)
    with pytest.raises(UsageError, match=r"3 processes .* 2 GPUs"):
        pick_device()
    assert pick_device("cpu") == torch.device("cpu")


def test_a_launcher_that_says_little_is_still_caught(gpus, monkeypatch):
    gpus(count=1, processes=4, number=1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(UsageError):
        pick_device()


@pytest.fixture
def free(monkeypatch):
    """Device -> bytes that are free, of two GPUs and main memory."""
    found = {0: 100_000, 1: 100_000, "cpu": 1_000_000}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100_000, 100_000))
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda *_: dict(found))
    monkeypatch.setattr("neurons.models.placement.free_memory", lambda: 1_000_000)
    return found


def test_on_a_cpu_the_processes_share_what_is_free(gpus, free):
    cpu = torch.device("cpu")
    assert max_memory_per_device(900_000, cpu) is None
    gpus(count=0, processes=2)
    assert max_memory_per_device(900_000, cpu) == {"cpu": 450_000}


@pytest.mark.parametrize("shared", [False, True])
def test_a_process_leaves_the_gpus_of_the_others_alone(gpus, free, shared):
    """Where a GPU's memory is the main memory, there is no other."""
    gpus(count=2, processes=2, number=1)
    main = {} if shared else {"cpu": 450_000}
    if shared:
        del free["cpu"]
    assert max_memory_per_device(900_000, pick_device()) == {1: 90_000} | main


def test_without_a_launcher_all_gpus_are_there(gpus, free):
    gpus(count=2)
    found = max_memory_per_device(900_000, pick_device(), max_memory=80_000)
    assert found == {0: 80_000, 1: 80_000, "cpu": 80_000}


@pytest.mark.parametrize(("count", "on_cpu"), [(0, True), (1, True), (2, False)])
def test_more_processes_than_gpus_meet_on_cpus(gpus, monkeypatch, count, on_cpu):
    gpus(count=count, processes=2)
    asked = []
    state = SimpleNamespace(process_index=0, num_processes=2)
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: asked.append(cpu) or state)
    assert processes.world() == (0, 2)
    assert asked == [on_cpu]


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (0, 4)])
def test_sums_of_processes_are_made_in_slices(monkeypatch, shape):
    sizes = []

    def gather(own):
        sizes.append(own.numel())
        return torch.cat([own, 10 * own])

    monkeypatch.setattr(processes, "SLICE", 4)
    monkeypatch.setattr(processes, "world", lambda: (0, 2))
    monkeypatch.setattr("accelerate.PartialState", lambda: SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr("accelerate.utils.gather", gather)
    values = torch.randn(shape)
    assert torch.equal(processes.all_reduce(values, torch.add), values + 10 * values)
    assert max(sizes) <= 4
