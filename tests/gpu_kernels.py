# SPDX-License-Identifier: Apache-2.0
"""Compiles a layer and its gradient for an H200 that is not there, and prints the kernels of a step
of each loop.

    python tests/gpu_kernels.py CELL DTYPE BACKEND      a JSON list: forward loop, backward loop

Needs the GPU compiler and its environment (see `flax_lstm.plan.environment`).
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from flax_lstm.machine.sharding import make_mesh, on_mesh
from flax_lstm.nn.cells import CELLS
from flax_lstm.nn.layers import RNN
from flax_lstm.plan.chips import parse_topology
from flax_lstm.plan.compiler import described_devices
from flax_lstm.plan.program import Program

B, T, H = 16, 1024, 768


def kernels(cell: str, dtype: str, backend: str) -> list[list[str]]:
    devices = described_devices(parse_topology("h200:1"))
    mesh, here = make_mesh(devices=devices), SingleDeviceSharding(devices[0])

    def place(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here)

    rnn = RNN(CELLS[cell](H, dtype=dtype), backend=backend)
    x_BTD = place(jax.ShapeDtypeStruct((B, T, H), jnp.dtype(dtype)))
    variables = jax.tree.map(place, jax.eval_shape(rnn.init, jax.random.key(0), x_BTD))

    def loss(variables, x_BTD):
        return jnp.mean(rnn.apply(variables, x_BTD)[1].astype(jnp.float32) ** 2)

    compiled = jax.jit(on_mesh(jax.grad(loss, (0, 1)), mesh)).lower(variables, x_BTD).compile()
    return [[operation.name for operation in loop] for loop in Program(compiled.as_text()).loops()]


if __name__ == "__main__":
    print(json.dumps(kernels(*sys.argv[1:])))
