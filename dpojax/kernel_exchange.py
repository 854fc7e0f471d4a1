"""What devices that share projections' kernels exchange of them, said by us.

Left alone, the TPUs' compiler chooses well where few devices share a copy, and sends
twice as much where they span more than one dimension of a large torus, see
`dpojax.torus`. This file knows paths and shapes of projections, and no model.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from dpojax.sharding import ROWS, TOKENS, as_shardings
from dpojax.torus import Line

Gradient = Callable[[str, jax.Array, jax.Array], jax.Array]


class KernelExchange(NamedTuple):
    """Functions of a projection's path in a layer, and of arrays."""

    whole: Callable[[str, jax.Array], jax.Array]  # of a kernel, before a product
    # Of the projection's input and its output's slope: the kernel's gradient.
    gradient: Gradient


def make_kernel_exchange(mesh: Mesh, line: Line, gradient: Gradient) -> KernelExchange:
    """The exchanges over a mesh.

    Args:
      mesh: an axis of it divides kernels and rows.
      line: how the devices of this axis lie. Where that is not known, the compiler has
        its way.
      gradient: of arrays that one device has.
    """
    if not line.is_box or mesh.shape[line.axis] == 1:
        return KernelExchange(lambda path, kernel: kernel, gradient)
    others = tuple(
        axis
        for axis in (*ROWS[0], "context")
        if axis != line.axis and mesh.shape[axis] > 1
    )

    def divided(
        path: str, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
    ) -> tuple:
        stacked = jax.ShapeDtypeStruct((1, *shape), dtype)
        return as_shardings({path: {"kernel": stacked}}, mesh)[path]["kernel"].spec[1:]

    def whole(path: str, kernel: jax.Array) -> jax.Array:
        spec = divided(path, kernel.shape, kernel.dtype)
        if line.axis not in spec:
            return kernel
        dimension = spec.index(line.axis)
        gathered = [None if axis == line.axis else axis for axis in spec]
        return jax.shard_map(
            lambda part: line.gather(part, dimension),
            mesh=mesh,
            in_specs=PartitionSpec(*spec),
            out_specs=PartitionSpec(*gathered),
            check_vma=False,
        )(kernel)

    def summed(path: str, hidden: jax.Array, slope: jax.Array) -> jax.Array:
        shape = (hidden.shape[-1], slope.shape[-1])
        spec = divided(path, shape, slope.dtype)
        if line.axis not in spec:
            return gradient(path, hidden, slope)
        dimension = spec.index(line.axis)

        def own(hidden: jax.Array, slope: jax.Array) -> jax.Array:
            part = line.scatter(gradient(path, hidden, slope), dimension)
            return jax.lax.psum(part, others) if others else part

        return jax.shard_map(
            own,
            mesh=mesh,
            in_specs=tuple(
                PartitionSpec(*TOKENS, None if axis == line.axis else axis)
                for axis in spec
            ),
            out_specs=PartitionSpec(*spec),
            check_vma=False,
        )(hidden, slope)

    return KernelExchange(whole, summed)
