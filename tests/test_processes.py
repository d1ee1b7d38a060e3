"""Methods in child processes of both kinds, as copies, and on models that processes share."""

import copy
import multiprocessing
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from captum.attr import DeepLift, LayerGradCam, Saliency
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from captum_ext._data.loading import CpuLoader
from captum_ext._data.pictures import PictureDataset
from captum_ext._engine import sharing, state
from captum_ext._engine.sharing import use_model, use_random_states_alone
from captum_ext._engine.state import preserve_state, seeded_random
from captum_ext.attr import FCAM, FIDO, RISE, LayerCam, UpsampleWrapper
from captum_ext.datasets import FineGrainedParts, PastedScenes, TexturedEllipses
from captum_ext.infill import Infill
from captum_ext.metrics import insertion
from captum_ext.perception import LayerEncoder, PerceptionVisualization
from tests.calls import ATTRIBUTIONS, METRICS, Subjects, are_equal, augmented, cam, run, sess
from tests.methods import METHODS
from tests.networks import named_net, small_net

SOME = ["Grad-CAM++", "RISE", "SESS(Saliency)", "SR, auto", "insertion, None", "PointingGame"]


# --- fork ----------------------------------------------------------------------------------------


def in_fork(work: Callable[[], Any]) -> Any:
    """The result of `work` in a child that is a fork of this process, or its error."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(False)

    def send() -> None:
        try:
            result = work()
        except Exception as error:
            result = error
        sender.send_bytes(pickle.dumps(result))

    child = context.Process(target=send)
    child.start()
    answered = receiver.poll(60)
    result = pickle.loads(receiver.recv_bytes()) if answered else "the child waits for ever"
    child.kill()
    child.join()
    return result


fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@contextmanager
def another_thread_in(block: Callable[[], Any]) -> Iterator[None]:
    """A block during which another thread is inside the context manager `block()`."""
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with block():
            inside.set()
            leave.wait(120)

    thread = threading.Thread(target=stay)
    thread.start()
    assert inside.wait(60)
    try:
        yield
    finally:
        leave.set()
        thread.join()


@fork
@pytest.mark.parametrize("name", SOME)
def test_calls_in_a_fork_equal_those_of_the_parent(name: str) -> None:
    subjects = Subjects()
    expected = run(name, subjects)
    assert are_equal(in_fork(lambda: run(name, subjects)), expected)


@fork
@pytest.mark.filterwarnings("ignore:The model is in train mode")
@pytest.mark.parametrize("lock", ["model", "random states", "uses", "buffers", "a pass"])
def test_a_fork_does_not_wait_for_threads_that_it_does_not_have(lock: str) -> None:
    net, x = small_net().train(), torch.randn(2, 3, 9, 9)
    buffers = [buffer.clone() for buffer in net.buffers()]

    @contextmanager
    def a_pass() -> Iterator[None]:
        with preserve_state(net):
            net(x)  # moves the statistics of the batch norm
            yield

    blocks: dict[str, Callable[[], Any]] = {
        "model": lambda: use_model((net,), alone=True),
        "random states": use_random_states_alone,
        "uses": lambda: sharing._lock,
        "buffers": lambda: state._buffers_lock,
        "a pass": a_pass,
    }

    def work() -> bool:
        wrapper = UpsampleWrapper(LayerGradCam(net, net.relu2))
        maps = []

        def explain() -> None:
            with seeded_random(torch.device("cpu"), 0), preserve_state(net):
                maps.append(wrapper.attribute(x, target=1))

        explain()
        thread = threading.Thread(target=explain)  # may get the ident of a thread of the parent
        thread.start()
        thread.join()
        are_restored = all(map(torch.equal, net.buffers(), buffers))
        return torch.equal(*maps) and are_restored and sharing._uses == []

    with another_thread_in(blocks[lock]):
        assert in_fork(work) is True


# --- spawn ---------------------------------------------------------------------------------------


def run_in_child(arguments: tuple[Subjects, Sequence[str], Any]) -> list[Any]:
    """Calls in a new process, on subjects that were pickled, and a method that was pickled."""
    torch.set_num_threads(1)
    subjects, names, method = arguments
    return [run(name, subjects) for name in names] + [method.attribute(subjects.x, target=[1, 2])]


@pytest.mark.slow
def test_calls_in_a_spawned_process_equal_those_of_the_parent() -> None:
    subjects, names = Subjects(), [*ATTRIBUTIONS, *METRICS]
    method = sess(UpsampleWrapper(DeepLift(subjects.net)))
    expected = run_in_child((subjects, names, method))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        results = pool.map(run_in_child, [(subjects, names, method)])[0]
    different = [
        name for name, a, b in zip(names, results, expected, strict=False) if not are_equal(a, b)
    ]
    assert different == []
    assert torch.equal(results[-1], expected[-1])


def datasets() -> dict[str, Any]:
    return {
        "TexturedEllipses": TexturedEllipses(2),
        "FineGrainedParts": FineGrainedParts(2, size=(64, 64)),
        "PastedScenes": PastedScenes(2, size=(160, 160)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", datasets())
@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_workers_read_our_data_sets(name: str, start: str) -> None:
    pictures = PictureDataset(datasets()[name], (32, 32))
    loaders = [
        CpuLoader(pictures, 2),
        CpuLoader(pictures, 2, num_workers=1, multiprocessing_context=start),
        DataLoader(pictures, 2, num_workers=1, multiprocessing_context=start),
    ]
    here, *there = ([list(batch) for batch in loader] for loader in loaders)
    for batches in there:
        assert all(torch.equal(a, b) for a, b in zip(batches[0], here[0], strict=True))


@fork
def test_workers_make_batches_on_the_cpu_under_another_default_device() -> None:
    pictures = PictureDataset(TexturedEllipses(2), (32, 32))
    expected = next(iter(DataLoader(pictures, 2)))
    torch.set_default_device("meta")
    try:
        batch = next(iter(CpuLoader(pictures, 2, num_workers=1, multiprocessing_context="fork")))
    finally:
        torch.set_default_device(None)
    assert all(map(torch.equal, batch, expected))


# --- copies --------------------------------------------------------------------------------------


def objects(s: Subjects) -> dict[str, Any]:
    """Objects with an `attribute`, and others that hold settings or results."""
    layer_methods = {
        name: method(s.net, "relu2", **({"head": "fc"} if name == "CAM" else {}))
        for name, method in METHODS.items()
    }
    return {
        **layer_methods,
        "RISE": RISE(s.net),
        "FIDO": FIDO(s.net),
        "FCAM": FCAM(s.net, s.fcam),
        "Upsample": UpsampleWrapper(cam(s)),
        "SESS": sess(cam(s)),
        "SR": augmented(cam(s)),
        "perception": PerceptionVisualization(cam(s), LayerEncoder(s.net, "relu2"), s.perception),
        "infill": Infill(s.x, "noise"),
        "curve": insertion(s.net, s.x, s.attributions, [1, 2]),
        **s.metrics,
    }


@pytest.mark.parametrize("copied", ["pickle", "deepcopy", "copy"])
@pytest.mark.parametrize("name", objects(Subjects()))
def test_copies_are_equal(name: str, copied: str) -> None:
    copies: dict[str, Callable[[Any], Any]] = {
        "pickle": lambda original: pickle.loads(pickle.dumps(original)),
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
    }
    subjects = Subjects()
    original = objects(subjects)[name]
    duplicate = copies[copied](original)
    assert type(duplicate) is type(original)
    if not hasattr(original, "attribute"):
        assert repr(duplicate) == repr(original)
        return
    few = {"RISE": {"n_masks": 20, "grid": 4}, "FIDO": {"n_steps": 2, "n_masks": 2}}
    maps = []
    for method in (duplicate, objects(subjects)[name]):
        torch.manual_seed(0)
        maps.append(method.attribute(subjects.x, target=[1, 2], **few.get(name, {})))
    assert torch.equal(*maps)


# --- models that processes share -----------------------------------------------------------------


def fully_sharded(net: nn.Sequential) -> nn.Module:
    """The network, with each layer's weights split between the processes."""
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # before torch 2.6
        from torch.distributed._composable.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net.children():
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


SHARED: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "fully_shard": fully_sharded,
}
WITHOUT_GPU = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of this torch needs a GPU"
)
KINDS = ["DDP", pytest.param("fully_shard", marks=WITHOUT_GPU)]
FORWARD: dict[str, Callable[[nn.Module], Any]] = {
    "RISE": RISE,
    "FIDO": FIDO,
    "Saliency": Saliency,
}
LAYER: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    **METHODS,
    "Upsample": lambda net, layer: UpsampleWrapper(LayerGradCam(net, layer)),
    "SESS": lambda net, layer: sess(LayerCam(net, layer)),
    "SR": lambda net, layer: augmented(LayerCam(net, layer)),
}
FEW = {"RISE": {"n_masks": 20, "grid": 4}, "FIDO": {"n_steps": 2, "n_masks": 2}}


def compare(kind: str, names: Sequence[str], rank: int = 0) -> list[tuple[str, str]]:
    """The methods that give another map on a shared model, with a reason."""

    def explain(net: nn.Module, relu: nn.Module) -> Tensor:
        method = FORWARD[name](net) if name in FORWARD else LAYER[name](net, relu)
        torch.manual_seed(0)
        return method.attribute(x, target=[1, 2], **FEW.get(name, {}))

    different = []
    x = Subjects().x.roll(rank, 3)  # each process has its own images
    for name in names:
        net, shared = named_net(), SHARED[kind](named_net())
        layers = shared.module if kind == "DDP" else shared
        try:
            torch.testing.assert_close(explain(shared, layers.relu2), explain(net, net.relu2))
        except Exception as error:
            different.append((name, repr(error)[:300]))
    return different


@contextmanager
def process_group(rank: int, n: int, port: int) -> Iterator[None]:
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=n)
    try:
        yield
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_one_process_holds_is_explained(kind: str) -> None:
    with process_group(0, 1, free_port()):
        assert compare(kind, ["CAM", "Grad-CAM++", "RISE", "Upsample"]) == []


def explain_in_process(rank: int, kind: str, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    with process_group(rank, 2, port):
        results.put(compare(kind, [*FORWARD, *LAYER], rank))
        dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_two_processes_share_is_explained(kind: str) -> None:
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (kind, free_port(), results)
    torch.multiprocessing.spawn(explain_in_process, arguments, nprocs=2)
    assert [results.get(), results.get()] == [[], []]
