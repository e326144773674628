"""Writes methods.npz: lightly's losses and gradients for tests/test_methods.py.

Needs torch and lightly:

    python tests/figures/methods.py    # PyTorch 2.14.1, lightly 1.6.0, CPU, float32
"""

import pathlib

import numpy as np
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.loss.swav_loss import sinkhorn
from lightly.models.modules import SwaVPrototypes

BATCH, DIM, STEPS = 4, 6, 10
QUEUE = 24  # of MoCo: three steps
PROTOTYPES, VIEWS, LARGE, SWAV_QUEUE = 5, 4, 2, 12

generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def simclr() -> dict[str, torch.Tensor]:
    """z [2, B, D] -> loss, gradient."""
    z = normal(2, BATCH, DIM).requires_grad_()
    loss = NTXentLoss(temperature=0.1)(z[0], z[1])
    loss.backward()
    return {'z': z, 'loss': loss, 'gradient': z.grad}


def moco() -> dict[str, torch.Tensor]:
    """q, k [steps, 2, B, D] and the first queue -> losses and gradients of every step.

    Both directions see the same queue, then the keys of both views join it.
    """
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, DIM))
    bank = criterion.memory_bank
    bank.bank = torch.nn.functional.normalize(normal(QUEUE, DIM), dim=1)
    first = bank.bank.clone()
    q, k = normal(STEPS, 2, BATCH, DIM).requires_grad_(), normal(STEPS, 2, BATCH, DIM)
    losses = []
    for step in range(STEPS):
        before, pointer = bank.bank.clone(), bank.bank_ptr.clone()
        loss = torch.zeros(())
        for i in range(2):
            loss = loss + criterion(q[step, i], k[step, 1 - i])
            bank.bank, bank.bank_ptr = before.clone(), pointer.clone()
        bank._dequeue_and_enqueue(torch.nn.functional.normalize(k[step].reshape(-1, DIM), dim=1))
        losses.append(loss)
    torch.stack(losses).sum().backward()
    return {'queue': first, 'q': q, 'k': k, 'losses': torch.stack(losses), 'gradient': q.grad}


def byol() -> dict[str, torch.Tensor]:
    """p, z [2, B, D] -> loss, gradient."""
    p, z = normal(2, BATCH, DIM).requires_grad_(), normal(2, BATCH, DIM)
    criterion = NegativeCosineSimilarity()
    loss = (2 + 2 * criterion(p[0], z[1])) + (2 + 2 * criterion(p[1], z[0]))
    loss.backward()
    return {'p': p, 'z': z, 'loss': loss, 'gradient': p.grad}


def swav(views: int, queue: int) -> dict[str, torch.Tensor]:
    """z [V, B, D], prototypes [K, D] -> loss, gradients, and the prototypes after SGD at rate 1."""
    z = normal(views, BATCH, DIM).requires_grad_()
    layer = SwaVPrototypes(DIM, PROTOTYPES, 0)
    weight, bias = layer.heads[0].weight, layer.heads[0].bias
    weight.data = normal(PROTOTYPES, DIM)
    bias.data.zero_()  # SwAV's own prototypes have none
    layer.normalize()
    start = weight.detach().clone()
    earlier = torch.nn.functional.normalize(normal(LARGE, queue, DIM), dim=2)
    scores = [layer(torch.nn.functional.normalize(view, dim=1)) for view in z]
    loss = SwaVLoss()(
        scores[:LARGE], scores[LARGE:], [layer(old) for old in earlier] if queue else None
    )
    loss.backward()
    gradient = weight.grad.clone()
    torch.optim.SGD([weight], lr=1.0).step()
    layer.normalize()
    return {
        'z': z,
        'prototypes': start,
        'queue': earlier,
        'loss': loss.squeeze(),
        'gradient': z.grad,
        'prototypes_gradient': gradient,
        'prototypes_after': weight,
    }


def assignments() -> dict[str, torch.Tensor]:
    """Cosines [B, K] -> Sinkhorn-Knopp's assignments, in float64."""
    scores = 2 * torch.rand(16, PROTOTYPES, generator=generator) - 1
    return {'scores': scores, 'q': sinkhorn(scores.double(), iterations=3, epsilon=0.05).float()}


if __name__ == '__main__':
    groups = {
        'simclr': simclr(),
        'moco': moco(),
        'byol': byol(),
        'swav': swav(LARGE, 0),
        'swav_multi_crop': swav(VIEWS, 0),
        'swav_queue': swav(LARGE, SWAV_QUEUE),
        'sinkhorn': assignments(),
    }
    figures = {
        f'{group}/{name}': x.detach().numpy()
        for group, arrays in groups.items()
        for name, x in arrays.items()
    }
    np.savez_compressed(pathlib.Path(__file__).with_suffix('.npz'), **figures)
