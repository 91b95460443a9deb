"""Native code on torch's own threads; needs numba and GNU's OpenMP.

Kernels run in the OpenMP pool that torch has started already: a second pool would fight it for the cores. Each thread
has a range of the work of its own, which it takes in small parts; when it is through, it takes from the others'.
"""

import contextlib
import ctypes
import functools
import logging
import mmap
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

NUM_COMMON = 3
"""Numbers that every kernel is called with before its own: threads, the function that tells a thread its number, and
where the counters of the threads are."""
COUNTER_PITCH = 8
"""Numbers between the counters of two threads: each has a cache line of its own."""
HUGE_PAGE = 2 * 2**20
PAGE = 4096


def buffer(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros, on huge pages where the system has them: a gather jumps from row to row, each on a page of its own."""
    size = numel * dtype.itemsize
    if size < HUGE_PAGE or not hasattr(mmap, 'MADV_HUGEPAGE'):
        return torch.zeros(numel, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


class Workspace(threading.local):
    """Memory of a thread for what is used once: shared, so that it stays in the processor's cache."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._address = self._size = 0

    def take(self, num_bytes: int) -> int:
        """The address of memory that the next call of this thread takes for something else.

        It lies around the middle: the half that a thread of the pool writes stays in the cache of its core, whatever
        the size.
        """
        if num_bytes > self._size:
            self.memory = buffer(num_bytes, torch.uint8)
            self._address, self._size = self.memory.data_ptr(), num_bytes
        return self._address + (self._size - num_bytes) // 2 // PAGE * PAGE


class Kernel:
    """A compiled function that all threads of torch's pool run together.

    Args:
        compiled: by numba's `cfunc`; takes the address of 64-bit numbers: `NUM_COMMON`, then its own.
    """

    def __init__(self, compiled: Any) -> None:
        self._entry, self._run = compiled.address, compiled.ctypes
        self._openmp = openmp()
        self._thread_number = ctypes.cast(self._openmp.omp_get_thread_num, ctypes.c_void_p).value or 0

    def prepare(self, *numbers: int) -> Any:
        """What `run` takes, once, for a call with these numbers."""
        threads = torch.get_num_threads()
        count = NUM_COMMON + len(numbers)
        args = (ctypes.c_int64 * (count + threads * COUNTER_PITCH))(threads, self._thread_number, 0, *numbers)
        args[NUM_COMMON - 1] = ctypes.addressof(args) + count * 8
        return args

    def run(self, args: Any) -> None:
        """Run, on as many threads as torch used when the call was prepared."""
        threads = args[0]
        if threads == 1:
            self._run(ctypes.addressof(args))
        else:
            self._openmp.GOMP_parallel(self._entry, ctypes.addressof(args), threads, 0)


class Queue:
    """Calls of kernels that have yet to run, in this order.

    Preparing several calls and then running them takes less time than one after the other: Python is several times
    slower after a kernel, which leaves little of what it needs in the processor's cache.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self._held: list[Any] = []

    def add(self, kernel: Kernel, *numbers: int, holds: tuple[Any, ...]) -> None:
        """Queue a call, and hold on to what its numbers are addresses of."""
        self._calls.append((kernel.run, (kernel.prepare(*numbers),)))
        self._held.append(holds)

    def then(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function once all that is queued has run."""
        self._calls.append((function, args))

    def run(self) -> None:
        """Run what is queued: from then on results are there, until then nobody may read them."""
        for function, args in self._calls:
            function(*args)
        self._calls.clear()
        self._held.clear()


@functools.cache
def openmp() -> Any:
    """The GNU OpenMP library that torch runs on, None where it uses another one."""
    try:
        with open('/proc/self/maps') as maps:
            paths = {line.split()[-1] for line in maps if 'libgomp' in line}
    except OSError:
        return None
    if len(paths) > 1:
        paths = {path for path in paths if '/torch' in path}
    if len(paths) != 1:
        return None
    library = ctypes.CDLL(paths.pop())
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


@functools.cache
def features() -> frozenset[str]:
    """What the processor can do, in LLVM's words; empty without numba."""
    try:
        import llvmlite.binding
    except ImportError:
        _logger.info('numba is not installed: sparse execution on the CPU is slower.')
        return frozenset()
    return frozenset(name for name, has in llvmlite.binding.get_host_cpu_features().items() if has)


@functools.cache
def intrinsics() -> Any:
    """What kernels are built with: functions for compiled code, and helpers that write code into an LLVM builder."""
    from llvmlite import ir
    from numba import extending, types

    intrinsic: Any = extending.intrinsic
    number = ir.IntType(64)

    def load(builder: Any, address: Any, kind: Any) -> Any:
        return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)

    def store(builder: Any, value: Any, address: Any) -> None:
        builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)

    @intrinsic
    def take_ticket(typing_context: Any, counter: Any) -> Any:
        """Add one to the number at an address, return what it was."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = builder.inttoptr(args[0], number.as_pointer())
            return builder.atomic_rmw('add', address, number(1), 'monotonic')

        return types.int64(types.int64), codegen

    @intrinsic
    def call(typing_context: Any, function: Any) -> Any:
        """What the function at an address returns, an int."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.IntType(32), [])
            return builder.sext(builder.call(builder.inttoptr(args[0], kind.as_pointer()), []), number)

        return types.int64(types.int64), codegen

    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        """The address as what `carray` takes."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

        return types.voidptr(types.int64), codegen

    return SimpleNamespace(load=load, store=store, take_ticket=take_ticket, call=call, pointer=pointer)
