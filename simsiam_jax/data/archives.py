"""Images in zip and tar files, WebDataset's shards among them, read by index without unpacking."""

import dataclasses
import glob
import os
import re
import struct
import tarfile
import zipfile

import numpy as np
from jaxtyping import Int

from simsiam_jax import errors, paths, terminal
from simsiam_jax.data import class_names, image_files, listing
from simsiam_jax.data.patterns import ALL, Patterns

# First bytes of compressed files, and the commands that decompress them.
_COMPRESSED = {b'\x1f\x8b': 'gunzip', b'BZh': 'bunzip2', b'\xfd7z': 'unxz', b'\x28\xb5': 'unzstd'}

_ZIP_TAIL = 22 + 2**16  # last bytes of a zip file, in which its index is found


class _Zip:
    """A zip file with an index; read() may be called from many threads.

    Attributes:
      path: Path of the file.
      names: Names of the files in it, without those of labels.
      labels: Text of the .cls files by what _key returns for them.
    """

    def __init__(self, path: str):
        with zipfile.ZipFile(path) as file:
            members = {_plain(m.filename): m for m in file.infolist() if not m.is_dir()}
            texts = {
                name: file.read(member).decode(errors='replace').strip()
                for name, member in members.items()
                if name.endswith('.cls')
            }
        self.path, self.names = path, [name for name in members if name not in texts]
        self.labels = {_key(name): text for name, text in texts.items()}
        self._members = [members[name] for name in self.names]

    def read(self, position: int) -> bytes:
        member = self._members[position]
        if member.flag_bits & 1:
            raise ValueError('encrypted')
        with open(self.path, 'rb') as file:
            # The name and an extra field of its own precede the content.
            file.seek(member.header_offset + 26)
            name, extra = struct.unpack('<HH', file.read(4))
            file.seek(name + extra, os.SEEK_CUR)
            with zipfile.ZipExtFile(file, 'r', member) as content:
                return content.read()


class _Tar:
    """A tar file with an index, as _Zip."""

    def __init__(self, path: str):
        places, self.labels = listing.remember([path], lambda: _index(path), lambda x: len(x[0]))
        self.path, self.names = path, list(places)
        self._places = np.array(list(places.values()), np.int64).reshape(-1, 2)

    def read(self, position: int) -> bytes:
        offset, size = self._places[position].tolist()
        with open(self.path, 'rb') as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise ValueError(f'{self.path} is truncated')
        return content


# Offset and size by name, and the labels of _Zip.
_Index = tuple[dict[str, list[int]], dict[str, str]]


def _index(path: str) -> _Index:
    places: dict[str, list[int]] = {}
    labels: dict[str, str] = {}
    with tarfile.open(path, 'r:') as file:
        while (member := file.next()) is not None:
            name = _plain(member.name)
            if name.endswith('.cls') and (content := file.extractfile(member)):
                labels[_key(name)] = content.read().decode(errors='replace').strip()
            elif member.islnk() and (target := places.get(_plain(member.linkname))):
                places[name] = target
            elif member.isreg() and not member.issparse():
                places[name] = [member.offset_data, member.size]
            file.members = []  # type: ignore[attr-defined]  # tarfile keeps all of them
    return places, labels


def _plain(name: str) -> str:
    """Returns a name in an archive with / for the \\ of Windows, and without ./ at its start."""
    return name.replace('\\', '/').removeprefix('./').lstrip('/')


def _key(name: str) -> str:
    """Returns what the files of a WebDataset's sample share: the name up to its first dot."""
    folder, _, base = name.rpartition('/')
    return f'{folder}/{base.partition(".")[0]}'


@dataclasses.dataclass
class ArchiveSource:
    """Images in archives, each with a label or -1.

    Attributes:
      archives: The archives.
      places: Archive of each image and position in the archive.
      labels: Label of each image, -1 without labels.
      classes: Names of the classes; empty without labels.
    """

    archives: list[_Zip | _Tar]
    places: Int[np.ndarray, 'N 2']
    labels: list[int]
    classes: tuple[str, ...]

    @property
    def identity(self) -> str:
        return '\0'.join(self.names())

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int) -> tuple[bytes, int]:
        number, position = self.places[index].tolist()
        return self.archives[number].read(position), self.labels[index]

    def name(self, index: int) -> str:
        number, position = self.places[index].tolist()
        archive = self.archives[number]
        return paths.printable(f'{archive.path}/{archive.names[position]}')

    def names(self) -> list[str]:
        """Returns the paths in the archive; with several, these begin with the archive's name."""
        single = len(self.archives) == 1
        prefixes = ['' if single else f'{os.path.basename(a.path)}/' for a in self.archives]
        return [f'{prefixes[n]}{self.archives[n].names[i]}' for n, i in self.places.tolist()]

    def take(self, indices: Int[np.ndarray, 'n']) -> 'ArchiveSource':
        """Returns the images at some indices, with all classes."""
        labels = [self.labels[i] for i in indices]
        return ArchiveSource(self.archives, self.places[indices], labels, self.classes)


def open_archives(spec: str, patterns: Patterns = ALL) -> ArchiveSource:
    """Opens the images in zip or tar files: FILE.tar, ``train-*.tar`` or ``train-{000..099}.tar``.

    The classes are the contents of .cls files beside the images, as WebDataset has them. Without
    such files they are the first folders that differ. Hidden files and folders are skipped.

    Args:
      spec: File, or several by wildcards or a range of numbers, on a disk.
      patterns: Images to use.

    Raises:
      UserError: There are no such files, they cannot be read by index, or they have no images.
    """
    files = find_files(spec)
    opened = terminal.progress(map(_open, files), 'indexing archives', total=len(files))
    archives, walk = list(opened), listing.Walk()
    places, names = [], []
    for number, archive in enumerate(archives):
        for position, name in enumerate(archive.names):
            folder, _, base = name.rpartition('/')
            if any(map(listing.is_system, folder.split('/'))):
                walk.hidden['files in such folders'] += 1
            elif walk.is_image(base):
                places.append((number, position))
                names.append(name)
    walk.warn(spec, 'archive')
    if not names:
        raise errors.UserError(
            f'archive {spec} contains no images; expected {", ".join(image_files.EXTENSIONS)}. If '
            'it contains other archives, unpack it once'
        )
    chosen = patterns.select(names, spec) if patterns else range(len(names))
    order = sorted(chosen, key=lambda i: (places[i][0], names[i]))
    places, names = [places[i] for i in order], [names[i] for i in order]
    texts = [archives[n].labels.get(_key(name)) for (n, _), name in zip(places, names, strict=True)]
    if any(texts):
        integers = all(map(str.isdigit, filter(None, texts)))
        values = [int(text) if text and integers else text for text in texts]
        labels = class_names.of_values(values, (), spec)
    else:
        labels = class_names.by_folder(names, spec, descend=True)
    return ArchiveSource(archives, np.array(places), *labels)


def _open(path: str) -> _Zip | _Tar:
    try:
        with open(path, 'rb') as file:
            head = file.read(262)
            file.seek(max(0, file.seek(0, os.SEEK_END) - _ZIP_TAIL))
            tail = file.read()
        # zipfile.is_zipfile takes an error of the disk for another format.
        if b'PK\5\6' in tail and head[257:] != b'ustar':
            return _Zip(path)
        for magic, command in _COMPRESSED.items():
            if head.startswith(magic):
                raise errors.UserError(
                    f'archive {path} is compressed as a whole, so that its files cannot be read by '
                    f'index. Decompress it once: {command} {path}'
                )
        return _Tar(path)
    except (OSError, tarfile.TarError, zipfile.BadZipFile, RuntimeError) as error:
        raise errors.UserError(
            f'archive {path} cannot be read: {errors.reason(error)}; expected a zip or tar file'
        ) from error


def find_files(spec: str) -> list[str]:
    """Returns the files that a path with wildcards or a range {000..099} names, sorted.

    Raises:
      UserError: There are none, or they are not on a disk.
    """
    path = paths.expand(spec)
    if '://' in path:
        raise errors.UserError(f'{path} is not on a disk; expected a file. Copy it to a disk')
    if paths.is_file(path):
        return [path]
    patterns = [path]
    if match := re.search(r'\{(\d+)\.\.(\d+)\}', path):
        numbers = (f'{i:0{len(match[1])}}' for i in range(int(match[1]), int(match[2]) + 1))
        patterns = [path[: match.start()] + number + path[match.end() :] for number in numbers]
    found = sorted({file for pattern in patterns for file in paths.matching(pattern)})
    if missing := [p for p in patterns if p not in found and not glob.has_magic(p)]:
        raise errors.UserError(f'{missing[0]} does not exist or is not a file')
    if not found:
        raise errors.UserError(f'no file matches {path}; expected at least one')
    return found
