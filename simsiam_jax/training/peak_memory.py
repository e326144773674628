"""Estimates the peak memory of a program from its shapes, before it is compiled.

The estimate follows the traced program: the forward pass, then the backward pass, then the update.
A value is live from the operation that computes it to the last one that uses it. Elementwise
operations are fused into the operations that read them, as compilers do. Their results are
recomputed at each use, and stored only if a convolution, a matrix product or the like reads them.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import Literal

# Prefixes of the operations whose results are stored; the others are elementwise or move data.
_STORED = (
    *('conv_general', 'dot_general', 'reduce_', 'arg', 'cum', 'sort', 'top_k', 'gather', 'scatter'),
    *('select_and', 'dynamic_update', 'psum', 'pmax', 'all_', 'ppermute', 'random_', 'threefry'),
    *('scan', 'while', 'cond', 'custom_call', 'ffi_call', 'pure_callback', 'pallas_call'),
)
# Prefixes of the stored operations whose elementwise inputs are fused into them, not stored.
_READERS = ('reduce_sum', 'reduce_max', 'reduce_min', 'reduce_and', 'reduce_or', 'arg')
# Operations that only wrap other programs.
_INLINED = (
    *('jit', 'pjit', 'closed_call', 'core_call', 'custom_jvp_call', 'custom_vjp_call'),
    *('custom_vjp_call_jaxpr', 'remat', 'remat2', 'checkpoint', 'shard_map'),
)


@dataclasses.dataclass(frozen=True)
class _Operation:
    """An operation of a program.

    Attributes:
      name: Name of the primitive.
      inputs: Ids of the values that it reads.
      outputs: Ids of the values that it computes.
      inner: Peak memory of its own programs, in bytes.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    inner: int

    def stores(self) -> bool:
        """Returns whether the results are stored."""
        return self.name.startswith(_STORED)

    def needs_stored(self) -> bool:
        """Returns whether the inputs must be stored."""
        return self.stores() and not self.name.startswith(_READERS)


def peak_bytes(program: Any) -> int:
    """Returns peak bytes on a device, without the arguments and the results that replace them.

    Args:
      program: A jaxpr, such as jax.jit(f).trace(...).jaxpr; shapes within shard_map are those of
        one device.
    """
    sizes: list[int] = []  # bytes of each value, by its id
    program = getattr(program, 'jaxpr', program)
    arguments = [_new_value(sizes) for _ in (*program.constvars, *program.invars)]
    operations: list[_Operation] = []
    results = _flatten(program, arguments, sizes, operations)
    return _peak(operations, sizes, results)


def _new_value(sizes: list[int], aval: Any = None) -> int:
    """Returns the id of a new value; its size is 0 if it has no shape and type."""
    sizes.append(math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, 'dtype') else 0)
    return len(sizes) - 1


def _flatten(
    program: Any, arguments: Sequence[int], sizes: list[int], operations: list[_Operation]
) -> list[int]:
    """Appends the operations of the program and its inner programs; returns its results."""
    values = dict(zip((*program.constvars, *program.invars), arguments, strict=True))

    def read(atom: Any) -> int:
        if isinstance(atom, Literal):
            return _new_value(sizes)
        return values[atom]

    for equation in program.eqns:
        inputs = [read(atom) for atom in equation.invars]
        name = equation.primitive.name
        programs = list(_programs(equation.params))
        if name in _INLINED and len(programs) == 1:
            constants = [_new_value(sizes) for _ in programs[0].constvars]
            outputs = _flatten(programs[0], [*constants, *inputs], sizes, operations)
        else:
            outputs = [_new_value(sizes, variable.aval) for variable in equation.outvars]
            inner = max(map(peak_bytes, programs), default=0)
            operations.append(_Operation(name, tuple(inputs), tuple(outputs), inner))
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(atom) for atom in program.outvars]


def _programs(parameters: dict[str, Any]) -> Iterator[Any]:
    """Yields the programs among an operation's parameters."""
    for value in parameters.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            program = getattr(item, 'jaxpr', item)
            if hasattr(program, 'eqns'):
                yield program


def _peak(operations: list[_Operation], sizes: list[int], results: Sequence[int]) -> int:
    """Returns the highest sum of the sizes of stored values that are live at the same time."""
    stored = {x for operation in operations if operation.stores() for x in operation.outputs}
    stored |= {x for operation in operations if operation.needs_stored() for x in operation.inputs}
    # Stored values that a value is computed from; a stored value is its own source.
    sources: dict[int, frozenset[int]] = {}

    def sources_of(values: Sequence[int]) -> frozenset[int]:
        return frozenset().union(*(sources.get(x, frozenset([x])) for x in values))

    last_use: dict[int, int] = {}
    for index, operation in enumerate(operations):
        read = sources_of(operation.inputs)
        for output in operation.outputs:
            sources[output] = frozenset([output]) if output in stored else read
        if stored & set(operation.outputs):
            last_use |= dict.fromkeys(read, index)
    last_use |= dict.fromkeys(sources_of(results), len(operations))

    freed: dict[int, list[int]] = {}  # index of an operation -> values that it uses last
    for value, index in last_use.items():
        freed.setdefault(index, []).append(value)
    computed = {x for operation in operations for x in operation.outputs} & stored
    live = peak = 0
    for index, operation in enumerate(operations):
        live += sum(sizes[x] for x in operation.outputs if x in computed and x in last_use)
        peak = max(peak, live + operation.inner)
        live -= sum(sizes[x] for x in freed.get(index, ()) if x in computed)
    return peak
