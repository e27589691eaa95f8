# SPDX-License-Identifier: Apache-2.0
"""PureJaxRL's recurrent PPO as its authors wrote it, with its own recurrent layer and with
`flax_lstm.ScannedRNN` in the layer's place: returns and seconds of both.

    pip install distrax 'gymnax<1'
    python benchmarks/purejaxrl.py ppo_rnn.py [--env MemoryChain-bsuite] [--steps 200000]

`ppo_rnn.py` is the file of that name in github.com/luchris429/purejaxrl. It is executed as it is.
Two things have changed since it was written, and are given to it as they were: the wrappers of the
file beside it are those of `gymnax.wrappers.purerl`, and Flax's GRU is told its width when it is
made. The settings are the file's own, but for the number of steps.

Seconds are those of a run without compiling. The return is that of the episodes that end within
the last tenth of the updates.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_lstm import ScannedRNN

# What the file trains with when it is run.
SETTINGS = {
    "LR": 2.5e-4,
    "NUM_ENVS": 4,
    "NUM_STEPS": 128,
    "UPDATE_EPOCHS": 4,
    "NUM_MINIBATCHES": 4,
    "GAMMA": 0.99,
    "GAE_LAMBDA": 0.95,
    "CLIP_EPS": 0.2,
    "ENT_COEF": 0.01,
    "VF_COEF": 0.5,
    "MAX_GRAD_NORM": 0.5,
    "ANNEAL_LR": True,
    "DEBUG": False,
}


class WidthlessGRU(nn.Module):
    """Flax's GRU, called as it was when the file was written."""

    @nn.compact
    def __call__(self, carry: Any, x: Any) -> Any:
        return nn.GRUCell(carry.shape[-1])(carry, x)

    @staticmethod
    def initialize_carry(rng: Any, batch_dims: tuple[int, ...], size: int) -> Any:
        return jnp.zeros((*batch_dims, size))


def read(path: Path) -> ModuleType:
    """The file as a module, in the Flax of its time."""
    import gymnax.wrappers.purerl

    sys.modules["wrappers"] = gymnax.wrappers.purerl
    spec = importlib.util.spec_from_file_location("ppo_rnn", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.__dict__["nn"] = SimpleNamespace(**{**vars(nn), "GRUCell": WidthlessGRU})
    return module


def trained(module: ModuleType, settings: dict[str, Any], seeds: int) -> tuple[list[float], float]:
    """The return of each seed, and the seconds of one."""
    train = jax.jit(module.make_train(settings)).lower(jax.random.PRNGKey(0)).compile()
    returns, seconds = [], []
    for seed in range(seeds):
        begin = time.perf_counter()
        end = jax.block_until_ready(train(jax.random.PRNGKey(seed))["metric"])
        seconds.append(time.perf_counter() - begin)
        last = max(1, len(end["returned_episode"]) // 10)
        ended = np.asarray(end["returned_episode"][-last:])
        returns.append(float(np.asarray(end["returned_episode_returns"][-last:])[ended].mean()))
    return returns, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="their ppo_rnn.py; it is executed")
    parser.add_argument("--env", default="CartPole-v1", help="of gymnax")
    parser.add_argument("--steps", type=int, default=200_000, help="of all environments together")
    parser.add_argument("--envs", type=int, default=4, help="environments side by side")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    settings = {
        **SETTINGS,
        "ENV_NAME": options.env,
        "NUM_ENVS": options.envs,
        "TOTAL_TIMESTEPS": options.steps,
    }
    module = read(options.file)
    theirs = module.__dict__["ScannedRNN"]
    print(f"{options.env}, {options.steps} steps, {options.envs} environments, GRU of 128")
    for name, layer in {"its own ScannedRNN": theirs, "flax_lstm.ScannedRNN": ScannedRNN}.items():
        module.__dict__["ScannedRNN"] = layer
        returns, seconds = trained(module, dict(settings), options.seeds)
        each = ", ".join(f"{value:.2f}" for value in returns)
        spread = statistics.stdev(returns) if len(returns) > 1 else 0.0
        mean = statistics.fmean(returns)
        print(f"{name:22s} return {mean:.2f} +- {spread:.2f} ({each}); {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
