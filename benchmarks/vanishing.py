# SPDX-License-Identifier: Apache-2.0
"""Why simple recurrent networks forget: the gradient of the last output with respect to the input
of each step before.

    python benchmarks/vanishing.py [--steps 200] [--hidden-size 128] [--seeds 5] [--output
    docs/images/vanishing.png]

Draws, for each cell as it is initialised, the norm of d y_T / d x_t over the distance T - t,
relative to distance 0 (Bengio, Simard & Frasconi 1994; Hochreiter 1991), and prints the distance
over which it falls to a thousandth. The first panel has the initial values of the package
(orthogonal recurrence, forget bias 1); the second has the textbook's: recurrent weights drawn
uniformly from +-1/sqrt(H), all biases 0.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flax_lstm.nn.cells import CELLS
from flax_lstm.nn.layers import RNN


def textbook(params: dict, key: jax.Array) -> dict:
    """The same weights with the recurrent ones drawn anew from +-1/sqrt(H) and every bias 0."""
    cell = {name: jnp.zeros_like(w) if "bias" in name else w for name, w in params["cell"].items()}
    bound = cell["recurrent"].shape[0] ** -0.5
    recurrent = jax.random.uniform(key, cell["recurrent"].shape, minval=-bound, maxval=bound)
    return {"cell": {**cell, "recurrent": recurrent}}


def gradient_norms(name: str, steps: int, hidden: int, seed: int, plain: bool) -> np.ndarray:
    """[T] norm of the gradient of the last output (times a random vector) with respect to each
    input, from last to first, over a batch of 16 sequences of standard normal inputs."""
    keys = jax.random.split(jax.random.key(seed), 4)
    rnn = RNN(CELLS[name](hidden), backend="scan")
    x_BTD = jax.random.normal(keys[0], (16, steps, 32))
    params = rnn.init(keys[1], x_BTD)["params"]
    params = textbook(params, keys[2]) if plain else params
    direction = jax.random.normal(keys[3], (hidden,))

    @jax.jit
    @jax.grad
    def gradient(x_BTD: jax.Array) -> jax.Array:
        return jnp.sum(rnn.apply({"params": params}, x_BTD)[1][:, -1] @ direction)

    return np.asarray(jnp.linalg.norm(gradient(x_BTD), axis=(0, 2)))[::-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("docs/images/vanishing.png"))
    options = parser.parse_args()
    figure = Figure(figsize=(10, 4), layout="constrained")
    print(
        "| initial values | cell | steps until a thousandth is left | left after 30 steps |\n| "
        "--- | --- | --- | --- |"
    )
    for column, (title, plain) in enumerate(
        (("initial values of flax_lstm", False), ("textbook's", True))
    ):
        axes = figure.add_subplot(1, 2, column + 1)
        for name in CELLS:
            runs = [
                gradient_norms(name, options.steps, options.hidden_size, seed, plain)
                for seed in range(options.seeds)
            ]
            share = np.stack([run / run[0] for run in runs])
            mean = np.exp(np.mean(np.log(np.maximum(share, 1e-30)), axis=0))
            axes.semilogy(mean, label=name)
            below = np.flatnonzero(mean < 1e-3)
            reach = str(below[0]) if len(below) else f"more than {options.steps}"
            print(f"| {title} | {name} | {reach} | {mean[30]:.1e} |")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("steps back from the last output")
        axes.set_ylim(1e-12, 30)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("gradient norm, relative")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(options.output))
    print(f"\npicture: {options.output}")


if __name__ == "__main__":
    main()
