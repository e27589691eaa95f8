# SPDX-License-Identifier: Apache-2.0
"""The examples do what they say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_maze_rewards_the_side_that_was_told() -> None:
    ppo = load("ppo_rnn")
    maze = ppo.Maze(jnp.zeros(4, int), jnp.array([1, 2, 1, 2]))
    assert ppo.observe(maze, 2).tolist() == [[1, 0, 0], [0, 1, 0]] * 2
    key = ppo.jax.random.key(0)
    for _ in range(2):
        maze, reward, done = ppo.act(maze, jnp.zeros(4, int), key, 2)
        assert not reward.any() and not done.any()
    assert ppo.observe(maze, 2).tolist() == [[0, 0, 1]] * 4, "which side is forgotten"
    maze, reward, done = ppo.act(maze, jnp.array([1, 2, 2, 0]), key, 2)
    assert reward.tolist() == [1, 1, -1, 0] and done.tolist() == [True, True, True, False]
    assert maze.position_E.tolist() == [0, 0, 0, 2]


def test_ppo_learns_to_remember() -> None:
    """Over two steps of corridor; without memory no more than half of the episodes can be right."""
    _, right = load("ppo_rnn").train(updates=80, corridor=2, environments=32, length=32)
    assert float(right[-10:].mean()) > 0.9


@pytest.mark.slow
def test_ppo_remembers_the_length_of_its_corridor() -> None:
    _, right = load("ppo_rnn").train(updates=300, corridor=6)
    assert float(right[-10:].mean()) > 0.95
