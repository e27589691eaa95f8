# SPDX-License-Identifier: Apache-2.0
"""A recurrent layer of reinforcement learning, forward and backward: Flax's GRU in the scan that
PureJaxRL and its kin write, and `ScannedRNN`, with resets and without, in turns; and the same steps
one at a time in a scan around the layer, as an environment asks for them, outputs alone.

    python benchmarks/resets.py

Axes: T time, B batch (environments), H hidden units and input features.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_lstm import GRUCell, ScannedRNN

T, B, H = 128, 64, 128


class Written(nn.Module):
    """The scan written out around a cell of Flax."""

    @functools.partial(
        nn.scan, variable_broadcast="params", in_axes=0, out_axes=0, split_rngs={"params": False}
    )
    @nn.compact
    def __call__(self, carry: Any, x: Any) -> Any:
        ins, resets = x
        carry = jnp.where(resets[:, None], jnp.zeros_like(carry), carry)
        return nn.GRUCell(H)(carry, ins)


def step_of(layer: nn.Module, share: float) -> Callable[[], Any]:
    """Value and gradient of the layer over random inputs, of whose steps such a share resets."""
    rng = np.random.default_rng(0)
    ins_TBH = jnp.asarray(rng.normal(size=(T, B, H)), jnp.float32)
    resets_TB, carry = jnp.asarray(rng.random((T, B)) < share), jnp.zeros((B, H))
    variables = layer.init(jax.random.key(0), carry, (ins_TBH, resets_TB))

    @jax.jit
    def step(variables: Any, ins_TBH: Any, resets_TB: Any) -> Any:
        def loss(variables: Any, ins_TBH: Any) -> Any:
            return jnp.mean(layer.apply(variables, carry, (ins_TBH, resets_TB))[1] ** 2)

        return jax.grad(loss, (0, 1))(variables, ins_TBH)

    run = functools.partial(step, variables, ins_TBH, resets_TB)
    jax.block_until_ready(run())
    return run


def one_at_a_time(layer: nn.Module) -> Callable[[], Any]:
    """The layer's outputs, each step a call of its own."""
    rng = np.random.default_rng(0)
    ins_TBH = jnp.asarray(rng.normal(size=(T, B, H)), jnp.float32)
    resets_TB, carry = jnp.asarray(rng.random((T, B)) < 0.01), jnp.zeros((B, H))
    variables = layer.init(jax.random.key(0), carry, (ins_TBH[:1], resets_TB[:1]))

    @jax.jit
    def act(variables: Any, ins_TBH: Any, resets_TB: Any) -> Any:
        def step(carry: Any, seen: Any) -> Any:
            return layer.apply(variables, carry, jax.tree.map(lambda x: x[None], seen))

        return jax.lax.scan(step, carry, (ins_TBH, resets_TB))[1]

    run = functools.partial(act, variables, ins_TBH, resets_TB)
    jax.block_until_ready(run())
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="turns of each")
    rounds = parser.parse_args().rounds
    entrants = {
        "Flax's GRU in a scan, resets 1 %": step_of(Written(), 0.01),
        "ScannedRNN, resets 1 %": step_of(ScannedRNN(GRUCell(H)), 0.01),
        "ScannedRNN, no reset": step_of(ScannedRNN(GRUCell(H)), 0.0),
        "Flax's, one step at a time": one_at_a_time(Written()),
        "ScannedRNN, one step at a time": one_at_a_time(ScannedRNN(GRUCell(H))),
    }
    seconds: dict[str, list[float]] = {name: [] for name in entrants}
    order, rng = list(entrants), np.random.default_rng(0)
    for _ in range(rounds):
        rng.shuffle(order)  # a turn is slower after that of a program that uses more memory
        for name in order:
            run = entrants[name]
            begin = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - begin)
    print(
        f"GRU, T {T}, B {B}, H {H}; forward + backward, but for one step at a time; ms: median "
        f"(fastest) of {rounds} turns"
    )
    for name, times in seconds.items():
        print(f"{name:34s} {statistics.median(times) * 1e3:6.1f} ({min(times) * 1e3:.1f})")


if __name__ == "__main__":
    main()
