"""What sparse execution runs: the operations of a network, in which what belongs together is fused."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from .fold import Geometry, fold_norm, geometry_of


@dataclasses.dataclass
class Operation:
    """One operation; values are known by the names of the nodes in the trace.

    Attributes:
        inputs: the values that it reads.
        output: the value that it writes.
        layer: the gated layer whose kept channels the output holds; None: all channels.
    """

    modules: ClassVar[tuple[str, ...]] = ()
    """Fields that hold modules of the network."""

    inputs: list[str]
    output: str
    layer: int | None = None


@dataclasses.dataclass
class Convolve(Operation):
    """`activation(norm(conv(x)) * factors + residual) * gate`, each but the convolution only if there is one.

    With a gate but no activation, the gate is left to a `Scale` that follows.

    Attributes:
        conv: convolution, or linear layer, which is a 1x1 convolution of channels-last maps.
        norm: batch norm.
        factors: returns one for each output, as layer scale has them.
        activation: '', 'relu' or 'gelu'.
    """

    modules = ('conv', 'norm', 'factors')

    conv: Any = None
    norm: nn.Module | None = None
    factors: Callable[[], Tensor] | None = None
    residual: str | None = None
    activation: str = ''

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight (O, I, kh, kw) and bias (O,), norm and factors folded in."""
        return fold_norm(self.conv, self.norm, None if self.factors is None else self.factors())

    @property
    def geometry(self) -> Geometry:
        """How the kernel moves."""
        return geometry_of(self.conv)


@dataclasses.dataclass
class Pool(Operation):
    """The largest value under a kernel; channels behind those of the input are zero.

    Attributes:
        window: kernel, padding, stride and dilation, each (vertical, horizontal).
        extra_channels: how many more than the input the output has.
    """

    window: tuple[tuple[int, int], ...] = ()
    extra_channels: int = 0


@dataclasses.dataclass
class Depthwise(Operation):
    """`norm(conv(x))` of all channels, each only if there is one.

    Attributes:
        conv: a convolution with one filter for each channel.
        norm: a layer norm over the channels of each pixel.
    """

    modules = ('conv', 'norm')

    conv: Any = None
    norm: Any = None


@dataclasses.dataclass
class Norms(Operation):
    """The Euclidean norm over all positions of each kept channel."""


@dataclasses.dataclass
class Respond(Operation):
    """Kept channels, and their norms as `Norms` finds them, to what `norm` makes of them with their gates."""

    modules = ('norm',)

    norm: Any = None


@dataclasses.dataclass
class Scale(Operation):
    """Kept channels times their gates."""


@dataclasses.dataclass
class Average(Operation):
    """The mean over all positions of each channel. Gating networks have it, which are no part of a trace."""


@dataclasses.dataclass
class Softmax(Operation):
    """Channels to positive ones that sum to one. Gating networks have it."""


@dataclasses.dataclass
class Call(Operation):
    """Anything else, by torch.

    Attributes:
        function: what is called.
        arguments: its positional arguments and keywords, nodes in them standing for their values.
        each: called for the kept channels of each image rather than for all channels of all images.
    """

    modules = ('function',)

    function: Callable[..., Any] = operator.pos
    arguments: tuple[Any, Any] = ((), {})
    each: bool = False

    def run(self, trace: 'Trace', values: dict[str, Any], gates: Sequence[Tensor]) -> Any:
        """What it returns for these values of its inputs, and gates of all layers."""

        def value(node: fx.Node) -> Any:
            if node.name in trace.gates:
                return gates[trace.gates[node.name]]
            name = trace.names[node]
            wide = f'{name}_widened'
            return values[wide if wide in self.inputs else name]

        args, kwargs = fx.map_arg(self.arguments, value)
        return self.function(*args, **kwargs)

    def reading(self, inputs: list[str]) -> 'Call':
        """The same on other values."""
        return dataclasses.replace(self, inputs=inputs)


@dataclasses.dataclass
class Trace:
    """The operations of a network, in order.

    Attributes:
        operations: as they run.
        image: the value that holds the images.
        result: the value of `forward_features`.
        taps: module name to the value that is there when the module has run, of those that `feature_info` names.
        names: the value of each node.
        gates: node to the gated layer whose gates it stands for.
        view: of the network, whose modules the operations hold.
        head: what leads from the result to the logits; none if torch must run it.
        called: the modules that the head calls.
    """

    operations: list[Operation]
    image: str
    result: str
    taps: dict[str, str]
    names: dict[fx.Node, str]
    gates: dict[str, int]
    view: Any
    head: Sequence[Operation] = ()
    called: Sequence[str] = ()

    def on(self, view: Any) -> 'Trace':
        """The same trace on another view of the network."""
        paths = {module: path for path, module in self.view.named_modules()}

        def moved(part: Any) -> Any:
            if isinstance(part, Attribute):
                return Attribute(view, part.name)
            if isinstance(part, ChannelsLast):
                return ChannelsLast(moved(part.function))
            return view.get_submodule(paths[part]) if isinstance(part, nn.Module) else part

        operations, head = (
            [dataclasses.replace(op, **{name: moved(getattr(op, name)) for name in op.modules}) for op in found]
            for found in (self.operations, self.head)
        )
        return dataclasses.replace(self, operations=operations, head=head, view=view)


@dataclasses.dataclass
class Attribute:
    """Reads a tensor of a network."""

    view: Any
    name: str

    def __call__(self) -> Any:
        return operator.attrgetter(self.name)(self.view)


@dataclasses.dataclass
class ChannelsLast:
    """Calls a function that takes and gives maps (B, H, W, C) on maps (B, C, H, W)."""

    function: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = tuple(a.permute(0, 2, 3, 1) if isinstance(a, Tensor) and a.ndim == 4 else a for a in args)
        return self.function(*args, **kwargs).permute(0, 3, 1, 2)
