"""How rows and an output matrix lie on a mesh, for the head's own collectives.

The compiler would gather the whole matrix, and add up the whole of its gradient, on
every device: both grow with the vocabulary. So the head runs on each device's own part,
and says itself what is gathered and added, a tile of the vocabulary at a time. This
file knows axes and shapes only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from dpojax.sharding import TOKENS, as_shardings
from dpojax.torus import Line, make_line


class MatrixShard(NamedTuple):
    """One device's part of a matrix ``[vocabulary, width]``: axes, empty where whole.

    Its functions are collectives where there are axes, and the identity elsewhere.
    """

    vocabulary: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()  # over which every device has other positions
    line: Line | None = None  # of the width's axis, on a mesh

    def first_token(self, num_tokens: int) -> int | Array:
        """The first token of this device's part of the vocabulary."""
        if not self.vocabulary:
            return 0
        return jax.lax.axis_index(self.vocabulary) * num_tokens

    def gather(self, tile: Array) -> Array:
        """A tile with its whole width."""
        return tile if self.line is None else self.line.gather(tile, 1)

    def scatter(self, slope: Array) -> Array:
        """The sum over all rows of a tile's gradient, this device's part of it."""
        others = tuple(axis for axis in self.rows if axis not in self.width)
        if self.line is not None:
            slope = self.line.scatter(slope, 1)
        return jax.lax.psum(slope, others) if others else slope

    def sum_rows(self, slope: Array) -> Array:
        """The sum over all rows of a gradient that every device has whole."""
        return jax.lax.psum(slope, self.rows) if self.rows else slope

    def sum_vocabulary(self, value: Array) -> Array:
        """The sum over the parts of the vocabulary."""
        return jax.lax.psum(value, self.vocabulary) if self.vocabulary else value

    def max_vocabulary(self, value: Array) -> Array:
        """The maximum over the parts of the vocabulary."""
        return jax.lax.pmax(value, self.vocabulary) if self.vocabulary else value


class Spread(NamedTuple):
    """A mesh over which rows and matrices are divided; without one, a single device."""

    mesh: Mesh | None = None

    def shard(self, matrix: Array) -> MatrixShard:
        """How an output matrix is divided."""
        if self.mesh is None:
            return MatrixShard()
        vocabulary, width = (self._axes(part) for part in self.matrix_spec(matrix))
        rows, positions = (self._axes(part) for part in TOKENS)
        line = make_line(self.mesh, *width) if width else None
        return MatrixShard(vocabulary, width, rows + positions, line)

    def matrix_spec(self, matrix: Array) -> PartitionSpec:
        """The sharding rule's for an embedding of this shape, of two dimensions."""
        if self.mesh is None:
            return PartitionSpec(None, None)
        spec = as_shardings({"embedding": matrix}, self.mesh)["embedding"].spec
        return PartitionSpec(*spec, *(None,) * (2 - len(spec)))

    def map(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """The function of each device's parts; gradients don't pass through it."""
        if self.mesh is None:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )

    def _axes(self, part: Any) -> tuple[str, ...]:
        assert self.mesh is not None
        names = part if isinstance(part, tuple) else (part,)
        return tuple(name for name in names if name and self.mesh.shape[name] > 1)


ALONE = Spread()
