"""What a program holds in memory at its highest, from its shapes alone, before it is compiled.

The program is read in the order in which it was traced: the forward pass, then the backward pass,
then the update. A value is held from where it is made to where it is last used. As compilers have
it, elementwise operations are part of the operation that reads them: their results are made again
where they are used, and stored only where a convolution, a matrix product or the like reads them.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import Literal

# Operations whose results are stored, by the beginnings of their names; all others are elementwise,
# or move what they are given.
_STORED = (
    *('conv_general', 'dot_general', 'reduce_', 'arg', 'cum', 'sort', 'top_k', 'gather', 'scatter'),
    *('select_and', 'dynamic_update', 'psum', 'pmax', 'all_', 'ppermute', 'random_', 'threefry'),
    *('scan', 'while', 'cond', 'custom_call', 'ffi_call', 'pure_callback', 'pallas_call'),
)
# Of these, those that read what is elementwise without its being stored.
_READERS = ('reduce_sum', 'reduce_max', 'reduce_min', 'reduce_and', 'reduce_or', 'arg')
# Operations that only hold other programs.
_INLINED = (
    *('jit', 'pjit', 'closed_call', 'core_call', 'custom_jvp_call', 'custom_vjp_call'),
    *('custom_vjp_call_jaxpr', 'remat', 'remat2', 'checkpoint', 'shard_map'),
)


@dataclasses.dataclass(frozen=True)
class _Operation:
    """Values are numbers; `inner` is what its own programs hold at their highest."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    inner: int

    def stores(self) -> bool:
        return self.name.startswith(_STORED)

    def needs_stored(self) -> bool:
        return self.stores() and not self.name.startswith(_READERS)


def peak_bytes(program: Any) -> int:
    """Bytes on a device, beside the program's arguments and what it returns in their place.

    Args:
      program: a jaxpr, as of jax.jit(f).trace(...).jaxpr; of shard_map a device's part counts.
    """
    sizes: list[int] = []
    program = getattr(program, 'jaxpr', program)
    arguments = [_number(sizes) for _ in (*program.constvars, *program.invars)]
    operations: list[_Operation] = []
    results = _flatten(program, arguments, sizes, operations)
    return _peak(operations, sizes, results)


def _number(sizes: list[int], aval: Any = None) -> int:
    """A new value of this shape and type; arguments, and what has none, take nothing."""
    sizes.append(math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, 'dtype') else 0)
    return len(sizes) - 1


def _flatten(
    program: Any, arguments: Sequence[int], sizes: list[int], operations: list[_Operation]
) -> list[int]:
    """Appends the program's operations, those of the programs in it too; its results."""
    values = dict(zip((*program.constvars, *program.invars), arguments, strict=True))

    def read(atom: Any) -> int:
        if isinstance(atom, Literal):
            return _number(sizes)
        return values[atom]

    for equation in program.eqns:
        inputs = [read(atom) for atom in equation.invars]
        name = equation.primitive.name
        held = list(_programs(equation.params))
        if name in _INLINED and len(held) == 1:
            constants = [_number(sizes) for _ in held[0].constvars]
            outputs = _flatten(held[0], [*constants, *inputs], sizes, operations)
        else:
            outputs = [_number(sizes, variable.aval) for variable in equation.outvars]
            inner = max(map(peak_bytes, held), default=0)
            operations.append(_Operation(name, tuple(inputs), tuple(outputs), inner))
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(atom) for atom in program.outvars]


def _programs(parameters: dict[str, Any]) -> Iterator[Any]:
    """The programs among an operation's parameters."""
    for value in parameters.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            program = getattr(one, 'jaxpr', one)
            if hasattr(program, 'eqns'):
                yield program


def _peak(operations: list[_Operation], sizes: list[int], results: Sequence[int]) -> int:
    stored = {x for operation in operations if operation.stores() for x in operation.outputs}
    stored |= {x for operation in operations if operation.needs_stored() for x in operation.inputs}
    # What must be there for a value to be made: itself, or what an elementwise one is made of.
    sources: dict[int, frozenset[int]] = {}

    def sources_of(values: Sequence[int]) -> frozenset[int]:
        return frozenset().union(*(sources.get(x, frozenset([x])) for x in values))

    last_use: dict[int, int] = {}
    for place, operation in enumerate(operations):
        read = sources_of(operation.inputs)
        for output in operation.outputs:
            sources[output] = frozenset([output]) if output in stored else read
        if stored & set(operation.outputs):
            last_use |= dict.fromkeys(read, place)
    last_use |= dict.fromkeys(sources_of(results), len(operations))

    ends: dict[int, list[int]] = {}
    for value, place in last_use.items():
        ends.setdefault(place, []).append(value)
    made = {x for operation in operations for x in operation.outputs} & stored
    live = highest = 0
    for place, operation in enumerate(operations):
        live += sum(sizes[x] for x in operation.outputs if x in made and x in last_use)
        highest = max(highest, live + operation.inner)
        live -= sum(sizes[x] for x in ends.get(place, ()) if x in made)
    return highest
