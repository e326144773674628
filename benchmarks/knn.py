"""The nearest 200 of 50,000 x 512 for 10,000 queries, against the bare matrix product.

    python benchmarks/knn.py

interleaves both in one process and prints the medians and their ratio.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from simsiam_jax.tasks import nearest
from simsiam_jax.training import mesh as mesh_lib


def main(rounds: int = 5, chunk: int = 1024) -> None:
    rng = np.random.default_rng(0)
    bank, queries = (rng.standard_normal((n, 512), np.float32) for n in (50_000, 10_000))
    mesh = mesh_lib.make_mesh()
    product = jax.jit(lambda queries, bank: jnp.matmul(queries, bank.T, precision='highest'))
    on_device = jnp.asarray(bank)

    def multiply() -> None:
        for start in range(0, len(queries), chunk):
            product(queries[start : start + chunk], on_device).block_until_ready()

    def search() -> None:
        nearest.search(bank, queries, mesh, k=200, chunk=chunk)

    seconds: dict[str, list[float]] = {'product': [], 'kNN': []}
    for i in range(rounds + 1):
        for name, function in (('product', multiply), ('kNN', search)):
            begin = time.perf_counter()
            function()
            if i:  # the first round compiles
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    ratio = medians['kNN'] / medians['product']
    print(f'product {medians["product"]:.2f} s, kNN {medians["kNN"]:.2f} s, ratio {ratio:.2f}')


if __name__ == '__main__':
    main()
