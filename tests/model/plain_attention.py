"""Plain attention and the inputs on which kernels are compared with it."""

import contextlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from solar_jax.model.attention import attention_mask, rotated_attention
from solar_jax.parallel.attention import per_device
from tests.parallel.test_mesh import mesh_of

B, T, N, K, H = 2, 256, 4, 2, 128
TOLERANCE = 2e-5  # absolute, float32: sums of the same terms in blocks


def arrays(kv_heads: int = K, width: int = H) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.array(rng.standard_normal((B, T, n, width)), jnp.float32) for n in (N, kv_heads, kv_heads))


def segments() -> jax.Array:
    """Another border in each row, neither at a block's edge."""
    place = np.arange(T)[None]
    return jnp.array((place >= 100) + (place >= np.array([[190], [131]])), jnp.int32)


def angles(width: int = H) -> tuple[jax.Array, jax.Array]:
    """Angles of any size, others in each row, place and pair."""
    a = np.random.default_rng(1).uniform(0, 6.28, (B, T, width // 2))
    return jnp.array(np.cos(a), jnp.float32), jnp.array(np.sin(a), jnp.float32)


def plain(q, k, v, segment_ids, window):
    return rotated_attention(q, k, v, angles(q.shape[-1]), attention_mask(T, segment_ids, window))


def gradients(attend, q, k, v, segment_ids, window):
    """Gradients of a sum in which every output counts differently."""
    weights = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
    return jax.grad(lambda *x: jnp.sum(weights * attend(*x, segment_ids, window)), argnums=(0, 1, 2))(q, k, v)


def assert_plain(attend: Callable[..., jax.Array], inputs, segment_ids, window: int, expected=plain) -> None:
    """Asserts that a kernel has the output and the gradients of plain attention."""

    def both(attend, *inputs):
        return attend(*inputs, segment_ids, window), gradients(attend, *inputs, segment_ids, window)

    (out, found), (expected_out, derived) = (jax.jit(both, static_argnums=0)(f, *inputs) for f in (attend, expected))
    np.testing.assert_allclose(out, expected_out, atol=TOLERANCE)
    for name, a, b in zip("qkv", found, derived, strict=True):
        np.testing.assert_allclose(a, b, atol=10 * TOLERANCE, err_msg=f"d{name}")


def assert_plain_on_devices(
    kernel: Callable[..., jax.Array], shape: tuple[int, ...], window: int, *, length: int, width: int,
    borders: np.ndarray,
) -> None:  # fmt: skip
    """Asserts the same of rows that lie on the devices of a mesh, split over two where `context` is 2.

    Args:
      kernel: takes arrays of one device, and its `shard` if rows are split.
      shape: of the mesh.
      window: keys each query sees; 0 for all earlier ones.
      length: of a row, four chunks: 0 and 3 lie on one device, 1 and 2 on the other.
      width: H.
      borders: [2, documents - 1], where documents begin in each of the two rows.
    """
    rng, chunks = np.random.default_rng(0), np.arange(length).reshape(4, -1)
    order = chunks[[0, 3, 1, 2] if len(shape) > 3 and shape[3] == 2 else [0, 1, 2, 3]].reshape(-1)
    inputs = tuple(jnp.array(rng.standard_normal((2, length, n, width)), jnp.float32) for n in (4, 2, 2))
    turns = rng.uniform(0, 6.28, (2, length, width // 2))
    rope = jnp.array(np.cos(turns), jnp.float32), jnp.array(np.sin(turns), jnp.float32)
    ids = jnp.array((np.arange(length) >= borders[..., None]).sum(1), jnp.int32)
    attend = per_device(mesh_of(*shape), kernel)

    def split(q, k, v, segment_ids, _):
        q, k, v, *turned = (x[:, order] for x in (q, k, v, *rope))
        return attend(q, k, v, tuple(turned), segment_ids)[:, np.argsort(order)]

    def whole(q, k, v, segment_ids, _):
        return rotated_attention(q, k, v, rope, attention_mask(length, segment_ids, window))

    assert_plain(split, inputs, ids, window, whole)


def product_precisions(attend, dtype) -> set[str]:
    """The precisions of all matrix products of a kernel, forward and backward."""
    inputs = tuple(x.astype(dtype) for x in arrays())
    text = str(jax.make_jaxpr(lambda *x: gradients(attend, *x, segments(), 0))(*inputs))
    products = re.findall(r"dot_general\[(.*?)\n *\]", text, re.DOTALL)
    assert len(products) >= 7  # two forward, five backward
    return {"HIGHEST" if "Precision.HIGHEST, Precision.HIGHEST" in p else "default" for p in products}


@contextlib.contextmanager
def simulated(cores: int):
    """A TPU's memories simulated: buffers begin as NaN, reads outside of one and races between cores or DMAs raise."""
    state = pltpu.InterpretParams(
        detect_races=True, on_race="raise", out_of_bounds_reads="raise", uninitialized_memory="nan",
        dma_execution_mode="on_wait", num_cores_or_threads=cores, random_seed=0,
    )  # fmt: skip
    try:
        with pltpu.force_tpu_interpret_mode(state):
            yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()
