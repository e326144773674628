"""Writes timm_networks.npz: features of timm's ViTs and ConvNeXts, and their parameters.

Weights and images are drawn from a seed on both sides, so only the results are stored. Run with
timm 1.0.31: python tests/figures/timm_networks.py
"""

import pathlib
import zlib

import numpy as np

# This package's name -> timm's, with the arguments of timm.create_model.
NETWORKS: dict[str, tuple[str, dict]] = {
    'vit_tiny': ('vit_tiny_patch16_224', {}),
    'vit_tiny_avg': ('vit_tiny_patch16_224', {'global_pool': 'avg'}),
    'vit_small': ('vit_small_patch16_224', {}),
    'vit_base': ('vit_base_patch16_224', {}),
    'convnext_atto': ('convnext_atto', {}),
    'convnext_femto': ('convnext_femto', {}),
    'convnext_pico': ('convnext_pico', {}),
    'convnext_nano': ('convnext_nano', {}),
    'convnext_tiny': ('convnext_tiny', {}),
}


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns weights that keep features at unit scale, from a seed that is the name."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if name.endswith('gamma') or ('norm' in name and name.endswith('weight')):
        return 1 + x / 8
    if len(shape) == 1 or name in ('cls_token', 'pos_embed'):
        return x / 8
    if name in ('stem.1.weight',) or '.downsample.0.weight' in name:
        return 1 + x / 8
    return x / np.sqrt(np.prod(shape[1:], dtype=np.float32))


def images() -> np.ndarray:
    """Returns two images [B, H, W, C]."""
    return np.random.default_rng(0).standard_normal((2, 224, 224, 3), np.float32)


def main() -> None:
    import timm
    import torch

    figures = {}
    for name, (theirs, arguments) in NETWORKS.items():
        net = timm.create_model(theirs, num_classes=0, **arguments).eval()
        state = {
            key: torch.from_numpy(np.asarray(weights(key, tuple(x.shape)), np.float32))
            for key, x in net.state_dict().items()
        }
        net.load_state_dict(state)
        with torch.inference_mode():
            features = net(torch.from_numpy(images().transpose(0, 3, 1, 2).copy()))
        figures[f'{name}/features'] = features.numpy()
        figures[f'{name}/parameters'] = np.array(sum(x.numel() for x in net.parameters()))
        print(name, figures[f'{name}/parameters'], features.std(1))
    np.savez_compressed(pathlib.Path(__file__).with_suffix('.npz'), **figures)


if __name__ == '__main__':
    main()
