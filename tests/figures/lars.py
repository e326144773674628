"""LARS around PyTorch's SGD: writes lars.npz, the figures that test_parity.py compares with.

    python tests/figures/lars.py    # PyTorch 2.13.0, CPU, float32

The scaling as apex describes its LARC with clip=False: the decayed gradient times
trust |w| / (|g| + wd |w| + eps), where neither norm is zero; the optimizer's own decay is off.
"""

import pathlib

import numpy as np
import torch

STEPS, MOMENTUM, TRUST, EPS = 20, 0.9, 1e-3, 1e-8


def train(weight_decay: float) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    # A matrix, a bias that starts at zero, and one whose first gradient is zero.
    params = [torch.randn(5, 4, generator=generator), torch.zeros(5), torch.ones(3)]
    start = [p.numpy().copy() for p in params]
    optimizer = torch.optim.SGD(params, lr=1.0, momentum=MOMENTUM)
    grads = [[torch.randn(p.shape, generator=generator) for p in params] for _ in range(STEPS)]
    grads[0][2].zero_()
    for step in range(STEPS):
        optimizer.param_groups[0]['lr'] = 50.0 * (1 - step / STEPS)
        for p, g in zip(params, grads[step], strict=True):
            p_norm, g_norm = p.norm(), g.norm()
            p.grad = g.clone()
            if p_norm != 0 and g_norm != 0:
                rate = TRUST * p_norm / (g_norm + p_norm * weight_decay + EPS)
                p.grad = (g + weight_decay * p) * rate
        optimizer.step()
    arrays = {f'start{i}': p for i, p in enumerate(start)}
    arrays |= {f'grad{i}': np.stack([g[i].numpy() for g in grads]) for i in range(3)}
    return arrays | {f'end{i}': p.numpy() for i, p in enumerate(params)}


if __name__ == '__main__':
    figures = {f'{wd}/{k}': v for wd in (0.0, 0.1) for k, v in train(wd).items()}
    np.savez_compressed(pathlib.Path(__file__).with_suffix('.npz'), **figures)
