# SPDX-License-Identifier: Apache-2.0
"""What is kept, what can be restored, and what is said where it cannot."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_lstm import UserError
from flax_lstm.training.checkpoint import Checkpoints
from flax_lstm.training.progress import Best, Progress
from flax_lstm.training.steps import TrainState


def state_at(step: int, carry: bool = False) -> TrainState:
    """A state whose every number names the step."""
    params = {
        "cell": {"kernel": jnp.full((4, 3), step, jnp.float32)},
        "head": {"bias": jnp.arange(3.0) + step},
    }
    moments = (jax.tree.map(lambda p: -p, params), jnp.asarray(step, jnp.int32))
    return TrainState(
        jnp.asarray(step, jnp.int32),
        params,
        moments,
        jax.tree.map(lambda p: p / 2, params) if carry else None,
        {"h": jnp.full((8, 2), step, jnp.float32)} if carry else None,
    )


def abstract(state: TrainState, sharding=None) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def fill(folder, monitors: dict[int, float | None], maximise: bool = False) -> Checkpoints:
    checkpoints = Checkpoints(folder, maximise)
    for step, monitor in monitors.items():
        checkpoints.save(state_at(step), Progress(monitor=monitor, seconds=step))
    checkpoints.wait()
    return checkpoints


def assert_equal(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("carry", [False, True])
def test_another_process_restores_the_same(tmp_path, carry):
    before = state_at(3, carry)
    first = Checkpoints(tmp_path)
    first.save(before, Progress(monitor=0.5, best=Best(0.5, 3, 0), losses=(0.1, 0.3)))
    first.close()
    second = Checkpoints(tmp_path)  # as another process would: it knows nothing of what was saved
    assert second.latest() == 3 and second.steps() == [3]
    after, progress = second.restore(3, abstract(before))
    assert_equal(before, after)
    assert (
        progress
        == Progress(monitor=0.5, best=Best(0.5, 3, 0), losses=(0.1, 0.3))
        == second.progress(3)
    )
    assert_equal(second.restore_params(3, abstract(before)), before.ema if carry else before.params)
    second.close()


@pytest.mark.parametrize(
    ("monitors", "maximise", "kept"),
    [
        ({1: 0.9, 2: 0.3, 3: 0.5, 4: 0.7}, False, [2, 4]),
        ({1: 0.3, 2: 0.9, 3: 0.5, 4: 0.7}, True, [2, 4]),
        ({1: 0.9, 2: 0.3, 3: 0.5, 4: 0.1}, False, [4]),
        (
            {1: 0.9, 2: 0.3, 3: None, 4: None},
            False,
            [2, 4],
        ),  # between evaluations: the latest, never the best
        ({1: None, 2: None}, False, [2]),
        (
            {1: 0.5, 2: 0.3, 3: 0.3, 4: 0.6},
            False,
            [2, 4],
        ),  # of equals the earliest, as `Best` has it
        ({1: 0.5, 2: 0.8, 3: 0.8, 4: 0.6}, True, [2, 4]),
    ],
)
def test_keeps_the_latest_and_the_best(tmp_path, monitors, maximise, kept):
    checkpoints = fill(tmp_path, monitors, maximise)
    assert checkpoints.steps() == kept and checkpoints.latest() == max(monitors)
    for step in kept:
        state, progress = checkpoints.restore(step, abstract(state_at(0)))
        assert_equal(state, state_at(step))
        assert progress.seconds == step
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(step) for step in kept]


def test_the_best_stays_the_best_for_the_next_process(tmp_path):
    fill(tmp_path, {1: 0.1, 2: 0.5}).close()
    second = fill(tmp_path, {3: 0.4, 4: None})
    assert second.steps() == [1, 4]
    second.close()


def test_what_a_kill_leaves_of_a_save_is_passed_over(tmp_path):
    fill(tmp_path, {1: 0.5, 2: 0.6}).close()
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    for path in list((tmp_path / "3.orbax-checkpoint-tmp").rglob("*"))[::2]:
        if path.is_file():
            path.unlink()
    checkpoints = fill(tmp_path, {})
    assert checkpoints.latest() == 2
    checkpoints.save(state_at(3), Progress(monitor=0.4))  # the same step again
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert_equal(checkpoints.restore(3, abstract(state_at(0)))[0], state_at(3))
    checkpoints.close()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
def test_what_a_kill_leaves_of_a_deletion_does_not_bar_the_latest(tmp_path, share):
    fill(tmp_path, {1: 0.5, 2: 0.6}).close()
    files = sorted(path for path in (tmp_path / "1").rglob("*") if path.is_file())
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    for path in files[: round(share * len(files))]:
        path.unlink()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 2
    assert_equal(checkpoints.restore(2, abstract(state_at(0)))[0], state_at(2))
    checkpoints.save(state_at(3), Progress(monitor=0.4))
    checkpoints.wait()
    assert checkpoints.steps() == [3]
    checkpoints.close()


def test_a_truncated_file_is_a_user_error_and_never_wrong_values(tmp_path):
    checkpoints = fill(tmp_path / "whole", {1: 0.5, 2: 0.6})
    checkpoints.close()
    files = [
        path.relative_to(tmp_path / "whole")
        for path in (tmp_path / "whole" / "2").rglob("*")
        if path.is_file()
    ]
    errors = 0
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])
        try:
            damaged = Checkpoints(folder)
            state, _ = damaged.restore(2, abstract(state_at(0)))
            assert_equal(state, state_at(2))  # a file that nothing depends on
            damaged.close()
        except UserError as error:
            assert (
                str(folder) in str(error)
                and "cannot be read" in str(error)
                and "1" in str(error).split("read")[1]
            )
            errors += 1
    assert errors >= 5, f"{errors} of {len(files)}"


def test_a_checkpoint_of_another_model_names_the_parameters(tmp_path):
    checkpoints = fill(tmp_path, {1: 0.5})
    params = {"cell": {"kernel": jnp.zeros((4, 5))}, "dense": {"bias": jnp.zeros(3)}}
    other = state_at(0)._replace(params=params)
    with pytest.raises(UserError, match="another model") as error:
        checkpoints.restore(1, abstract(other))
    lines = str(error.value).splitlines()
    assert "  cell/kernel: (4, 3) there, (4, 5) here" in lines
    assert "  head/bias: (3,) there, absent here" in lines
    assert "  dense/bias: absent there, (3,) here" in lines
    checkpoints.close()


@pytest.mark.parametrize("devices", [1, 8])
def test_restores_onto_another_mesh(tmp_path, devices):
    saved, wanted = (
        NamedSharding(
            jax.make_mesh((n,), ("data",), (AxisType.Auto,), devices=jax.devices()[:n]),
            PartitionSpec(),
        )
        for n in (9 - devices, devices)
    )
    before = jax.device_put(state_at(5, carry=True), saved)
    first = Checkpoints(tmp_path)
    first.save(before, Progress())
    first.close()
    second = Checkpoints(tmp_path)
    after, _ = second.restore(5, abstract(before, wanted))
    assert_equal(after, before)
    assert all(len(x.sharding.device_set) == devices for x in jax.tree.leaves(after))
    second.close()
