"""The GPU benchmark itself, on a small network and the CPU."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tests.benchmarks import gpu
from tests.benchmarks.gpu import HEAD, count_launches, table
from tests.benchmarks.gpu_calls import QUICK

CPU = torch.device("cpu")


def rows(batch: int, seconds: float) -> list[list[str]]:
    lines = table(batch, torch.float32, QUICK, 1, CPU, time.monotonic() + seconds)
    return [text[2:-2].split(" | ") for text in lines if text.startswith("| ")][2:]


def test_every_row_is_measured() -> None:
    measured = rows(2, 600)
    assert len(measured) == 19
    for row in measured:
        assert len(row) == len(HEAD)
        assert float(row[1]) >= 0
        assert float(row[2]) > 0, row


def test_no_row_starts_after_the_time() -> None:
    assert {row[2] for row in rows(1, -1)} == {"TimeoutError: no time was left"}


def test_launches_and_copies_are_counted_by_name() -> None:
    names = ["cudaLaunchKernel", "cuLaunchKernelEx", "Memcpy DtoH (Device -> Pageable)"]
    names += ["Memcpy HtoD (Pageable -> Device)", "void at::native::add", "cudaMemcpyAsync"]
    assert count_launches(SimpleNamespace(name=name) for name in names) == (2, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    gpu.main()
    assert capsys.readouterr().out == "There is no GPU here, so nothing was measured.\n"


@pytest.mark.gpu
def test_launches_and_copies_of_a_call_on_a_gpu() -> None:
    x = torch.ones(3, device="cuda")
    launches, copies = gpu.profile(lambda: (x * 2).sum().item(), torch.device("cuda"))
    assert launches >= 2
    assert copies == 1
