"""Builds the native program with the machine's own compiler, once for each machine, and finds torch's threads.

Kernels run in the OpenMP pool that torch has started already: a second pool would fight it for the cores.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from .layout import DEFINES, Header

SOURCES = Path(__file__).with_name('native')
FLAGS = ('-std=c++17', '-O2', '-march=native', '-ffp-contract=fast', '-fPIC', '-shared')
CHECKED = 'DEEPMOE_CHECKED'
"""Environment variable: where set, every address is compared with the memory that it must lie in, and the process ends
at the first that does not. Tests run so."""
MORE_FLAGS = 'DEEPMOE_CXXFLAGS'
"""Environment variable: more flags for the compiler, as those of a sanitizer (`make sanitize`)."""

_logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where what was built stays: `deepmoe_plugin` in the user's cache folder."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'deepmoe_plugin'


def compiler() -> str | None:
    """The C++ compiler: what CXX names, g++ or clang++; None without one."""
    named = os.environ.get('CXX')
    return next((path for name in (named, 'g++', 'clang++') if name and (path := shutil.which(name))), None)


def library() -> Any:
    """The native program; None where it cannot be built or run, which is said once."""
    return _found()[0]


def missing() -> str:
    """What keeps the native program from running here; '' if nothing does."""
    return _found()[1]


@functools.cache
def _found() -> tuple[Any, str]:
    command, reason = compiler(), ''
    if openmp() is None:
        reason = 'torch does not run on the OpenMP library of GNU here'
    elif command is None:
        reason = 'there is no C++ compiler (g++, clang++, or what CXX names)'
    else:
        checked = ('-DCHECKED',) if os.environ.get(CHECKED) else ()
        flags = (*FLAGS, *DEFINES, *checked, *os.environ.get(MORE_FLAGS, '').split())
        try:
            return ctypes.CDLL(str(_built(command, flags))), ''
        except (OSError, subprocess.SubprocessError) as error:
            reason = f'{command} does not build it: {getattr(error, "stderr", None) or error}'
    _logger.warning('Sparse execution on the CPU runs by torch, which is slower: %s.', reason)
    return None, reason


def _built(command: str, flags: tuple[str, ...]) -> Path:
    """The library, from the cache folder or built anew; written aside first, as other processes may build it too."""
    # A home folder may be shared by different machines.
    facts = [path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in ('.cpp', '.h')]
    facts += [command, *flags, platform.machine(), *features()]
    facts.append(subprocess.run([command, '--version'], capture_output=True, text=True, check=True).stdout)
    name = hashlib.sha256('\n'.join(facts).encode()).hexdigest()[:24]
    path = cache_folder() / f'program-{name}.so'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # A sanitizer's library that is loaded into Python would make the compiler slow.
        environment = {name: value for name, value in os.environ.items() if name != 'LD_PRELOAD'}
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            subprocess.run(
                [command, *flags, str(SOURCES / 'program.cpp'), '-o', str(part)],
                capture_output=True,
                text=True,
                check=True,
                env=environment,
            )
            part.replace(path)
    return path


@functools.cache
def features() -> tuple[str, ...]:
    """What the processor can do, in the words of Linux; empty where it does not say."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return ()
    line = next((line for line in lines if line.startswith(('flags', 'Features'))), '')
    return tuple(line.partition(':')[2].split())


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
    found = ctypes.CDLL(paths.pop())
    found.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.GOMP_parallel.restype = None
    return found


def run(header: Header, lines_bytes: int) -> bool:
    """Run the native program on torch's threads; false if weights that it asks for were not there: nothing ran.

    Args:
        header: of the program.
        lines_bytes: what the team of threads needs, see `layout`.
    """
    ctypes.memset(header.lines, 0, lines_bytes)  # the call before has left its own
    header.lacks = 0
    if header.num_threads == 1:
        library().deepmoe_run(ctypes.byref(header))
    else:
        start, header.thread_number, header.thread_count = _entries(library())
        openmp().GOMP_parallel(start, ctypes.byref(header), header.num_threads, 0)
    return not header.lacks


@functools.cache
def _entries(found: Any) -> tuple[int, int, int]:
    """Where the native program starts, and OpenMP's functions for the number of a thread and of all threads."""
    functions = found.deepmoe_run, openmp().omp_get_thread_num, openmp().omp_get_num_threads
    start, number, count = map(_address_of, functions)
    return start, number, count


def _address_of(function: Any) -> int:
    """Where a function of a library lies."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0
