"""Tests of tools/benchmark/hlo.py and hlo_text.py."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from simsiam_jax.tools.benchmark import hlo

PROGRAM = """\
HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, \
may-alias) }, entry_computation_layout={(f32[4,8]{1,0})->f32[]}, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused (p0: f32[4,8], p1: bf16[2,8], p2: s32[]) -> (f32[4,8], bf16[8,2]) {
  %p1 = bf16[2,8]{1,0} parameter(1)
  %p0 = f32[4,8]{1,0} parameter(0)
  %p2 = s32[] parameter(2)
  %slice = f32[1,8]{1,0} dynamic-slice(%p0, %p2, %p2), dynamic_slice_sizes={1,8}
  %update = f32[4,8]{1,0} dynamic-update-slice(%p0, %slice, %p2, %p2)
  %turned = bf16[8,2]{1,0} transpose(%p1), dimensions={1,0}, metadata={op_name="f/turn" id=1}
  ROOT %both = (f32[4,8]{1,0}, /*index=1*/bf16[8,2]{1,0}) tuple(%update, %turned)
}

%body (s: (s32[], f32[4,8], bf16[2,8])) -> (s32[], f32[4,8], bf16[2,8]) {
  %s = (s32[], f32[4,8]{1,0}, bf16[2,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %y = bf16[2,8]{1,0} get-tuple-element(%s), index=2
  %fusion = (f32[4,8]{1,0}, bf16[8,2]{1,0}) fusion(%x, %y, %i), kind=kLoop, calls=%fused
  %x2 = f32[4,8]{1,0} get-tuple-element(%fusion), index=0
  %start = f32[4,8]{1,0} all-reduce-start(%x2), replica_groups=[2,4]<=[8], to_apply=%sum
  %done = f32[4,8]{1,0} all-reduce-done(%start)
  ROOT %out = (s32[], f32[4,8]{1,0}, bf16[2,8]{1,0}) tuple(%i, %done, %y)
}

%condition (t: (s32[], f32[4,8], bf16[2,8])) -> pred[] {
  %t = (s32[], f32[4,8]{1,0}, bf16[2,8]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (q0: s32[], q1: f32[4,8], q2: bf16[2,8]) -> (f32[4,8], f32[4,8], f32[8,8]) {
  %q0 = s32[] parameter(0), metadata={op_name="params[\\'a\\']"}
  %q1 = f32[4,8]{1,0} parameter(1)
  %q2 = bf16[2,8]{1,0} parameter(2)
  %in = (s32[], f32[4,8]{1,0}, bf16[2,8]{1,0}) tuple(%q0, %q1, %q2)
  %loop = (s32[], f32[4,8]{1,0}, bf16[2,8]{1,0}) while(%in), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %r = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  %near = f32[4,8]{1,0:T(8,128)S(1)} copy(%r)
  %gathered = f32[8,8]{1,0} all-gather(%r), replica_groups={{0,1},{2,3}}, dimensions={0}
  %scattered = f32[4,8]{1,0} scatter(%r, %q0, %near), to_apply=%sum
  ROOT %end = (f32[4,8]{1,0}, f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%r, %scattered, %gathered)
}
"""


def test_count_of_written_program_equals_hand_count() -> None:
    counts = hlo.count(PROGRAM)
    # The fusion reads a row of x, all of y and i, and writes a row and all of y. The loop has three
    # iterations.
    fusion, reduced = (32 + 32 + 4) + (32 + 32), 128 + 128
    copied, gathered, scattered = 128, 128 + 256, 128 + 4 + 128
    assert counts.bytes == 3 * (fusion + reduced) + copied + gathered + scattered
    assert counts.launches == 3 * 2 + 3
    assert counts.donated == {0, 2}
    assert counts.collectives == (
        hlo.Collective('all-reduce', devices=4, count=3, bytes=3 * 128, pairs=3),
        hlo.Collective('all-gather', devices=2, count=1, bytes=256, pairs=0),
    )
    assert [(x.op, x.bytes, x.name) for x in counts.moves] == [
        ('transpose', 32, 'f/turn'),
        ('copy', 0, 'near'),
    ]
    assert [x.op for x in counts.scatters] == ['scatter']
    assert (counts.float32[0].op, counts.float32[0].bytes) == ('all-gather', 256)


def test_count_of_compiled_program_finds_donation_and_all_reduces() -> None:
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))

    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        def update(w: jax.Array, _: None) -> tuple[jax.Array, None]:
            return w - jax.lax.psum(x.T @ jnp.tanh(x @ w), 'data'), None

        return jax.lax.scan(update, w, None, length=5)[0]

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P('data')), out_specs=P())
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 64), (256, 64)))
    kept = hlo.count(jax.jit(sharded).lower(w, x).compile().as_text())
    donated = hlo.count(jax.jit(sharded, donate_argnums=0).lower(w, x).compile().as_text())
    assert (kept.donated, donated.donated) == (frozenset(), {0})
    assert [(c.op, c.devices, c.count) for c in donated.collectives] == [('all-reduce', 8, 5)]
    assert donated.collectives[0].bytes == 5 * 64 * 64 * 4
    # At least the two products of every iteration, on the 32 of 256 rows of a device.
    assert donated.bytes >= 5 * 4 * (2 * 64 * 64 + 4 * 32 * 64)
    assert donated.float32[0].bytes == 64 * 64 * 4


def totals(function: Callable, *shapes: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """Returns (flops, bytes) as hlo counts them and as XLA's cost_analysis() does."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(function).lower(*arrays).compile()
    counts, costs = hlo.count(compiled.as_text()), compiled.cost_analysis()
    flops = sum(kernel.flops * kernel.runs for kernel in counts.kernels)
    return [flops, counts.bytes], [costs['flops'], costs['bytes accessed']]


def test_count_equals_cost_analysis_for_matrix_products() -> None:
    ours, xlas = totals(lambda a, b: jnp.tanh(a @ b), (64, 32), (32, 16))
    product, tanh = 64 * 32 + 32 * 16 + 64 * 16, 2 * 64 * 16
    assert ours == xlas == [2 * 64 * 32 * 16, 4 * (product + tanh)]


def test_count_multiplies_loop_by_its_iterations_unlike_cost_analysis() -> None:
    def loop(length: int) -> Callable:
        return lambda w, x: jax.lax.scan(lambda w, _: (x @ w, None), w, None, length)[0]

    short, xlas_short = totals(loop(2), (64, 64), (64, 64))
    long, xlas_long = totals(loop(50), (64, 64), (64, 64))
    assert xlas_long == xlas_short
    assert (short[0], long[0]) == (2 * 2 * 64**3, 50 * 2 * 64**3)
    assert long[1] - short[1] >= 48 * 4 * 3 * 64**2
    assert xlas_short[0] == pytest.approx(2 * 64**3, rel=1e-3)


def test_count_takes_gathered_rows_unlike_cost_analysis() -> None:
    (_, ours), (_, xlas) = totals(lambda x: 2 * x[jnp.array([3, 5, 9])], (1000, 64))
    assert ours < 4 * 3 * 3 * 64  # rows read, rows written, and indices
    assert xlas > 4 * 1000 * 64


def test_count_leaves_out_elementwise_flops_unlike_cost_analysis() -> None:
    ours, xlas = totals(lambda x: 3 * x + x, (1000, 64))
    assert (ours[0], xlas[0]) == (0, 2 * 1000 * 64)
    assert ours[1] == xlas[1] == 4 * 2 * 1000 * 64


def test_count_refuses_text_without_program() -> None:
    with pytest.raises(ValueError, match=r'compiled\.as_text'):
        hlo.count('nothing')
