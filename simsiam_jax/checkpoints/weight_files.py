"""Weight files of PyTorch, safetensors, Flax and Orbax. Reading a file never runs code in it.

Only files of torch.save, such as .pth and .ckpt, need PyTorch, to read and to write.
"""

import functools
import io
import json
import os
import pathlib
import pickle
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from etils import epath

from simsiam_jax import errors
from simsiam_jax.checkpoints import checkpoint_reader, torch_files
from simsiam_jax.models import pytorch, pytorch_timm
from simsiam_jax.runtime import storage

TORCH = ('.pth', '.pt', '.pth.tar')
# The last three are those of Lightning, VISSL and Hugging Face, which are only read.
ENDINGS = (*TORCH, '.safetensors', '.msgpack', '.ckpt', '.torch', '.bin')
# A folder of weights contains one of these files: the first is timm's, the second Orbax's.
FOLDERS = ('model.safetensors', '_METADATA')
_IMAGES = 'images.json'  # in the metadata of a .safetensors file, and in an Orbax folder
SUMS = 'checksums.json'  # in an Orbax folder that tools.convert wrote


def load_torch() -> ModuleType | None:
    """Imports PyTorch; returns None if it is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    return torch


def need_torch(path: str) -> ModuleType:
    """Imports PyTorch to read or write a file.

    Raises:
      UserError: PyTorch is not installed.
    """
    torch = load_torch()
    if torch is None:
        raise errors.UserError(
            f'{path} needs torch, which is not installed. Run pip install torch, or use '
            '.safetensors, which does not need it'
        )
    return torch


def ending(path: str | os.PathLike[str]) -> str:
    """Returns the one of ENDINGS that the path has; '' if it has none."""
    return next((e for e in ENDINGS if os.fspath(path).lower().endswith(e)), '')


def read(path: str | os.PathLike[str]) -> tuple[pytorch.Arrays, str]:
    """Reads the arrays of a file, under PyTorch's names, and the architecture that it states.

    Names of nested mappings are joined by dots, such as state_dict.conv1.weight. Floating-point
    arrays become float32. The architecture is '' if the file does not state it.

    Args:
      path: Weight file, folder of timm (model.safetensors), or encoder item of a checkpoint.

    Raises:
      UserError: The file does not exist, is damaged, would run code or contains no weights.
    """
    file = storage.folder(path)
    with storage.reading(file):
        if (file / '_METADATA').exists():
            return _flax_to_torch(_read_orbax(file), str(file)), ''
        if file.is_dir():
            file = file / 'model.safetensors'
    name, suffix = str(file), ending(file)
    with storage.reading(name):
        data = file.read_bytes()
    readers = {'.safetensors': _from_safetensors, '.msgpack': flax.serialization.msgpack_restore}
    if suffix not in readers:
        readers[suffix] = functools.partial(torch_files.load, need_torch(name))
    try:
        tree = readers[suffix](data)
    except Exception as error:  # damage may raise anything
        reason = errors.reason(error)
        if isinstance(error, pickle.UnpicklingError):
            reason = torch_files.reason(error)
        raise errors.UserError(
            f'{name} is damaged or contains more than weights: {reason}; expected a file that '
            f'{_WRITERS.get(suffix, "torch.save(model.state_dict(), FILE)")} writes'
        ) from error
    if suffix == '.msgpack':
        if not isinstance(tree, Mapping) or not {'params', 'batch_stats'} <= set(tree):
            raise errors.UserError(f'{name} contains no params and batch_stats of a backbone')
        return _flax_to_torch(tree, name), ''
    if not isinstance(tree, Mapping):
        raise errors.UserError(f'{name} contains a {type(tree).__name__}; expected a state dict')
    arch = tree.get('arch')
    return dict(_named(tree)), arch if isinstance(arch, str) else ''


_WRITERS = {
    '.safetensors': 'safetensors.torch.save_file(model.state_dict(), FILE)',
    '.msgpack': "flax.serialization.to_bytes({'params': ..., 'batch_stats': ...})",
}


def _flax_to_torch(variables: Mapping[str, Any], name: str) -> pytorch.Arrays:
    """Returns a backbone's variables under PyTorch's names, in which networks are identified."""
    if pytorch_timm.is_built_in(variables['params']):
        return pytorch_timm.to_torch(variables)
    if 'conv1' not in variables['params']:
        raise errors.UserError(
            f'{name} contains a network that is not built in; expected a ResNet, ViT or ConvNeXt. '
            'Load it with Flax, or load the run that it is from'
        )
    return pytorch.backbone_to_torch(variables)


def _read_orbax(item: epath.Path) -> dict[str, Any]:
    """Returns the arrays of an item as NumPy arrays, verified if it has checksums."""
    if (item.parent / 'meta' / 'metadata').exists():
        return checkpoint_reader.load_item(item)
    try:
        stored = ocp.PyTreeCheckpointHandler().metadata(item).tree
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        tree = ocp.PyTreeCheckpointer().restore(
            item, args=ocp.args.PyTreeRestore(restore_args=numpy)
        )
        if (item / SUMS).exists() and json.loads(
            (item / SUMS).read_text()
        ) != checkpoint_reader.describe(tree):
            raise ValueError(f'its arrays do not match {SUMS}')
    except Exception as error:  # damage may raise anything
        reason = errors.reason(error)
        raise errors.UserError(f'{item} is damaged: {reason}. Convert it again') from error
    return tree


def _from_safetensors(data: bytes) -> pytorch.Arrays:
    return {
        name: np.frombuffer(bytes(x['data']), _DTYPES[x['dtype']]).reshape(x['shape'])
        for name, x in safetensors.deserialize(data)
    }


# safetensors.numpy does not support bfloat16.
_DTYPES = {'F64': '<f8', 'F32': '<f4', 'F16': '<f2', 'BF16': ml_dtypes.bfloat16, 'I64': '<i8'}


def _named(tree: Mapping[Any, Any], prefix: str = '') -> Iterator[tuple[str, np.ndarray]]:
    """Yields the arrays of nested state dicts by name; skips optimizers and other entries."""
    for key, value in tree.items():
        name = f'{prefix}{key}'
        if isinstance(value, Mapping):
            if not str(key).startswith('optimizer'):
                yield from _named(value, f'{name}.')
            continue
        if hasattr(value, 'detach'):  # a PyTorch tensor; NumPy has no bfloat16
            value = value.detach()
            value = (value.float() if value.is_floating_point() else value).numpy()
        if isinstance(value, np.ndarray):
            integer = np.issubdtype(value.dtype, np.integer)
            yield name, value if integer else np.asarray(value, np.float32)


def describe_images(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns size, resize, mean and std of the images that a configuration describes."""
    augment = config['augment']
    images = {'size': augment['size'], 'resize': config['eval']['resize'] or augment['size']}
    return images | {key: list(augment[key]) for key in ('mean', 'std')}


def beside(path: str | os.PathLike[str]) -> epath.Path:
    """Returns the file that describes the images of weights whose format has no place for it."""
    file = storage.folder(path)
    return file / _IMAGES if file.is_dir() else file.with_name(f'{file.name}.json')


def read_images(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns size, resize, mean and std as `write` stored them; {} if it did not.

    Raises:
      UserError: The description is damaged.
    """
    file = storage.folder(path)
    text = ''
    with storage.reading(file):
        if ending(file) == '.safetensors':
            with file.open('rb') as opened:
                length = int.from_bytes(opened.read(8), 'little')
                text = json.loads(opened.read(length)).get('__metadata__', {}).get(_IMAGES, '')
        elif beside(file).exists():
            file = beside(file)
            text = file.read_text()
    try:
        images = json.loads(text or '{}')
        return images | {key: tuple(images[key]) for key in ('mean', 'std') if key in images}
    except (ValueError, TypeError) as error:
        raise errors.UserError(
            f"{file} does not describe images: {error}. Remove it to use ImageNet's"
        ) from error


def write(path: str, content: Any, images: Mapping[str, Any] | None = None) -> None:
    """Writes a weight file; an error leaves an existing file unchanged.

    Args:
      path: File; its ending sets the format, and any other ending writes a pickle.
      content: Arrays by name; for .pth and pickles also nested mappings with other values.
      images: Description of the images, written into a .safetensors file and beside any other.

    Raises:
      UserError: PyTorch is needed but not installed, or the file cannot be written.
    """
    suffix = ending(path)
    described = {_IMAGES: json.dumps(images)} if images else {}
    if suffix in TORCH:
        torch, buffer = need_torch(path), io.BytesIO()
        torch.save(_tensors(torch, content), buffer)
        data = buffer.getvalue()
    elif suffix == '.safetensors':
        data = safetensors.numpy.save(content, metadata={'format': 'pt'} | described)
    elif suffix == '.msgpack':
        data = flax.serialization.msgpack_serialize(content)
    else:
        data = _pickle(content)
    write_bytes(path, data)
    if described and suffix != '.safetensors':
        write_bytes(str(beside(path)), described[_IMAGES].encode())


def write_bytes(path: str, data: bytes) -> None:
    """Writes a file; an error leaves an existing file unchanged.

    Args:
      path: File.
      data: Content of the file.

    Raises:
      UserError: The file cannot be written.
    """
    target = pathlib.Path(path)
    partial = target.with_name(f'.{target.name}.part')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(target)
    except OSError as error:
        if partial.exists():
            partial.unlink()
        raise errors.UserError(
            f'{path} cannot be written: {error.strerror}. Set another --target'
        ) from error


def _tensors(torch: ModuleType, content: Any) -> Any:
    if isinstance(content, np.ndarray):
        return torch.from_numpy(content.copy())
    if isinstance(content, Mapping):
        return {key: _tensors(torch, value) for key, value in content.items()}
    return content


class _Pickler(pickle.Pickler):
    """Pickles arrays without the modules of NumPy 2, which NumPy 1 lacks."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


def _pickle(content: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(content)
    return buffer.getvalue()
