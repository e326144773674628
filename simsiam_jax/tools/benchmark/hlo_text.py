"""Parses the text of compiled programs (`compiled.as_text()`)."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {'pred': 8, 's4': 4, 'u4': 4, 'token': 0, 'opaque': 0, 'c64': 64, 'c128': 128}
ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,<= ]*)\](\{[^}]*\})?')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of the text: `name = type op(arguments), attributes`."""

    name: str
    type: str
    op: str
    arguments: str
    attributes: str
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r'%([\w.\-]+)', self.arguments)

    @property
    def origin(self) -> str:
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else self.name

    def called(self, *keys: str) -> list[str]:
        """Returns the names of the computations in these attributes."""
        lists = re.findall(rf'\b(?:{"|".join(keys)})=(\{{[^}}]*\}}|%[\w.\-]+)', self.attributes)
        return re.findall(r'%([\w.\-]+)', ' '.join(lists))


Computation = dict[str, Instruction]


def size(type_: str, *, on_chip: bool = False) -> int:
    """Returns the bytes of an array or tuple in the device's main memory.

    Layouts with tiles are those of TPUs, whose other memory spaces are on the chip.

    Args:
      type_: Type in the text, such as 'f32[4,8]{1,0}'.
      on_chip: Also count arrays in the memory spaces on the chip.
    """
    total = 0
    for dtype, dims, layout in ARRAY.findall(type_):
        if not on_chip and 'T(' in layout and re.search(r'S\([1-9]', layout):
            continue
        bits = _BITS.get(dtype) or int((re.search(r'\d+', dtype) or ['0'])[0])
        elements = math.prod(int(d.strip('<= ')) for d in dims.split(',') if d.strip())
        total += -(-bits * elements // 8)
    return total


def shapes(type_: str) -> Iterator[list[int]]:
    """Yields the shape of every array in a type, in order."""
    for _, dims, _ in ARRAY.findall(type_):
        yield [int(d.strip('<= ')) for d in dims.split(',') if d.strip()]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns (computations by name, each with its instructions by name; name of the entry).

    Raises:
      ValueError: The text is not that of a compiled program.
    """
    computations: dict[str, Computation] = {}
    entry, current = '', {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            current[match[2]] = _instruction(match[2], match[3], bool(match[1]))
    if not entry:
        raise ValueError(
            'cannot parse the program: no ENTRY computation; expected compiled.as_text()'
        )
    return computations, entry


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text, 0) if text.startswith('(') else text.index(' ')
    type_, text = text[:end], text[end:].strip()
    start = text.index('(')
    end = _closing(text, start)
    return Instruction(name, type_, text[:start], text[start + 1 : end - 1], text[end:], root)


def _closing(text: str, start: int) -> int:
    """Returns the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {'(': 1, ')': -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f'cannot parse the program: no closing parenthesis in {text[:80]}')
