"""Counts a compiled program's kernels, bytes and collectives from its text, for any device.

Bytes are those that kernels read from and write to memory: the operands and results of every
top-level instruction. Tuples, bitcasts, parameters and constants move nothing. Of an array that is
sliced or updated in place, only the slice counts.

`compiled.cost_analysis()` is not enough, as tests/test_hlo.py shows with jax 0.10 on CPUs:

  - It counts the body of a loop once; here it counts once for each iteration.
  - It counts an array whole if a fusion gathers rows of it; here the rows count.
  - It adds element-wise operations to the flops; here only matrix products and convolutions count.
  - It gives totals only: no kernels, collectives, copies, scatters, or donated arguments.

On matrix products without a loop both agree exactly.
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
      name: Origin in the model if the compiler kept it, otherwise the instruction's own name.
      bytes: Bytes read and written by one run.
      flops: Operations of its convolutions and matrix products in one run.
      cycles: Cycles as the compiler estimates them; TPUs only.
      runs: Number of runs in one run of the program.
    """

    name: str
    op: str
    bytes: int
    flops: float
    cycles: int
    runs: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """All communication of one kind between `devices` devices in one run of the program.

    Attributes:
      count: Number of operations; operations that the compiler combined count as one.
      bytes: Bytes on each device, of all operations: the operands, or the result of a gather.
      pairs: Number of asynchronous operations, which run beside other kernels.
    """

    op: str
    devices: int
    count: int
    bytes: int
    pairs: int


@dataclasses.dataclass(frozen=True)
class Array:
    """A result in memory or inside a fusion; `name` is its origin."""

    op: str
    type: str
    bytes: int
    name: str


@dataclasses.dataclass(frozen=True)
class Counts:
    """Figures of a program.

    Attributes:
      kernels: All kernels; a kernel in a loop is listed once, with its runs.
      float32: Arrays of float32 that a kernel writes, the largest first.
      scatters: Scatters and select-and-scatters, also inside fusions, the largest first.
      moves: Transposes and copies, also inside fusions, the largest first.
      donated: Numbers of the parameters whose memory a result reuses.
      collectives: Communication by kind and number of devices.
    """

    kernels: tuple[HloKernel, ...]
    float32: tuple[Array, ...]
    scatters: tuple[Array, ...]
    moves: tuple[Array, ...]
    donated: frozenset[int]
    collectives: tuple[Collective, ...]

    @property
    def launches(self) -> int:
        """Returns the number of kernels that one run of the program starts."""
        return sum(kernel.runs for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """Returns the bytes that one run of the program moves."""
        return sum(kernel.bytes * kernel.runs for kernel in self.kernels)


def count(text: str) -> Counts:
    """Returns the figures of a program.

    Args:
      text: Text of the compiled program, `compiled.as_text()`.

    Raises:
      ValueError: The text is not that of a compiled program.
    """
    computations, entry = hlo_text.parse(text)
    kernels: list[HloKernel] = []
    float32: list[Array] = []
    collectives: list[Collective] = []
    for computation, x, runs in _kernels(computations, entry, 1):
        moved = _bytes(computations, computation, x)
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
    """Returns the size of a group of devices: [groups,size]<=[...] or {{0,1},{2,3}}."""
    if match := re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes):
        return int(match[2])
    if match := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
        return match[1].count(',') + 1
    counts = re.findall(r'(?:num_partitions|replica_count)=(\d+)', text.split('\n', 1)[0])
    return math.prod(map(int, counts))


def _largest(arrays: list[Array]) -> tuple[Array, ...]:
    return tuple(sorted(arrays, key=lambda x: -x.bytes))


def _kernels(
    computations: dict[str, Computation], name: str, runs: int
) -> Iterator[tuple[Computation, Instruction, int]]:
    """Yields every kernel with its number of runs; a fusion is one kernel.

    A loop of unknown length counts as one iteration, and all branches of a conditional count.
    """
    for x in computations[name].values():
        if x.op == 'while':
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', x.attributes)
            for body in x.called('body'):
                yield from _kernels(computations, body, runs * (int(trips[1]) if trips else 1))
        elif x.op in ('call', 'conditional', 'async-start'):
            for body in x.called('to_apply', 'calls', r'\w+_computations?'):
                yield from _kernels(computations, body, runs)
        elif x.op not in _FREE and not x.op.endswith('-done'):
            yield computations[name], x, runs


def _bytes(computations: dict[str, Computation], computation: Computation, x: Instruction) -> int:
    """Returns the bytes that a kernel reads and writes."""
    sizes = [size(computation[name].type) for name in x.operands]
    if x.op.endswith('-start'):  # its own type may repeat the operands
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
    """Returns the bytes that an instruction reads of its operand `name` of `whole` bytes."""
    first = name == use.operands[0]
    if first and use.op in _SLICES:
        return size(use.type)
    return 0 if first and use.op == 'dynamic-update-slice' else whole


def _written(computation: Computation, root: Instruction) -> int:
    """Returns the bytes that a kernel writes, given its last instruction."""
    if root.op == 'tuple':
        return sum(_written(computation, computation[name]) for name in root.operands)
    if root.op == 'dynamic-update-slice':
        return size(computation[root.operands[1]].type)
    return size(root.type)


def _flops(computation: Computation, x: Instruction) -> float:
    """Returns the operations of a convolution or matrix product; zeros of a padding count too."""
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
    """Returns the dimensions of a convolution's input, filters and result, one letter each."""
    match = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', x.attributes)
    return list(match.groups()) if match else []
