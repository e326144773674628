"""What a compiled program does, counted from its text (`compiled.as_text()`), for any device.

Bytes are those that kernels read from and write to memory: the operands and results of every
top-level instruction, of which tuples, bitcasts, parameters and constants move nothing. A loop
counts as often as it turns; of an array that is sliced or updated in place, the slice counts.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from simsiam_jax.tools.benchmark import hlo_text
from simsiam_jax.tools.benchmark.hlo_text import Computation, Instruction, size

_FREE = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id',
    'replica-id', 'opt-barrier', 'async-done', 'async-update',
}  # fmt: skip
_COLLECTIVES = {
    'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute',
    'collective-broadcast', 'ragged-all-to-all',
}  # fmt: skip
_SLICES = {'slice', 'dynamic-slice', 'gather'}


@dataclasses.dataclass(frozen=True)
class HloKernel:
    """A top-level instruction.

    Attributes:
      name: its origin in the model where the compiler kept it, its own name otherwise.
      bytes: read and written by one run.
      flops: of its convolutions and matrix products, in one run.
      cycles: as the compiler estimates them; TPUs alone.
      runs: in one run of the program.
    """

    name: str
    op: str
    bytes: int
    flops: float
    cycles: int
    runs: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one kind between so many devices, in one run of the program.

    Attributes:
      count: of the operations; those that the compiler made into one are one.
      bytes: on each device, of all of them: what is reduced or sent, or of a gather the result.
      pairs: of these operations are begun and awaited apart, so that others can run meanwhile.
    """

    op: str
    devices: int
    count: int
    bytes: int
    pairs: int


@dataclasses.dataclass(frozen=True)
class Array:
    """A result in memory, or one that a fusion computes on its way: op, type, bytes, origin."""

    op: str
    type: str
    bytes: int
    name: str


@dataclasses.dataclass(frozen=True)
class Counts:
    """A program's figures.

    Attributes:
      kernels: all of them; a loop's body stands once, with its runs.
      float32: arrays of float32 that a kernel writes, the largest first.
      scatters: scatter and select-and-scatter anywhere.
      moves: transposes and copies anywhere, the largest first.
      donated: parameters whose memory a result takes over.
    """

    kernels: tuple[HloKernel, ...]
    float32: tuple[Array, ...]
    scatters: tuple[Array, ...]
    moves: tuple[Array, ...]
    donated: frozenset[int]
    collectives: tuple[Collective, ...]

    @property
    def launches(self) -> int:
        """Kernels that a run of the program starts."""
        return sum(kernel.runs for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """Moved by a run of the program."""
        return sum(kernel.bytes * kernel.runs for kernel in self.kernels)


def count(text: str) -> Counts:
    """The figures of a program."""
    computations, entry = hlo_text.parse(text)
    kernels: list[HloKernel] = []
    float32: list[Array] = []
    collectives: list[Collective] = []
    for computation, x, runs in _run(computations, entry, 1):
        moved = _moved(computations, computation, x)
        inside = computations[x.called('calls')[0]] if x.op == 'fusion' else {}
        flops = sum(_flops(inside, y) for y in inside.values()) or _flops(computation, x)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', x.attributes)
        kernels.append(
            HloKernel(x.origin, x.op, moved, flops, int(cycles[1]) if cycles else 0, runs)
        )
        float32 += [
            Array(x.op, match[0], size(match[0]), x.origin)
            for match in hlo_text.ARRAY.finditer(x.type)
            if match[1] == 'f32'
        ]
        if x.op.removesuffix('-start') in _COLLECTIVES:
            collectives.append(_collective(computation, x, runs, text))
    everywhere = [x for computation in computations.values() for x in computation.values()]
    arrays = [Array(x.op, x.type, size(x.type), x.origin) for x in everywhere]
    donated = re.search(r'input_output_alias=\{(.*?)\}(?:, \w+=|$)', text.split('\n', 1)[0])
    return Counts(
        kernels=tuple(kernels),
        float32=_largest(float32),
        scatters=_largest([x for x in arrays if x.op in ('scatter', 'select-and-scatter')]),
        moves=_largest([x for x in arrays if x.op in ('transpose', 'copy', 'copy-start')]),
        donated=frozenset(map(int, re.findall(r'\((\d+), \{', donated[1] if donated else ''))),
        collectives=_merged(collectives),
    )


def _collective(computation: Computation, x: Instruction, runs: int, text: str) -> Collective:
    op, devices = x.op.removesuffix('-start'), _devices(x.attributes, text)
    sent = sum(size(computation[name].type, on_chip=True) for name in x.operands)
    sent *= devices if op == 'all-gather' else 1
    return Collective(op, devices, runs, runs * sent, runs * (op != x.op))


def _merged(collectives: list[Collective]) -> tuple[Collective, ...]:
    groups: dict[tuple[str, int], list[Collective]] = {}
    for c in collectives:
        groups.setdefault((c.op, c.devices), []).append(c)
    return tuple(
        Collective(
            *key, sum(c.count for c in group), sum(c.bytes for c in group),
            sum(c.pairs for c in group),
        )
        for key, group in groups.items()
    )  # fmt: skip


def _devices(attributes: str, text: str) -> int:
    """Devices that communicate with each other: [groups,size]<=[...] or {{0,1},{2,3}}."""
    if match := re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes):
        return int(match[2])
    if match := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
        return match[1].count(',') + 1
    counts = re.findall(r'(?:num_partitions|replica_count)=(\d+)', text.split('\n', 1)[0])
    return math.prod(map(int, counts))


def _largest(arrays: list[Array]) -> tuple[Array, ...]:
    return tuple(sorted(arrays, key=lambda x: -x.bytes))


def _run(
    computations: dict[str, Computation], name: str, runs: int
) -> Iterator[tuple[Computation, Instruction, int]]:
    """Every kernel with how often it runs; what a fusion holds is its kernel's."""
    for x in computations[name].values():
        if x.op == 'while':
            turns = re.search(r'known_trip_count":\{"n":"(\d+)"', x.attributes)
            for body in x.called('body'):
                yield from _run(computations, body, runs * (int(turns[1]) if turns else 1))
        elif x.op in ('call', 'conditional', 'async-start'):
            for body in x.called('to_apply', 'calls', r'\w+_computations?'):
                yield from _run(computations, body, runs)
        elif x.op not in _FREE and not x.op.endswith('-done'):
            yield computations[name], x, runs


def _moved(computations: dict[str, Computation], computation: Computation, x: Instruction) -> int:
    """Bytes that a kernel reads and writes."""
    sizes = [size(computation[name].type) for name in x.operands]
    if x.op.endswith('-start'):  # its own type may hold the operands again
        done = next(y for y in computation.values() if x.name in y.operands)
        return sum(sizes) + size(done.type)
    inside, root, names = [x], x, x.operands
    if x.op == 'fusion':
        computation = computations[x.called('calls')[0]]
        inside = list(computation.values())
        root = next(y for y in inside if y.root)
        parameters = [y for y in inside if y.op == 'parameter']
        names = [y.name for y in sorted(parameters, key=lambda y: int(y.arguments))]
    read = 0
    for name, whole in zip(names, sizes, strict=True):
        read += min(whole, sum(_used(y, name, whole) for y in inside if name in y.operands))
    return read + _written(computation, root)


def _used(use: Instruction, name: str, whole: int) -> int:
    first = name == use.operands[0]
    if first and use.op in _SLICES:
        return size(use.type)
    return 0 if first and use.op == 'dynamic-update-slice' else whole


def _written(computation: Computation, root: Instruction) -> int:
    if root.op == 'tuple':
        return sum(_written(computation, computation[name]) for name in root.operands)
    if root.op == 'dynamic-update-slice':
        return size(computation[root.operands[1]].type)
    return size(root.type)


def _flops(computation: Computation, x: Instruction) -> float:
    """Operations of a convolution or matrix product; zeros of a padding count as well."""
    target = re.search(r'custom_call_target="__(cublas|cudnn)\$(\w+)', x.attributes)
    if x.op not in ('dot', 'convolution') and not target:
        return 0.0
    out = next(hlo_text.shapes(x.type))
    left, right = (next(hlo_text.shapes(computation[name].type)) for name in x.operands[:2])
    if x.op == 'convolution':
        window = re.search(r'window=\{size=([\dx]+)', x.attributes)
        spread = re.search(r'lhs_dilate=([\dx]+)', x.attributes)  # zeros between the elements
        taps, zeros = (
            math.prod(map(int, match[1].split('x'))) if match else 1 for match in (window, spread)
        )
        return 2 * math.prod(out) * taps * right[_labels(x)[1].index('i')] / zeros
    if not target or target[1] == 'cublas':  # [M, K] [K, N] -> [M, N]
        return 2 * math.sqrt(math.prod(left) * math.prod(right) * math.prod(out))
    result, filters = out, right
    if target[2] == 'convBackwardInput':
        result = left
    elif target[2] == 'convBackwardFilter':
        result, filters = right, out
    return 2 * math.prod(result) * math.prod(filters) / result[_labels(x)[2].index('f')]


def _labels(x: Instruction) -> list[str]:
    """Dimensions of a convolution's input, filters and result, a letter each."""
    match = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', x.attributes)
    return list(match.groups()) if match else []
