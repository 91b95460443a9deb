"""Ragged convolutions on a GPU: a batch whose images keep different experts runs as one, on Triton kernels.

Not measured on a GPU yet: the kernels run in Triton's interpreter and compile for an H200. `sparsify(calibrate=...)`
times them against one dense group of all images and lets them run only where they are faster.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SLOTS = 16
"""Numbers of channels are multiples of this, which tensor cores need for full speed."""
PACK_POSITIONS = 512
"""From this many output positions on, the weights of each image are gathered into memory first. Otherwise every tile of
positions gathers them anew, element by element, which costs about as much as the products of a tile of 128 do."""
TILES = (
    {'BLOCK_M': 128, 'BLOCK_N': 128, 'num_warps': 8, 'num_stages': 3},
    {'BLOCK_M': 128, 'BLOCK_N': 64, 'num_warps': 4, 'num_stages': 3},
    {'BLOCK_M': 64, 'BLOCK_N': 128, 'num_warps': 4, 'num_stages': 3},
    {'BLOCK_M': 64, 'BLOCK_N': 64, 'num_warps': 4, 'num_stages': 4},
)
"""Positions (M) and output channels (N) of one program; the fastest for a shape is found at its first use."""

_logger = logging.getLogger(__name__)
_fastest: dict[tuple[object, ...], dict[str, int]] = {}


def available(x: Tensor) -> bool:
    """Whether these images can run on the ragged kernels: several of them, on a CUDA device, with Triton."""
    return (
        len(x) > 1
        and x.device.type == 'cuda'
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and not torch.is_autocast_enabled('cuda')
        and _runs(x.device)
    )


@functools.cache
def kernels() -> Any:
    """The module `ragged_kernels`, which needs Triton."""
    from . import ragged_kernels

    return ragged_kernels


@functools.cache
def _runs(device: torch.device) -> bool:
    """Whether Triton is there and works: it needs a C compiler, for one thing, which not every machine has."""
    kept = RaggedKept(
        torch.zeros(1, SLOTS, dtype=torch.int32, device=device),
        torch.full((1,), SLOTS, dtype=torch.int32, device=device),
    )
    try:
        with torch.cuda.device_of(kept.experts):
            return bool(_packed(torch.ones(1, 1, 1, device=device), kept, kept).eq(1).all())
    except Exception as error:
        _logger.warning('Batches of different images run without ragged kernels, as Triton does not work: %s', error)
        return False


def rounded(count: int) -> int:
    """The next multiple of `SLOTS`."""
    return -(-count // SLOTS) * SLOTS


class RaggedKept(NamedTuple):
    """Experts of one gated layer that each image of a batch keeps, packed to the front of P slots.

    Slots beyond an image's own count, up to the next multiple of `SLOTS`, hold closed experts, or expert 0, with a gate
    of zero: their activations are zero. What lies beyond in memory is never read.

    Attributes:
        experts: expert in each slot, int32, shape (B, P).
        counts: slots of each image, multiples of `SLOTS`, int32, shape (B,).
    """

    experts: Tensor
    counts: Tensor

    @property
    def num_slots(self) -> int:
        return self.experts.shape[1]

    def widened(self, x: Tensor, width: int) -> Tensor:
        """All channels of activations (B, P, H, W), shape (B, width, H, W): those not kept are zero."""
        unused = torch.arange(self.num_slots, device=x.device) >= self.counts[:, None]
        x = x.masked_fill(unused[:, :, None, None], 0)
        out = x.new_zeros(x.shape[0], width, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
        return out.scatter_add_(1, self.experts.long()[:, :, None, None].expand(x.shape), x)


class _Layout(NamedTuple):
    """All layers side by side, each filled up to a multiple of `SLOTS`.

    Attributes:
        starts: first column of each layer, on the host.
        columns: column of each expert, int64.
        layers: layer of each column, int16.
        first: first column of the layer of each column, int64.
        ends: the columns at which each layer starts and ends, (2, layers), int64.
        filled: columns that are no expert, boolean; None if there are none.
    """

    starts: list[int]
    columns: Tensor
    layers: Tensor
    first: Tensor
    ends: Tensor
    filled: Tensor | None


@functools.lru_cache(16)
def _layout(widths: tuple[int, ...], device: torch.device) -> _Layout:
    padded = np.array([rounded(width) for width in widths])
    ends = padded.cumsum()
    starts = ends - padded
    columns = np.concatenate([start + np.arange(width) for start, width in zip(starts, widths, strict=True)])
    filled = np.ones(ends[-1], dtype=bool)
    filled[columns] = False
    layers = np.repeat(np.arange(len(widths), dtype=np.int16), padded)
    return _Layout(
        starts=starts.tolist(),
        columns=torch.from_numpy(columns).to(device),
        layers=torch.from_numpy(layers).to(device),
        first=torch.from_numpy(starts[layers]).to(device),
        ends=torch.from_numpy(np.stack([starts, ends])).to(device),
        filled=torch.from_numpy(filled).to(device) if filled.any() else None,
    )


class RaggedBatch:
    """The experts that every image of a batch keeps, on the device, and what the host needs to know of them.

    Args:
        gates: for each gated layer (B, C_l), non-negative.

    Attributes:
        counts: kept experts, (layers, B), on the host.
        union: for each layer, which experts any image keeps, boolean (C_l,), on the host.
    """

    def __init__(self, gates: Sequence[Tensor]) -> None:
        widths = tuple(gate.shape[1] for gate in gates)
        self._layout = layout = _layout(widths, gates[0].device)
        packed = torch.cat(list(gates), 1).float()
        if layout.filled is not None:
            packed = packed.new_zeros(len(packed), len(layout.filled)).index_copy_(1, layout.columns, packed)
        kept = packed > 0
        # One stable sort, by layer and kept before closed, packs the experts of all layers.
        order = (2 * layout.layers + ~kept).argsort(dim=1, stable=True)
        self._gates = packed.gather(1, order)
        if layout.filled is not None:
            order = torch.where(layout.filled[order], layout.first, order)
        self._experts = (order - layout.first).int()
        sums = F.pad(kept.cumsum(1, dtype=torch.int32), (1, 0))
        counts = (sums.index_select(1, layout.ends[1]) - sums.index_select(1, layout.ends[0])).t().contiguous()
        self._slots = (counts + SLOTS - 1) // SLOTS * SLOTS
        union = kept.any(0).index_select(0, layout.columns)
        host = torch.cat([counts.flatten(), union.int()]).cpu().numpy()
        self.counts = host[: counts.numel()].reshape(counts.shape)
        self.union = np.split(host[counts.numel() :] > 0, np.cumsum(widths)[:-1])

    def kept(self, layers: slice) -> tuple[list[RaggedKept], list[Tensor]]:
        """The kept experts of these layers, and the gates of their slots, (B, P), float32."""
        kept, gates = [], []
        starts = self._layout.starts[layers]
        for start, counts, slots in zip(starts, self.counts[layers], self._slots[layers], strict=True):
            columns = slice(start, start + max(SLOTS, rounded(int(counts.max()))))
            kept.append(RaggedKept(self._experts[:, columns], slots))
            gates.append(self._gates[:, columns])
        return kept, gates


def convolve(
    conv: Any,
    x: Tensor,
    reads: RaggedKept | None,
    writes: RaggedKept | None,
    gate: Tensor | None,
    relu: bool,
    add_to: Tensor | None,
) -> Tensor:
    """`GatherConv.__call__` where at least one side of the convolution is ragged; leaves `add_to` as it is."""
    x = x.contiguous(memory_format=torch.channels_last)
    if add_to is not None:
        add_to = add_to.contiguous(memory_format=torch.channels_last)
    height, width = conv.out_size(x)
    images, in_pitch = x.shape[:2]
    out_pitch = conv.out_channels if writes is None else writes.num_slots
    y = torch.empty(
        (images, out_pitch, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    if x.numel() == 0 or y.numel() == 0:
        return y
    taps = conv.taps
    packed = False
    with torch.cuda.device_of(x):
        if reads is not None and writes is not None and height * width >= PACK_POSITIONS:
            packed = True
            weight = _packed(conv.by_output(), reads, writes)
            steps = (taps * in_pitch, in_pitch, 1)
        elif writes is None:
            # Whole rows of outputs, one for each input that is kept.
            weight = conv.by_input()
            steps = (1, conv.in_channels * conv.out_channels, conv.out_channels)
        else:
            weight = conv.by_output()
            steps = (taps * conv.in_channels, conv.in_channels, 1)
        slots = writes if writes is not None else reads
        assert slots is not None
        args = (
            x,
            weight,
            conv.bias,
            gate,
            add_to,
            y,
            reads and reads.experts,
            writes and writes.experts,
            reads and reads.counts,
            writes and writes.counts,
            x.shape[2],
            x.shape[3],
            height,
            width,
            in_pitch,
            out_pitch,
            slots.experts.stride(0),
            out_pitch * taps * in_pitch,
            *steps,
        )
        (pad_h, pad_w), (stride_h, stride_w), (dilation_h, dilation_w) = conv.geometry
        constants = {
            'TAPS': taps,
            'KERNEL_W': conv.kernel[1],
            'PAD_H': pad_h,
            'PAD_W': pad_w,
            'STRIDE_H': stride_h,
            'STRIDE_W': stride_w,
            'DILATION_H': dilation_h,
            'DILATION_W': dilation_w,
            'PACKED': packed,
            'RELU': relu,
            'PRECISION': _precision(),
            'UPCAST': kernels().INTERPRETED,
            'BLOCK_K': 128 // x.element_size(),
        }

        def launch(tile: dict[str, int]) -> None:
            tiles = -(-height * width // tile['BLOCK_M']) * -(-out_pitch // tile['BLOCK_N'])
            kernels().convolve[(tiles, images)](*args, **constants, **tile)

        # Not the widths of this batch: they change with every one.
        sides = (conv.in_channels, conv.out_channels, reads is None, writes is None)
        key = (x.device, x.dtype, sides, *constants.values(), (height * width).bit_length())
        launch(_tile(key, launch))
    return y


def _precision() -> str:
    """What torch's own convolutions may do with float32."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return 'tf32' if convolutions.fp32_precision == 'tf32' else 'ieee'


def _packed(stored: Tensor, reads: RaggedKept, writes: RaggedKept) -> Tensor:
    """Weights (O, T, I) gathered for every image: (B, slots written, T, slots read)."""
    images, (_, taps, in_channels) = len(reads.experts), stored.shape
    packed = stored.new_empty(images, writes.num_slots, taps, reads.num_slots)
    kernels().pack[(writes.num_slots, images)](
        stored,
        packed,
        reads.experts,
        writes.experts,
        reads.counts,
        writes.counts,
        in_channels,
        reads.num_slots,
        writes.num_slots,
        reads.experts.stride(0),
        TAPS=taps,
        BLOCK=128,
    )
    return packed


def _tile(key: tuple[object, ...], launch: Callable[[dict[str, int]], None]) -> dict[str, int]:
    """The fastest of `TILES` for this shape."""
    tile = _fastest.get(key)
    if tile is None:
        tile = TILES[0]
        if len(TILES) > 1:
            tile = min(TILES, key=lambda candidate: kernels().milliseconds(functools.partial(launch, candidate)))
        _fastest[key] = tile
    return tile
