# SPDX-License-Identifier: Apache-2.0
"""Proximal policy optimisation with a recurrent policy, on a task that needs memory.

    python examples/ppo_rnn.py                 # about a minute on two cores
    python examples/ppo_rnn.py --corridor 12   # a longer memory

A T-maze (Bakker 2002): at the start of a corridor the agent sees for one step whether the reward
lies left or right; at its far end it must turn there. In between all observations are alike, so an
agent without memory is right half of the time. All of it, environment and learning, is one program
of JAX. The policy is `flax_lstm.ScannedRNN`, whose resets end one episode and begin the next in the
middle of a stretch of experience.

The loss is that of Schulman et al. 2017, "Proximal policy optimization algorithms", with advantages
by Schulman et al. 2016 (GAE).

Axes: E environments, T steps of a stretch, O observation, A actions.
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from flax_lstm import GRUCell, ScannedRNN

Array = jax.Array
FORWARD, LEFT, RIGHT = 0, 1, 2
DISCOUNT, GAE, CLIP, ENTROPY, VALUE = 0.99, 0.95, 0.2, 0.01, 0.5
EPOCHS = 4


class Maze(NamedTuple):
    """Where each agent is, and on which side (LEFT or RIGHT) its reward."""

    position_E: Array
    side_E: Array


def new_maze(key: Array, environments: int) -> Maze:
    side_E = jax.random.randint(key, (environments,), LEFT, RIGHT + 1)
    return Maze(jnp.zeros(environments, jnp.int32), side_E)


def observe(maze: Maze, corridor: int) -> Array:
    """Left?, right? (told at the start alone), at the junction?"""
    told_E = jnp.where(maze.position_E == 0, maze.side_E, 0)
    columns = [told_E == LEFT, told_E == RIGHT, maze.position_E == corridor]
    return jnp.stack(columns, axis=-1).astype(jnp.float32)


def act(maze: Maze, action_E: Array, key: Array, corridor: int) -> tuple[Maze, Array, Array]:
    """The maze after an action, the reward, and whether an episode ended. Turning ends it: at the
    junction with 1 on the right side, and -1 elsewhere."""
    turned_E = action_E != FORWARD
    right_E = (maze.position_E == corridor) & (action_E == maze.side_E)
    reward_E = jnp.where(turned_E, jnp.where(right_E, 1.0, -1.0), 0.0)
    moved_E = jnp.minimum(maze.position_E + 1, corridor)
    fresh = new_maze(key, len(action_E))
    next_maze = Maze(
        jnp.where(turned_E, fresh.position_E, moved_E),
        jnp.where(turned_E, fresh.side_E, maze.side_E),
    )
    return next_maze, reward_E, turned_E


class Policy(nn.Module):
    """Logits of the actions, and the value, over [T, E] steps."""

    hidden: int = 32

    @nn.compact
    def __call__(self, carry: Any, seen: tuple[Array, Array]) -> tuple[Any, tuple[Array, Array]]:
        carry, y_TEH = ScannedRNN(GRUCell(self.hidden))(carry, seen)
        logits_TEA = nn.Dense(3, kernel_init=nn.initializers.orthogonal(0.01))(y_TEH)
        return carry, (logits_TEA, nn.Dense(1)(y_TEH)[..., 0])


class Step(NamedTuple):
    """What is kept of each step; `reset` says whether it was the first of an episode."""

    observed: Array
    reset: Array
    action: Array
    log_share: Array
    value: Array
    reward: Array
    done: Array


def log_share_of(logits: Array, action: Array) -> Array:
    return jnp.take_along_axis(nn.log_softmax(logits), action[..., None], axis=-1)[..., 0]


def experience(
    policy: Policy, params: Any, start: Any, key: Array, length: int, corridor: int
) -> Any:
    """A stretch of steps in all environments: where it ended, the steps [T, E], and the value of
    what follows."""

    def step(now: Any, key: Array) -> tuple[Any, Step]:
        maze, carry, reset_E = now
        choose, renew = jax.random.split(key)
        seen_EO = observe(maze, corridor)
        carry, (logits, value) = policy.apply(params, carry, (seen_EO[None], reset_E[None]))
        action_E = jax.random.categorical(choose, logits[0])
        maze, reward_E, done_E = act(maze, action_E, renew, corridor)
        share_E = log_share_of(logits[0], action_E)
        kept = Step(seen_EO, reset_E, action_E, share_E, value[0], reward_E, done_E)
        return (maze, carry, done_E), kept

    end, steps = jax.lax.scan(step, start, jax.random.split(key, length))
    maze, carry, reset_E = end
    _, (_, last) = policy.apply(params, carry, (observe(maze, corridor)[None], reset_E[None]))
    return end, steps, last[0]


def advantages(steps: Step, last_E: Array) -> Array:
    """Generalised advantage estimates [T, E]."""

    def back(after: tuple[Array, Array], step: Step) -> tuple[tuple[Array, Array], Array]:
        value_after, gain_after = after
        goes_on = 1.0 - step.done
        error = step.reward + DISCOUNT * value_after * goes_on - step.value
        gain = error + DISCOUNT * GAE * goes_on * gain_after
        return (step.value, gain), gain

    return jax.lax.scan(back, (last_E, jnp.zeros_like(last_E)), steps, reverse=True)[1]


def loss(params: Any, policy: Policy, carry: Any, steps: Step, gain: Array) -> Array:
    """The clipped objective, over the whole stretch read from the state in which it began."""
    _, (logits, value) = policy.apply(params, carry, (steps.observed, steps.reset))
    ratio = jnp.exp(log_share_of(logits, steps.action) - steps.log_share)
    scaled = (gain - gain.mean()) / (gain.std() + 1e-8)
    bounded = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    improve = jnp.minimum(ratio * scaled, bounded * scaled).mean()
    miss = jnp.square(value - (steps.value + gain)).mean()
    shares = nn.softmax(logits)
    entropy = -(shares * nn.log_softmax(logits)).sum(-1).mean()
    return -improve + VALUE * miss - ENTROPY * entropy


def train(
    updates: int, corridor: int, environments: int = 64, length: int = 64, seed: int = 0
) -> Any:
    """The policy, and for every update the share of episodes that ended at the reward."""
    policy, key = Policy(), jax.random.key(seed)
    carry = ScannedRNN.initialize_carry(environments, policy.hidden)
    first = (jnp.zeros((1, environments, 3)), jnp.ones((1, environments), bool))
    params = policy.init(key, carry, first)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-3))

    def update(now: Any, key: Array) -> tuple[Any, Array]:
        params, moments, start = now
        end, steps, last_E = experience(policy, params, start, key, length, corridor)
        gain = advantages(steps, last_E)
        for _ in range(EPOCHS):
            slope = jax.grad(loss)(params, policy, start[1], steps, gain)
            change, moments = optimizer.update(slope, moments, params)
            params = optax.apply_updates(params, change)
        right = jnp.sum(steps.reward > 0) / jnp.maximum(jnp.sum(steps.done), 1)
        return (params, moments, end), right

    start = (new_maze(key, environments), carry, jnp.ones(environments, bool))
    keys = jax.random.split(jax.random.fold_in(key, 1), updates)
    (params, _, _), right = jax.jit(lambda now: jax.lax.scan(update, now, keys))(
        (params, optimizer.init(params), start)
    )
    return params, right


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=300, help="of the policy")
    parser.add_argument("--corridor", type=int, default=6, help="steps between sign and junction")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    _, right = train(options.updates, options.corridor, seed=options.seed)
    for n in range(0, options.updates, max(1, options.updates // 10)):
        print(f"update {n:4d}: {float(right[n]):.2f} of the episodes end at the reward")
    print(f"the last 10: {float(right[-10:].mean()):.2f}; without memory, one half")


if __name__ == "__main__":
    main()
