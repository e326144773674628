"""Reads files of torch.save without running code in them."""

import io
import pickle
import re
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any


def load(torch: ModuleType, data: bytes) -> Any:
    """Returns the content of a file; objects other than containers and tensors have no content.

    Trainers store their arguments and logs beside the weights, as objects of their own classes.

    Args:
      torch: The PyTorch module.
      data: Content of the file.

    Raises:
      UnpicklingError: The file needs code and contains no tensor without it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about pickles that are not PyTorch's own
        try:
            return torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            tree = torch.load(
                io.BytesIO(data), map_location='cpu', weights_only=False, pickle_module=_Pickle
            )
            if not _has_tensors(tree):
                raise error from None
            return tree


def reason(error: pickle.UnpicklingError) -> str:
    """Returns what a pickle tried to do, from PyTorch's long message."""
    if match := re.search(r'GLOBAL ([\w.]+)', str(error)):
        return f'it tries to run {match[1]}, which was blocked'
    match = re.search(r'Unsupported .*', str(error))
    return f'{match[0] if match else "no state dict"}; no code in it was run'


# Functions that tensors and state dicts are pickled with. PyTorch resolves the types of storages.
_ALLOWED = {
    ('collections', 'OrderedDict'),
    ('torch', 'Size'),
    ('torch._utils', '_rebuild_parameter'),
    ('torch._utils', '_rebuild_tensor'),
    ('torch._utils', '_rebuild_tensor_v2'),
}


class _Blocked:
    """Stands for every other class, function and object of a pickle, and ignores its content."""

    def __new__(cls, *_: Any, **__: Any) -> '_Blocked':
        return super().__new__(cls)

    def __call__(self, *_: Any, **__: Any) -> '_Blocked':
        return self

    def _ignore(self, *_: Any, **__: Any) -> None: ...

    append = extend = add = __setitem__ = __setstate__ = _ignore


class _Pickle:
    """The part of the pickle module that torch.load uses."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return super().find_class(module, name) if (module, name) in _ALLOWED else _Blocked

    @staticmethod
    def load(file: Any, **kwargs: Any) -> Any:
        return _Pickle.Unpickler(file, **kwargs).load()


def _has_tensors(tree: Any) -> bool:
    if isinstance(tree, Mapping):
        return any(_has_tensors(value) for value in tree.values())
    return hasattr(tree, 'detach')
