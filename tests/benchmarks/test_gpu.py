"""The GPU benchmark itself, on a small network and the CPU."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tests.benchmarks import gpu
from tests.benchmarks.gpu import HEAD, count_launches, row_of, table
from tests.benchmarks.gpu_calls import PARTS, QUICK, Call, Case

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "part", ["CAMs", *(pytest.param(name, marks=pytest.mark.slow) for name in [*PARTS][1:])]
)
@pytest.mark.filterwarnings("ignore")
def test_every_row_is_measured(part: str) -> None:
    for case in PARTS[part](torch.randn(2, 3, 32, 32), QUICK):
        row = row_of(case, 1, CPU)
        assert len(row) == len(HEAD)
        assert float(row[1]) >= 0
        assert float(row[2]) > 0


def test_a_table_says_what_failed_and_where_no_time_was_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def case(call: Call) -> list[Case]:
        return [Case("a", call, lambda: None, {"grad-cam": lambda: call, "torchcam": missing})]

    def missing() -> Call:
        raise ImportError

    parts = {
        "works": lambda x, sizes: case(lambda: None),
        "fails": lambda x, sizes: case(lambda: 1 / 0),
        "cannot be built": lambda x, sizes: 1 / 0,
    }
    monkeypatch.setattr(gpu, "PARTS", parts)

    def rows(seconds: float) -> list[list[str]]:
        lines = table(2, torch.float32, QUICK, 1, CPU, time.monotonic() + seconds)
        return [text[2:-2].split(" | ") for text in lines if text.startswith("| ")][2:]

    works, fails, unbuilt = rows(60)
    assert works[4] == "not installed"
    assert float(works[3]) > 0
    assert fails[2] == "ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in unbuilt[0]
    assert rows(-1)[0][2] == "TimeoutError: no time was left"


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
