"""CUDA streams simulated on the CPU: finds faults of a train pipeline on a GPU, without a GPU.

Inside ``simulated()`` the thread that entered it has a device ``DEVICE``. Its memory is the CPU's,
but is kept apart: a copy to it is a clone, and its tensors say that they are on ``DEVICE``. Streams
and events are made by ``torch.cuda``, and so by ``torch.get_device_module(DEVICE)``. Each operator
on device memory is reported to torch's race detector (``torch.cuda._sanitizer``) as a kernel on the
current stream. Collectives run on a stream of NCCL's, which waits for the issuer's and is
waited for by ``Work.wait``. A read by the host waits for the current stream. New memory counts as
in use until the last kernel of the stream that allocates it, as the allocator gives away blocks
whose kernels on that stream are still queued. Backward runs each kernel on the stream of its
forward, after the kernels of backward before it.

It can't see other threads' use of device memory, C++ code on streams of its own (such as the
collectives of DistributedDataParallel), or kernels of TorchRec's lookup other than the CPU's. It
has no clock: it finds what may go wrong, not whether it would.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.cuda._sanitizer as sanitizer
import torch.distributed as dist
import torch.optim.optimizer as optimizers
import torchrec
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchrec_exfm

DEVICE = torch.device("cuda", 0)
HOST = torch.device("cpu")
COLLECTIVES = (  # each writes to its first argument, and reads from all of them
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
SIZED_BY_VALUES = {  # operators whose outputs' sizes the host has to know
    "aten::_unique2",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
READ_BY_HOST = {"aten::_local_scalar_dense", "aten::equal"} | SIZED_BY_VALUES


class Finding(NamedTuple):
    """A fault, or a wait, that a GPU would have.

    ``kind`` is "race"; "pageable", for a copy from memory that is not pinned; "literal", for one
    from Python's numbers; "wait", where the host waits for the device; "untold", for memory freed
    while a stream that ``record_stream`` has not named may use it; "mixed", for host memory given
    to a kernel. ``place`` is the last line of the product or of TorchRec that led there.
    """

    kind: str
    description: str
    place: str
    step: int


class Collective(NamedTuple):
    """A collective in the order of issue, and the last kernel of each stream it waits for."""

    name: str
    issuer: str
    waits_for: dict[int, int]
    step: int


class Stream:
    """Replacement of ``torch.cuda.Stream``."""

    def __init__(self, simulation: Simulation, *_: Any, name: str = "", **__: Any) -> None:
        self._simulation = simulation
        self.device = DEVICE
        self.id = self.cuda_stream = next(simulation.stream_ids)
        self.name = name or f"stream {self.id}"
        simulation.sanitizer._handle_stream_creation(self.id)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._simulation)
        event.record(self)
        return event

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self._simulation.wait_on_host(self, "Stream.synchronize")

    def __repr__(self) -> str:
        return self.name


class Event:
    """Replacement of ``torch.cuda.Event``."""

    def __init__(self, simulation: Simulation, *_: Any, **__: Any) -> None:
        self._simulation = simulation
        self.id = next(simulation.event_ids)
        simulation.sanitizer._handle_event_creation(self.id)

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._simulation.current_stream()
        self._simulation.sanitizer._handle_event_record(self.id, stream.id)

    def wait(self, stream: Stream | None = None) -> None:
        stream = stream or self._simulation.current_stream()
        self._simulation.sanitizer._handle_event_wait(self.id, stream.id)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self._simulation.report("wait", "Event.synchronize")
        self._simulation.sanitizer._handle_event_synchronization(self.id)


class _Block:
    """Device memory: the stream that allocated it, those the allocator knows, and other uses."""

    def __init__(self, stream: int, reference: weakref.ref[Any], allocation: str) -> None:
        self.stream = stream
        self.allocation = allocation
        self.reference = reference
        self.recorded_streams = {stream}
        self.untold: dict[int, tuple[int, str]] = {}  # stream: last kernel, its description


class Simulation:
    """The device, made by ``simulated()``: its memory, its streams and the findings."""

    def __init__(self) -> None:
        self.sanitizer = sanitizer.EventHandler()
        self.stream_ids = itertools.count(1)  # 0 is made by the sanitizer
        self.event_ids = itertools.count()
        self.findings: list[Finding] = []
        self.collectives: list[Collective] = []
        self.step = 0
        self.default = Stream(self, name="default")
        self.nccl = Stream(self, name="NCCL")
        self._blocks: dict[int, _Block] = {}
        self._pinned: dict[int, weakref.ref[Any]] = {}
        self._current = threading.local()
        self._backward_stream: Stream | None = None  # of the last kernel of backward
        self._thread = threading.get_ident()

    def findings_of(self, *kinds: str) -> list[Finding]:
        """Return the findings of some kinds."""
        return [finding for finding in self.findings if finding.kind in kinds]

    def report(self, kind: str, description: str) -> None:
        self.findings.append(Finding(kind, description, _place(), self.step))

    def current_stream(self, _: Any = None) -> Stream:
        node = torch._C._current_autograd_node()
        stream: Stream | None = None if node is None else node.metadata.get("stream")
        return stream or getattr(self._current, "stream", self.default)

    @contextlib.contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        """Replacement of ``torch.cuda.stream``."""
        before = self.current_stream()
        self._current.stream = before if stream is None else stream
        try:
            yield
        finally:
            self._current.stream = before

    def keep_stream(self, outputs: Any) -> None:
        """Let the outputs' backward run on the current stream."""
        stream = self.current_stream()
        if stream is self.default:
            return
        nodes = [tensor.grad_fn for tensor in _tensors(outputs)]
        while nodes:
            node = nodes.pop()
            if node is not None and "stream" not in node.metadata:
                node.metadata["stream"] = stream
                nodes += [parent for parent, _ in node.next_functions]

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Order the kernels of backward, whatever their streams."""
        before, self._backward_stream = self._backward_stream, self.current_stream()
        try:
            yield
        finally:
            self._continue_backward()
            self._backward_stream = before

    def _continue_backward(self) -> None:
        stream = self.current_stream()
        if self._backward_stream not in (None, stream):
            stream.wait_stream(self._backward_stream)
            self._backward_stream = stream

    def synchronize(self, _: Any = None) -> None:
        """Replacement of ``torch.cuda.synchronize``."""
        self.report("wait", "synchronize")
        self.sanitizer._handle_device_synchronization()

    def wait_on_host(self, stream: Stream, description: str) -> None:
        self.report("wait", description)
        self.sanitizer._handle_stream_synchronization(stream.id)

    def name_streams(self, owner: object) -> None:
        """Name an object's streams after its attributes."""
        for name, value in vars(owner).items():
            if isinstance(value, Stream) and value is not self.default:
                value.name = name

    def adopt(self, module: nn.Module) -> None:
        """Treat a module's parameters and buffers as device memory."""
        owned = itertools.chain(module._parameters.values(), module._buffers.values())
        for tensor in owned:
            if tensor is not None:
                self._allocate(tensor)
        # sharded modules hide theirs from modules(), and keep their lookups in a list
        lists = [value for value in vars(module).values() if isinstance(value, list)]
        for child in itertools.chain(module.children(), *lists):
            if isinstance(child, nn.Module):
                self.adopt(child)

    def on_device(self, tensor: Tensor) -> bool:
        return _key(tensor) in self._blocks

    def last_kernel(self, stream: Stream) -> int:
        """Return the number of the last kernel launched on a stream; 0 for none."""
        return self.sanitizer.syncs.current_sync_states[stream.id].get(stream.id, 0)

    def copy(self, tensor: Tensor, *, from_device: bool, to_device: bool) -> Tensor:
        """Return a copy of a tensor on the host or on the device."""
        if from_device:
            self._launch("copy to the host", read={_key(tensor)})
            self.wait_on_host(self.current_stream(), "copy to the host")
        copied = tensor.clone()
        if from_device:
            self._blocks.pop(_key(copied), None)
        if to_device:
            self._check_pinned(tensor)
            self._launch("copy to the device", written={self._allocate(copied)})
        return copied

    def pin(self, tensor: Tensor) -> Tensor:
        if self.on_device(tensor):
            raise RuntimeError("cannot pin memory of the device")
        pinned = tensor.clone()
        self._pinned[_key(pinned)] = self._watch(pinned, self._pinned)
        return pinned

    def is_pinned(self, tensor: Tensor) -> bool:
        return _key(tensor) in self._pinned

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        if not self.on_device(tensor):
            raise RuntimeError("record_stream of memory of the host")
        self._blocks[_key(tensor)].recorded_streams.add(stream.id)

    def run(self, operator: Any, arguments: Any, keywords: Any, outputs: Any) -> None:
        """Launch an operator on the current stream if it uses device memory."""
        name, kinds = _parameters(operator)
        read, written, on_host, has_device = set(), set(), [], False
        inputs = itertools.chain(
            zip(kinds.values(), arguments, strict=False),
            ((kinds[keyword], value) for keyword, value in keywords.items()),
        )
        for kind, value in inputs:
            for tensor in _tensors(value):
                key = _key(tensor)
                if key in self._blocks:
                    has_device = True
                    if kind != "alias":
                        (written if kind == "write" else read).add(key)
                elif kind == "read" and tensor.dim():
                    on_host.append(tuple(tensor.shape))
        if not has_device or name.startswith("c10d::"):
            return
        self._continue_backward()
        if name == "aten::copy_":
            self._copy_into(*arguments[:2])
            return
        if on_host:
            self.report("mixed", f"{name}, {on_host}")
        written |= {
            self._allocate(tensor) for tensor in _tensors(outputs) if not self.on_device(tensor)
        }
        self._launch(name, read=read, written=written)
        if name in READ_BY_HOST or _indexes_by_booleans(name, arguments):
            self.wait_on_host(self.current_stream(), name)

    def collective(self, name: str, written: list[Tensor], read: list[Tensor]) -> Event | None:
        """Issue a collective on NCCL's stream; return what to wait for."""
        if threading.get_ident() != self._thread or not any(map(self.on_device, read)):
            return None
        issuer = self.current_stream()
        keys = [{self._allocate(tensor) for tensor in tensors} for tensors in (read, written)]
        self.nccl.wait_stream(issuer)
        waits_for = dict(self.sanitizer.syncs.current_sync_states[self.nccl.id])
        self.collectives.append(Collective(name, issuer.name, waits_for, self.step))
        for key in set.union(*keys):  # NCCL's process group keeps them until they are waited for
            self._blocks[key].recorded_streams.add(self.nccl.id)
        self._launch(name, read=keys[0], written=keys[1], stream=self.nccl)
        return self.nccl.record_event()

    def allocate(self, tensors: Iterable[Tensor]) -> None:
        """Treat new tensors as device memory."""
        for tensor in tensors:
            self._allocate(tensor)

    def free(self, tensors: Iterable[Tensor]) -> None:
        """Treat tensors as memory of the host again."""
        for tensor in tensors:
            self._blocks.pop(_key(tensor), None)

    def _copy_into(self, target: Tensor, source: Tensor) -> None:
        read, written = ({_key(tensor)} & self._blocks.keys() for tensor in (source, target))
        if not read:
            self._check_pinned(source)
        self._launch("aten::copy_", read=read, written=written)
        if not written and not self.is_pinned(target):
            self.wait_on_host(self.current_stream(), "copy to the host")

    def _check_pinned(self, tensor: Tensor) -> None:
        if tensor.numel() and not self.is_pinned(tensor):
            self.report("pageable", f"{tuple(tensor.shape)} {tensor.dtype}")

    def _launch(
        self,
        name: str,
        *,
        read: Set[int] = frozenset(),
        written: Set[int] = frozenset(),
        stream: Stream | None = None,
    ) -> None:
        """Run a kernel on the current stream, or another one; the sets are of blocks."""
        stream = stream or self.current_stream()
        described = f"{name} on {stream.name}, {_place()}"
        errors = self.sanitizer._handle_kernel_launch(
            stream.id, read - written, written, set(), described, _NoAliases()
        )
        for error in errors:
            accesses = error.current_access.operator, error.previous_access.operator
            self.report("race", " | ".join(accesses))
        for key in read | written:
            block = self._blocks[key]
            if stream.id not in block.recorded_streams:
                block.untold[stream.id] = self.sanitizer.seq_num, described

    def _allocate(self, tensor: Tensor) -> int:
        """Treat a tensor as device memory of the current stream; return its block."""
        key = _key(tensor)
        if key not in self._blocks:
            stream = self.current_stream()
            allocation = f"allocation on {stream.name}, {_place()}"
            self._blocks[key] = _Block(stream.id, self._watch(tensor, self._blocks), allocation)
            last_use = sanitizer.Access(
                sanitizer.AccessType.WRITE,
                self.last_kernel(stream),
                stream.id,
                allocation,
                aliases=[],
                is_output=False,
                stack_trace=_NoTraceback.StackSummary.extract(),
            )
            accesses = self.sanitizer.tensors_accessed.accesses
            accesses[key] = sanitizer.TensorInfo(None, write=last_use)
        return key

    def _watch(self, tensor: Tensor, memory: dict[int, Any]) -> weakref.ref[Any]:
        key = _key(tensor)
        return weakref.ref(
            tensor.untyped_storage(), lambda _: self._freed(memory.pop(key, None), key)
        )

    def _freed(self, block: Any, key: int) -> None:
        self.sanitizer.tensors_accessed.accesses.pop(key, None)
        if not isinstance(block, _Block):
            return
        for stream, (kernel, described) in block.untold.items():
            if stream in block.recorded_streams:
                continue
            if not self.sanitizer.syncs.is_ordered_after(block.stream, kernel, stream):
                self.report("untold", f"{described} | {block.allocation}")


class _Functions(TorchFunctionMode):
    """Makes tensors of the simulated device, and lets them report it as their device."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation
        on_device = simulation.on_device
        self._replaced: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: lambda tensor: DEVICE if on_device(tensor) else tensor.device,
            Tensor.is_cuda.__get__: on_device,
            Tensor.is_cpu.__get__: lambda tensor: not on_device(tensor),
            Tensor.get_device: lambda tensor: 0 if on_device(tensor) else -1,
            Tensor.to: self._to,
            Tensor.cpu: lambda tensor: self._to(tensor, HOST),
            Tensor.cuda: lambda tensor, *_, **__: self._to(tensor, DEVICE),
            Tensor.tolist: lambda tensor: self._to(tensor, HOST).tolist(),
            Tensor.numpy: lambda tensor: self._to(tensor, HOST).numpy(),
            Tensor.pin_memory: lambda tensor, *_: simulation.pin(tensor),
            Tensor.is_pinned: lambda tensor, *_: simulation.is_pinned(tensor),
        }

    def __torch_function__(
        self, function: Any, kinds: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        replaced = self._replaced.get(function)
        if replaced is not None:
            return replaced(*arguments, **keywords)
        if keywords.get("device") is None:
            outputs = function(*arguments, **keywords)
            self._simulation.keep_stream(outputs)
            return outputs
        device = torch.device(keywords["device"])
        outputs = function(*arguments, **{**keywords, "device": HOST})
        if device.type == DEVICE.type:
            self._simulation.allocate(_tensors(outputs))
            if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
                self._simulation.report("literal", f"{tuple(outputs.shape)} {outputs.dtype}")
        else:
            self._simulation.free(_tensors(outputs))
        return outputs

    def _to(self, tensor: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        on_device = self._simulation.on_device(tensor)
        dtype, target = tensor.dtype, on_device
        for value in (*arguments, keywords.get("dtype"), keywords.get("device")):
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, Tensor):
                dtype, target = value.dtype, self._simulation.on_device(value)
            elif isinstance(value, (torch.device, str)):
                target = torch.device(value).type == DEVICE.type
        if target == on_device:
            return tensor.to(dtype, copy=keywords.get("copy", False))
        copied = self._simulation.copy(tensor, from_device=on_device, to_device=target)
        return copied.to(dtype)


class _Kernels(TorchDispatchMode):
    """Reports each operator to the simulation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the way around it takes time

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation

    def __torch_dispatch__(
        self, operator: Any, kinds: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        outputs = operator(*arguments, **keywords)
        self._simulation.run(operator, arguments, keywords, outputs)
        return outputs


class _Work(dist.Work):
    """The handle of an asynchronous collective."""

    def __init__(self, work: dist.Work, event: Event) -> None:
        super().__init__()
        self._work = work
        self._event = event

    def wait(self, *_: Any) -> bool:
        self._event.wait()
        done: bool = self._work.wait()
        return done

    def is_completed(self) -> bool:
        return False


@contextlib.contextmanager
def simulated() -> Iterator[Simulation]:
    """Simulate a device with streams in this thread."""
    simulation = Simulation()
    functions = _Functions(simulation)
    with contextlib.ExitStack() as undo:
        for owner, name, replacement in _replacements(simulation, functions):
            undo.enter_context(mock.patch.object(owner, name, replacement))
        undo.enter_context(_Kernels(simulation))
        undo.enter_context(functions)
        yield simulation


def _replacements(simulation: Simulation, functions: _Functions) -> Iterator[tuple[Any, str, Any]]:
    """Return the replacements to set in torch, beside the modes."""
    yield torch.cuda, "Event", functools.partial(Event, simulation)
    yield torch.cuda, "Stream", functools.partial(Stream, simulation)
    yield torch.cuda, "current_stream", simulation.current_stream
    yield torch.cuda, "default_stream", lambda _=None: simulation.default
    yield torch.cuda, "stream", simulation.stream
    yield torch.cuda, "synchronize", simulation.synchronize

    module_of = torch.get_device_module
    yield torch, "get_device_module", lambda device=DEVICE: module_of(device or DEVICE)

    # its parser takes torch's own streams alone, before a mode is asked
    yield Tensor, "record_stream", lambda tensor, stream: simulation.record_stream(tensor, stream)

    for name in COLLECTIVES:
        yield dist, name, _collective(simulation, name, getattr(dist, name))

    run_backward = torch.autograd._engine_run_backward

    def run(*arguments: Any, **keywords: Any) -> Any:
        with simulation.backward(), functions:  # torch calls it with the mode off
            return run_backward(*arguments, **keywords)

    yield torch.autograd, "_engine_run_backward", run

    grouped = optimizers._group_tensors_by_device_and_dtype

    def group(lists: Any, *arguments: Any) -> Any:
        device = DEVICE if any(map(simulation.on_device, _tensors(lists))) else HOST
        groups = grouped(lists, *arguments)
        return {(device, dtype): tensors for (_, dtype), tensors in groups.items()}

    yield optimizers, "_group_tensors_by_device_and_dtype", group

    # the stack of each kernel is most of the sanitizer's time
    yield sanitizer, "traceback", _NoTraceback


def _collective(simulation: Simulation, name: str, function: Any) -> Callable[..., Any]:
    signature = inspect.signature(function)
    first = next(iter(signature.parameters))

    @functools.wraps(function)
    def issued(*arguments: Any, **keywords: Any) -> Any:
        bound = signature.bind(*arguments, **keywords).arguments
        event = simulation.collective(name, _tensors(bound[first]), _tensors([*bound.values()]))
        work = function(*arguments, **keywords)
        if event is not None and work is None:
            event.wait()
        return work if event is None or work is None else _Work(work, event)

    return issued


class _NoTraceback:
    walk_stack = staticmethod(lambda frame: ())

    class StackSummary:
        extract = staticmethod(lambda *_, **__: [])


class _NoAliases(dict[int, list[str]]):
    def __missing__(self, key: int) -> list[str]:
        return []


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


@functools.cache
def _parameters(operator: Any) -> tuple[str, dict[str, str]]:
    """Return an operator's name, and its use of each argument: "read", "write" or "alias"."""
    schema = operator._schema
    name: str = schema.name
    reads_shapes_only = name.endswith("_like") or name.startswith("aten::new_")
    kinds = {}
    for argument in schema.arguments:
        alias = argument.alias_info
        if alias is None:
            kinds[argument.name] = "alias" if reads_shapes_only else "read"
        else:
            kinds[argument.name] = "write" if alias.is_write else "alias"
    return name, kinds


def _indexes_by_booleans(name: str, arguments: Any) -> bool:
    indexes = name in ("aten::index", "aten::index_put", "aten::index_put_")
    return indexes and any(index.dtype == torch.bool for index in _tensors(arguments[1]))


def _place() -> str:
    """Return the line of the product or of TorchRec that is running."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        name = _name_of_ours(frame.f_code.co_filename)
        if name:
            return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@functools.cache
def _name_of_ours(path: str) -> str:
    """Return a file's name from the product's or TorchRec's package on; else an empty string."""
    for package in (torchrec_exfm, torchrec):
        folder = Path(package.__file__).parent
        if Path(path).is_relative_to(folder):
            return str(Path(path).relative_to(folder.parent))
    return ""
