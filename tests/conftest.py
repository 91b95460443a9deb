import os
from collections.abc import Iterator

import pytest

# Some virtual machines advertise AMX and then trap on its instructions, which kills the interpreter in bfloat16.
# oneDNN reads this once, when torch is first used; it is an upper bound, so older processors are not affected.
os.environ.setdefault('ONEDNN_MAX_CPU_ISA', 'AVX512_CORE_BF16')
# One worker runs on each core: more threads than that only wait for each other.
os.environ.setdefault('OMP_NUM_THREADS', '1')
# Native code compares every address with the memory that it must lie in.
os.environ.setdefault('DEEPMOE_CHECKED', '1')


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same weights in each run and order of tests: with some random ones, rounding alone exceeds tolerances."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_threads_as_before() -> Iterator[None]:
    """A test may ask for more threads, which the next one does not get."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches run sparsely however small the network: without this, tests of small networks would run them masked."""
    monkeypatch.setattr('deepmoe_plugin.sparse.engine.SMALL_WORK', 0)
