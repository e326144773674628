"""Files of weights: PyTorch's, safetensors, Flax's, Orbax's. Opening one never runs code of it.

Only .pth needs PyTorch, to write and to read.
"""

import io
import json
import os
import pathlib
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
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
from simsiam_jax.checkpoints import checkpoint_reader
from simsiam_jax.models import pytorch
from simsiam_jax.runtime import storage

TORCH = ('.pth', '.pt', '.pth.tar')
ENDINGS = (*TORCH, '.safetensors', '.msgpack')
# A folder of weights has one of these: timm's, Orbax's.
FOLDERS = ('model.safetensors', '_METADATA')
SUMS = 'checksums.json'  # in a folder of Orbax that convert has written


def load_torch() -> ModuleType | None:
    """PyTorch where it is installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    return torch


def need_torch(path: str) -> ModuleType:
    """Raises UserError where PyTorch is not installed."""
    torch = load_torch()
    if torch is None:
        raise errors.UserError(
            f'torch is not installed, and {path} needs it; pip install torch, or use .safetensors, '
            'which needs none'
        )
    return torch


def ending(path: str | os.PathLike[str]) -> str:
    """The one of ENDINGS that the path has, '' for none."""
    return next((e for e in ENDINGS if os.fspath(path).lower().endswith(e)), '')


def read(path: str | os.PathLike[str]) -> tuple[pytorch.Arrays, str]:
    """The arrays of a file by PyTorch's names, and the architecture that it says it is, or ''.

    Floating-point arrays come as float32. A folder is one of timm's (model.safetensors) or the
    encoder item of a checkpoint.

    Raises:
      UserError: there is no such file, it is damaged, wants to run code, or holds no weights.
    """
    file = storage.folder(path)
    with storage.reading(file):
        if (file / '_METADATA').exists():
            return pytorch.backbone_to_torch(_read_orbax(file)), ''
        if file.is_dir():
            file = file / 'model.safetensors'
    name, kind = str(file), ending(file)
    with storage.reading(name):
        data = file.read_bytes()
    readers = {'.safetensors': _from_safetensors, '.msgpack': flax.serialization.msgpack_restore}
    load = readers[kind] if kind in readers else _torch_loader(name)
    try:
        tree = load(data)
    except Exception as error:  # damage may raise anything
        reason = errors.reason(error)
        if isinstance(error, pickle.UnpicklingError):
            reason = _unpickled(str(error))
        raise errors.UserError(
            f'{name} is damaged or holds more than weights: {reason}; expected what '
            f'{_WRITERS.get(kind, "torch.save(model.state_dict(), FILE)")} writes'
        ) from error
    if kind == '.msgpack':
        if not isinstance(tree, Mapping) or not {'params', 'batch_stats'} <= set(tree):
            raise errors.UserError(f'{name} holds no params and batch_stats of a backbone')
        return pytorch.backbone_to_torch(tree), ''
    arch = tree.get('arch') if isinstance(tree, Mapping) else None
    for key in ('state_dict', 'model'):
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            tree = tree[key]
    return _named(name, tree), arch if isinstance(arch, str) else ''


_WRITERS = {
    '.safetensors': 'safetensors.torch.save_file(model.state_dict(), FILE)',
    '.msgpack': "flax.serialization.to_bytes({'params': ..., 'batch_stats': ...})",
}


def _torch_loader(name: str) -> Callable[[bytes], Any]:
    torch = need_torch(name)

    def load(data: bytes) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of pickles that it goes on to refuse
            return torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)

    return load


def _unpickled(message: str) -> str:
    """What a pickle asked for, out of PyTorch's paragraphs on it."""
    if match := re.search(r'GLOBAL ([\w.]+)', message):
        return f'it wants to run {match[1]}, which was not done'
    match = re.search(r'Unsupported .*', message)
    return f'{match[0] if match else "no state dict"}; nothing in it was run'


def _read_orbax(item: epath.Path) -> dict[str, Any]:
    """The arrays of an item as NumPy's, verified where there are checksums."""
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
            raise ValueError(f'it is not as it was written, says {SUMS}')
    except Exception as error:  # damage may raise anything
        reason = errors.reason(error)
        raise errors.UserError(f'{item} is damaged: {reason}; convert it again') from error
    return tree


def _from_safetensors(data: bytes) -> pytorch.Arrays:
    return {
        name: np.frombuffer(bytes(x['data']), _DTYPES[x['dtype']]).reshape(x['shape'])
        for name, x in safetensors.deserialize(data)
    }


# safetensors.numpy has no bfloat16.
_DTYPES = {'F64': '<f8', 'F32': '<f4', 'F16': '<f2', 'BF16': ml_dtypes.bfloat16, 'I64': '<i8'}


def _named(name: str, tree: Any) -> pytorch.Arrays:
    """Its arrays; other entries, such as an epoch, are passed over."""
    if not isinstance(tree, Mapping):
        raise errors.UserError(f'{name} holds a {type(tree).__name__}; expected a state dict')
    arrays = {}
    for key, value in tree.items():
        if hasattr(value, 'detach'):  # PyTorch's tensor, maybe of bfloat16
            value = value.detach()
            value = (value.float() if value.is_floating_point() else value).numpy()
        if isinstance(value, np.ndarray):
            counter = np.issubdtype(value.dtype, np.integer)
            arrays[str(key)] = value if counter else np.asarray(value, np.float32)
    return arrays


def write(path: str, content: Any) -> None:
    """Writes arrays, or for .pth anything made of them, whole or not at all.

    Raises:
      UserError: PyTorch is needed and not there, or the file cannot be written.
    """
    kind = ending(path)
    if kind in TORCH:
        torch, buffer = need_torch(path), io.BytesIO()
        torch.save(_tensors(torch, content), buffer)
        data = buffer.getvalue()
    elif kind == '.safetensors':
        data = safetensors.numpy.save(content, metadata={'format': 'pt'})
    elif kind == '.msgpack':
        data = flax.serialization.msgpack_serialize(content)
    else:
        data = _pickle(content)
    write_bytes(path, data)


def write_bytes(path: str, data: bytes) -> None:
    """Raises UserError where it cannot; a file that was there stays whole until then."""
    target = pathlib.Path(path)
    part = target.with_name(f'.{target.name}.part')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(target)
    except OSError as error:
        if part.exists():
            part.unlink()
        raise errors.UserError(
            f'{path} cannot be written: {error.strerror}; give another --target'
        ) from error


def _tensors(torch: ModuleType, content: Any) -> Any:
    if isinstance(content, np.ndarray):
        return torch.from_numpy(content.copy())
    if isinstance(content, Mapping):
        return {key: _tensors(torch, value) for key, value in content.items()}
    return content


class _Pickler(pickle.Pickler):
    """NumPy 2 names modules in its pickles that NumPy 1 lacks: arrays are written without them."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


def _pickle(content: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(content)
    return buffer.getvalue()
