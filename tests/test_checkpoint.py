# SPDX-License-Identifier: Apache-2.0
"""What is kept, what can be restored, and what is said where it cannot."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_lstm import UserError
from flax_lstm.training import checkpoint
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


def fill(
    folder, monitors: dict[int, float | None], maximise: bool = False, best: Best | None = None
) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    best = best or Best()
    for step, monitor in monitors.items():
        best = best if monitor is None else best.after(monitor, step, maximise)
        checkpoints.save(state_at(step), Progress(monitor=monitor, best=best, seconds=step))
        checkpoints.prove(step + 1)
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
    first.wait()
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
        ({1: 0.9, 2: 0.3, 3: 0.5, 4: 0.7}, False, [2, 3, 4]),
        ({1: 0.3, 2: 0.9, 3: 0.5, 4: 0.7}, True, [2, 3, 4]),
        ({1: 0.9, 2: 0.3, 3: 0.5, 4: 0.1}, False, [3, 4]),
        # Between evaluations: among the latest, never the best.
        ({1: 0.9, 2: 0.3, 3: None, 4: None}, False, [2, 3, 4]),
        ({1: None, 2: None, 3: None}, False, [2, 3]),
        # Of equals the earliest, as `Best` has it.
        ({1: 0.5, 2: 0.3, 3: 0.3, 4: 0.6, 5: 0.6}, False, [2, 4, 5]),
        ({1: 0.5, 2: 0.8, 3: 0.8, 4: 0.6, 5: 0.6}, True, [2, 4, 5]),
    ],
)
def test_keeps_the_two_latest_and_the_best(tmp_path, monitors, maximise, kept):
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
    best = Checkpoints(tmp_path).progress(2).best
    second = fill(tmp_path, {3: 0.4, 4: None, 5: None}, best=best)
    assert second.steps() == [1, 4, 5] and second.best() == 1
    second.close()


def test_a_state_is_kept_once_the_step_after_it_is_known_to_be_finite(tmp_path):
    checkpoints = fill(tmp_path, {1: 0.5})
    checkpoints.save(state_at(2), Progress())
    checkpoints.prove(2)  # the step that made it
    checkpoints.settle()
    assert checkpoints.steps() == [1]
    checkpoints.save(state_at(3), Progress())  # nothing was heard of 2
    checkpoints.prove(4)
    checkpoints.settle()
    assert checkpoints.steps() == [1, 3]
    with pytest.raises(ZeroDivisionError), checkpoints:
        checkpoints.save(state_at(4), Progress())
        raise ZeroDivisionError
    assert Checkpoints(tmp_path).steps() == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_what_a_kill_leaves_is_passed_over_and_removed(tmp_path):
    """Of a save, of a checkpoint that was not sealed yet, of a deletion."""
    fill(tmp_path, {1: 0.5, 2: 0.6}).close()
    for left in ("3.unproven.orbax-checkpoint-tmp", "3.unproven", "1.deleted"):
        shutil.copytree(tmp_path / "2", tmp_path / left)
        for path in list((tmp_path / left).rglob("*"))[::2]:
            if path.is_file():
                path.unlink()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest_intact() == 2 and checkpoints.steps() == [1, 2]
    checkpoints.close()
    fill(tmp_path, {3: 0.4}).close()  # the same step again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    checkpoints = Checkpoints(tmp_path)
    assert_equal(checkpoints.restore(3, abstract(state_at(0)))[0], state_at(3))


def flip(content: bytes, generator: np.random.Generator) -> bytes:
    at = generator.integers(len(content))
    bit = 1 << generator.integers(8)
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


DAMAGES = {
    "a bit flipped": lambda path, g: path.write_bytes(flip(path.read_bytes(), g)),
    "cut": lambda path, g: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path, g: path.write_bytes(b""),
    "deleted": lambda path, g: path.unlink(),
    "added to": lambda path, g: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_noticed_and_the_next_checkpoint_used(damage, tmp_path):
    fill(tmp_path / "whole", {1: 0.5, 2: 0.6}).close()
    generator = np.random.default_rng(0)
    files = [p.relative_to(tmp_path) for p in (tmp_path / "whole" / "2").rglob("*") if p.is_file()]
    assert len(files) > 15
    for number, file in enumerate(files):
        if not (tmp_path / file).stat().st_size and damage != "deleted":
            continue
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        path = folder.joinpath(*file.parts[1:])
        DAMAGES[damage](path, generator)
        said: list[str] = []
        checkpoints = Checkpoints(folder, said.append)
        with pytest.raises(UserError, match=r"cannot be read .*There are others: 1"):
            checkpoints.restore(2, abstract(state_at(0)))
        assert checkpoints.newest_intact() == 1
        assert len(said) == 1 and str(path) in said[0]
        assert "set aside as 2.damaged; going on from step 1, 1 earlier" in said[0]
        assert sorted(p.name for p in folder.iterdir()) == ["1", "2.damaged"]


def test_where_all_are_damaged_nothing_begins_anew(tmp_path):
    fill(tmp_path, {1: 0.5, 2: 0.6}).close()
    for step in (1, 2):
        path = tmp_path / str(step) / "progress" / "metadata"
        path.write_bytes(path.read_bytes().replace(b"0.", b"1."))
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint is left .*1\.damaged, 2\.damaged"):
            Checkpoints(tmp_path).newest_intact()


def test_the_best_of_those_left_stands_in_for_a_damaged_best(tmp_path):
    fill(tmp_path, {1: 0.5, 2: 0.6, 3: 0.7}).close()
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, said.append)
    assert checkpoints.best_intact(1, maximise=False) == 1 and not said
    (tmp_path / "1" / "manifest.json").unlink()
    assert Checkpoints(tmp_path, said.append).best_intact(1, maximise=False) == 2
    assert "best step, 1, is damaged" in said[0] and "those of step 2" in said[0]


def test_a_save_that_fails_costs_a_line_and_the_next_one_is_tried(tmp_path):
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, said.append)
    for step in range(1, 5):
        broken = tmp_path / "2.unproven"
        if step == 2:
            broken.write_text("a file in the way")
        checkpoints.save(state_at(step), Progress())
        checkpoints.prove(step + 1)
        checkpoints.settle()
        if step == 2:
            broken.unlink(missing_ok=True)
            with pytest.raises(UserError, match=r"Make room.* goes on from step 1"):
                checkpoints.wait()
    checkpoints.wait()
    checkpoints.close()
    assert len(said) == 1 and str(tmp_path) in said[0] and len(said[0].splitlines()) == 1
    assert "step 2 cannot be saved" in said[0] and "the last good one is of step 1" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_among_several_processes_a_save_that_fails_ends_the_run_with_its_own_error(
    tmp_path, monkeypatch
):
    """The others wait for it: also where it fails before there is a writer."""

    def fail(self, step, items):
        raise OSError("the other is gone")

    monkeypatch.setattr(Checkpoints, "_write", fail)
    monkeypatch.setattr(checkpoint, "process_count", lambda: 2)
    with pytest.raises(OSError, match="the other is gone"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(TrainState(*[np.int32(1)] * len(TrainState._fields)), Progress())


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
    first.wait()
    first.close()
    second = Checkpoints(tmp_path)
    after, _ = second.restore(5, abstract(before, wanted))
    assert_equal(after, before)
    assert all(len(x.sharding.device_set) == devices for x in jax.tree.leaves(after))
    second.close()
