# SPDX-License-Identifier: Apache-2.0
"""Every mesh gives the same numbers, holds its share of the state, and a time loop exchanges only
what it must."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_lstm import (
    RNN,
    Classification,
    Config,
    Forecasting,
    GRUCell,
    LanguageModel,
    LanguageModeling,
    LSTMCell,
    MeshConfig,
    RecurrentForecaster,
    TextModel,
    TrainConfig,
)
from flax_lstm.data.language import LanguageTable
from flax_lstm.data.series import SeriesTable
from flax_lstm.data.text import TextTable
from flax_lstm.machine.sharding import (
    abstract_batch,
    make_mesh,
    model_shards,
    on_each_device,
    on_mesh,
    put_batch,
    replicated,
    shard_like_params,
)
from flax_lstm.nn import recurrence
from flax_lstm.nn.recurrence import fused
from flax_lstm.training.assembly import assemble

ONE, MESHES = (1, 1, 1), [(8, 1, 1), (2, 4, 1), (2, 1, 4), (2, 2, 2)]
COLLECTIVE = (
    r"= [^=]*? (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
WORDS = [f"w{n}" for n in range(61)]  # 64 tokens with the special ones
TRAIN = TrainConfig(steps=20, batch_size=16, optimizer="sgd", learning_rate=0.1, clip=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tables for the three tasks."""
    folder, generator = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, generator.integers(4, 15))) for _ in range(240)]
    texts[0] = " ".join(WORDS)
    table = pd.DataFrame(
        {"text": texts, "label": [("a", "b", "c")[len(text) % 3] for text in texts]}
    )
    table.to_csv(folder / "texts.csv", index=False)
    hours = np.arange(400)
    times = pd.date_range("2024-01-01", periods=len(hours), freq="h").astype(str)
    columns = {"a": np.sin(hours * np.pi / 12) + hours / 200, "b": np.cos(hours * np.pi / 3)}
    pd.DataFrame({"time": times, **columns}).to_csv(folder / "series.csv", index=False)
    return folder


MODELS = {
    "classification": partial(TextModel, embed_size=8),
    "forecasting": RecurrentForecaster,
    "language": partial(LanguageModel, embed_size=8),
}


def config_of(kind, folder, mesh=ONE, model=None, **train):
    """A small run of a task, all of whose sizes divide by the meshes here."""
    texts = {"path": str(folder / "texts.csv"), "vocabulary_size": 64, "validation_fraction": 0.1}
    parts = {
        "classification": (TextTable(**texts, max_length=8, test_fraction=0.1), Classification()),
        "forecasting": (
            SeriesTable(path=str(folder / "series.csv"), lookback=12, horizon=3, season=6),
            Forecasting(),
        ),
        "language": (LanguageTable(**texts, sequence_length=6), LanguageModeling()),
    }
    data, task = parts[kind]
    settings = MODELS[kind](hidden_size=16, **(model or {}))
    return Config(kind, data, task, settings, replace(TRAIN, **train), MeshConfig(*mesh))


def trained(config, folder, steps=20, order=None):
    """Losses of some steps, and the gradient of the first (SGD's momentum then is the gradient)."""
    dataset = config.data.load(folder / f"assets-{config.name}")
    mesh, made, _ = assemble(config, dataset.info)
    source, state, losses, gradient = (
        dataset.train(config.train.batch_size, 0),
        made.init(),
        [],
        None,
    )
    for step in range(steps):
        batch = source[step]
        if order is not None:
            batch = jax.tree.map(lambda x: x[order], batch)
        state, metrics = made.train(state, put_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
        if step == 0 and config.train.optimizer == "sgd":
            states = jax.tree.leaves(
                state.opt_state, is_leaf=lambda s: isinstance(s, optax.TraceState)
            )
            (gradient,) = (
                jax.device_get(s.trace) for s in states if isinstance(s, optax.TraceState)
            )
    return np.array(losses), gradient


def assert_same_gradient(found, expected):
    """To 1e-5 of the largest entry of each array: single entries may cancel to nothing."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0),
        found,
        expected,
    )


def loops(hlo):
    """The collectives in the body of each loop of a compiled program, and those outside of all
    loops."""
    bodies, found, name = set(re.findall(r"body=%?([\w.\-]+)", hlo)), {}, ""
    for line in hlo.splitlines():
        name = head.group(1) if (head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line)) else name
        if match := re.search(COLLECTIVE, line):
            found.setdefault(name if name in bodies else "outside", []).append(match.group(1))
    return found.pop("outside", []), found


def compiled(config, folder):
    dataset = config.data.load(folder / f"assets-{config.name}")
    mesh, steps, _ = assemble(config, dataset.info)
    batch = abstract_batch(dataset.train(config.train.batch_size, 0)[0], mesh)
    return steps.train.lower(steps.abstract, batch).compile()


# --- numbers


def test_the_first_step_of_a_language_model_on_a_mesh_of_all_three_axes(folder):
    """Dropout of every kind, state carried, two accumulated parts, tied embeddings."""
    model = {
        "cell": "gru",
        "tied": True,
        "dropout": 0.2,
        "recurrent_dropout": 0.3,
        "weight_dropout": 0.1,
    }
    config = config_of("language", folder, model=model, accumulate=2)
    losses, gradient = trained(config, folder, 2)
    meshed, found = trained(replace(config, mesh=MeshConfig(2, 2, 2)), folder, 2)
    np.testing.assert_allclose(meshed, losses, rtol=2e-6)
    assert_same_gradient(found, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fused", "scan"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("kind", ["classification", "forecasting", "language"])
def test_every_mesh_trains_alike(kind, cell, backend, folder):
    model = {"cell": cell, "backend": backend, "recurrent_dropout": 0.2}
    losses, gradient = trained(config_of(kind, folder, model=model), folder)
    assert losses[-1] < losses[0]
    for sizes in MESHES:
        meshed, found = trained(config_of(kind, folder, sizes, model), folder)
        np.testing.assert_allclose(meshed[0], losses[0], rtol=2e-6)
        assert_same_gradient(found, gradient)
        np.testing.assert_allclose(meshed, losses, rtol=1e-5)
    parts, found = trained(
        config_of(kind, folder, (2, 1, 2), {"cell": cell, "backend": backend}, accumulate=4), folder
    )
    whole, gradient = trained(
        config_of(kind, folder, ONE, {"cell": cell, "backend": backend}), folder
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    assert_same_gradient(found, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("kind", ["classification", "forecasting", "language"])
def test_adamw_drifts_no_more_than_by_the_order_of_rows(kind, cell, folder):
    """Adam divides by the gradient's size, so that rounding shows; ten times as much as reordering
    a batch makes."""
    settings = {"optimizer": "adamw", "learning_rate": 1e-3, "clip": 1.0}
    losses, _ = trained(config_of(kind, folder, model={"cell": cell}, **settings), folder)
    orders = [np.random.default_rng(seed).permutation(16) for seed in range(3)]
    config = config_of(kind, folder, model={"cell": cell}, **settings)
    spread = max(np.abs(trained(config, folder, order=order)[0] - losses).max() for order in orders)
    assert 0 < spread < 1e-4
    for sizes in MESHES:
        meshed, _ = trained(config_of(kind, folder, sizes, {"cell": cell}, **settings), folder)
        assert np.abs(meshed - losses).max() <= 10 * spread, sizes


# --- exchange


@pytest.mark.parametrize("backend", ["fused", "scan"])
def test_a_time_loop_gathers_once_and_reduces_once(backend, folder):
    model = {"backend": backend, "recurrent_dropout": 0.2}
    program = compiled(config_of("language", folder, (2, 1, 4), model), folder)
    outside, inside = loops(program.as_text())
    assert outside and len(inside) == 2  # forward and backward
    for collectives in inside.values():
        reductions = [kind for kind in collectives if kind != "all-gather"]
        assert collectives.count("all-gather") <= 1 and reductions in (
            [],
            ["all-reduce"],
            ["reduce-scatter"],
        )


def test_a_time_loop_exchanges_nothing_unless_hidden_units_are_split(folder):
    outside, inside = loops(
        compiled(
            config_of("classification", folder, (2, 4, 1), {"bidirectional": True}), folder
        ).as_text()
    )
    assert outside and not inside


def test_logits_are_never_whole_on_a_device_that_holds_a_part_of_the_vocabulary(folder):
    hlo = compiled(config_of("language", folder, (2, 1, 4)), folder).as_text()
    assert "f32[8,6,16]" in hlo and not re.search(r"f32\[8,6,64\]", hlo)


def test_time_is_cut_in_chunks_by_what_one_device_keeps(folder, monkeypatch):
    """Eight devices share the hidden units, and keep an eighth of what a step leaves."""
    monkeypatch.setattr(
        fused, "KEEP", 10_000
    )  # bytes; 6 steps x 16 rows x 16 units x 6 arrays are 36,864

    def is_cut(mesh):
        config = config_of("language", folder, mesh, {"backend": "fused"})
        dataset = config.data.load(folder / "assets-language")
        made, steps, _ = assemble(config, dataset.info)
        batch = abstract_batch(dataset.train(config.train.batch_size, 0)[0], made)
        return "policy=None" in str(
            steps.train.trace(steps.abstract, batch).jaxpr
        )  # of jax.checkpoint

    assert is_cut((2, 1, 1)) and not is_cut((1, 1, 8))


# --- storage


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_each_device_stores_its_share_of_parameters_and_optimiser(optimizer, folder):
    config = config_of("language", folder, (1, 4, 2), {"cell": "gru"}, optimizer=optimizer, ema=0.9)
    dataset = config.data.load(folder / "assets-language")
    abstract = assemble(config, dataset.info).steps.abstract
    stored = {
        "embed/embedding": PartitionSpec(("model", "fsdp"), None),
        "head/bias": PartitionSpec(("model", "fsdp")),
        "head/kernel": PartitionSpec(None, ("model", "fsdp")),
        "recurrent/layers_0/cell/bias": PartitionSpec(None, ("model", "fsdp")),
        "recurrent/layers_0/cell/input": PartitionSpec("fsdp", None, "model"),
        "recurrent/layers_0/cell/recurrent": PartitionSpec("fsdp", None, "model"),
        "recurrent/layers_0/cell/recurrent_bias": PartitionSpec(("model", "fsdp")),
    }
    for tree in (abstract.params, abstract.ema):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.spec
            for path, leaf in leaves
        }
        assert {
            name: PartitionSpec(*(axes or None for axes in spec)) for name, spec in found.items()
        } == {
            name: PartitionSpec(*((axes,) if isinstance(axes, str) else axes for axes in spec))
            for name, spec in stored.items()
        }
    shapes = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(abstract.params)}
    moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.shape in shapes]
    assert len(moments) >= len(shapes)
    for leaf in moments:
        assert leaf.sharding.shard_shape(leaf.shape) == shapes[leaf.shape].shard_shape(leaf.shape)


def test_no_device_holds_a_whole_parameter(folder):
    config = config_of("language", folder, (2, 4, 1), optimizer="adamw", ema=0.9)
    steps = assemble(config, config.data.load(folder / "assets-language").info).steps
    state = steps.init()
    weights = (
        state.params,
        state.ema,
        [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim],
    )
    for leaf in jax.tree.leaves(weights):
        assert {4 * shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes}
    analysis = compiled(config, folder).memory_analysis()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert held <= analysis.argument_size_in_bytes < held + 2048 < whole  # the rest is the batch


def test_what_does_not_divide_stays_whole_and_is_told(folder, caplog):
    config = config_of("classification", folder, (2, 2, 2), {"dense": 5})
    with caplog.at_level("INFO", logger="flax_lstm"):
        abstract = assemble(
            config, config.data.load(folder / "assets-classification").info
        ).steps.abstract
    (message,) = (
        record.message for record in caplog.records if record.name == "flax_lstm.machine.sharding"
    )
    assert "dense/bias (5,) over fsdp" in message and "head/bias (3,) over fsdp" in message
    assert "cell" not in message
    assert abstract.params["dense"]["bias"].sharding.is_fully_replicated


def test_an_indivisible_vocabulary_leaves_the_mesh_to_the_next_rule(folder):
    config = config_of("language", folder, (1, 2, 4))
    config = replace(config, data=replace(config.data, vocabulary_size=63))
    abstract = assemble(config, config.data.load(folder / "assets-63").info).steps.abstract
    assert abstract.params["embed"]["embedding"].sharding.shard_shape((63, 8)) == (63, 1)
    assert abstract.params["head"]["kernel"].sharding.shard_shape((16, 63)) == (2, 63)


def test_the_state_of_an_optimiser_by_tree_and_shape():
    mesh = make_mesh(1, 8, 1)
    params = {"w": jnp.zeros((8, 2)), "b": jnp.zeros(8)}
    shardings = {"w": "split w", "b": "split b"}
    state = (jnp.zeros(()), {"mu": params, "factors": {"w": jnp.zeros(8), "b": jnp.zeros(8)}})
    count, found = shard_like_params(state, params, shardings, mesh)
    assert count.is_fully_replicated and found["mu"] == shardings
    assert found["factors"]["w"].is_fully_replicated and found["factors"]["b"] == "split b"


# --- what the modules know


def test_a_module_used_on_its_own_has_plain_arrays():
    x_BTD = jnp.zeros((2, 3, 4))
    variables = RNN(LSTMCell(8)).init(jax.random.key(0), x_BTD)
    assert all(isinstance(array, jax.Array) for array in variables["params"]["cell"].values())
    assert model_shards() == 1
    on_mesh(lambda: None, make_mesh())()
    with jax.sharding.use_abstract_mesh(make_mesh(2, 1, 4).abstract_mesh):
        assert model_shards() == 4


def test_a_backend_that_the_compiler_cannot_split_runs_on_each_device(folder, monkeypatch):
    """One that insists on its rows of the batch, and refuses split hidden units."""
    seen = []

    def run(cell, weights, x_BTD, *others):
        seen.append((x_BTD.shape[0], weights.recurrent_JGH.shape))
        return fused.run(cell, weights, x_BTD, *others)

    opaque = SimpleNamespace(
        run=run, supports=lambda *_: "hidden units are split" if model_shards() > 1 else None
    )
    monkeypatch.setitem(recurrence.BACKENDS, "fused", opaque)
    config = config_of(
        "classification", folder, model={"recurrent_dropout": 0.2, "backend": "fused"}
    )
    losses, gradient = trained(config, folder, 2)
    assert set(seen) == {(16, (16, 4, 16))}
    seen.clear()
    meshed, found = trained(replace(config, mesh=MeshConfig(4, 2, 1)), folder, 2)
    assert set(seen) == {(2, (16, 4, 16))}
    np.testing.assert_allclose(meshed, losses, rtol=2e-6)
    assert_same_gradient(found, gradient)
    info = config.data.load(folder / "assets-classification").info
    with pytest.raises(Exception, match="hidden units are split"):
        assemble(replace(config, mesh=MeshConfig(4, 1, 2)), info)
    auto = replace(config, model=replace(config.model, backend="auto"), mesh=MeshConfig(4, 1, 2))
    assert assemble(auto, info).steps.abstract  # takes the scan


def test_on_each_device_hands_over_rows_and_hidden_units():
    seen = []

    def run(weights, state, x_BTD, nothing):
        seen.append((weights["w"].shape, state[0].shape, x_BTD.shape, nothing))
        return state, jnp.broadcast_to(state[0][:, None], (*x_BTD.shape[:2], state[0].shape[1]))

    arguments = (
        {"w": jnp.zeros((3, 8))},
        (jnp.arange(32.0).reshape(4, 8),),
        jnp.zeros((4, 5, 3)),
        None,
    )
    mesh = make_mesh(2, 1, 4)
    apply = jax.jit(
        on_mesh(lambda *a: on_each_device(run)(*a), mesh), in_shardings=replicated(mesh)
    )
    _, y_BTH = apply(*arguments)
    assert seen == [((3, 2), (2, 2), (2, 5, 3), None)]
    np.testing.assert_array_equal(y_BTH[:, 0], arguments[1][0])
    assert on_each_device(run) is run


@pytest.mark.parametrize("backend", ["cpu", "fused", "scan", "foreign"])
def test_explicit_axes_keep_the_rows_where_they_are(backend, quick_compile):
    """In a library user's own program, of `jax.make_mesh`'s explicit axes: outputs and gradients
    are those of one device, split as the inputs are, and nothing is gathered."""
    cell = nn.GRUCell(7) if backend == "foreign" else GRUCell(7)
    rnn = RNN(cell, backend="auto" if backend == "foreign" else backend)
    x_BTD = jax.random.normal(jax.random.key(0), (8, 6, 5))
    lengths_B, reset_BT = jnp.arange(8) % 7, x_BTD[..., 0] > 1
    variables = rnn.init(jax.random.key(1), x_BTD)

    def step(variables, x_BTD, lengths_B, reset_BT):
        def loss(variables, x_BTD):
            _, y_BTH = rnn.apply(variables, x_BTD, lengths_B, reset_BT=reset_BT)
            return jnp.sum(jnp.sin(y_BTH)), y_BTH

        return jax.grad(loss, (0, 1), has_aux=True)(variables, x_BTD)

    expected = jax.jit(step)(variables, x_BTD, lengths_B, reset_BT)
    mesh = jax.make_mesh((8,), ("rows",), (AxisType.Explicit,))
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    rows = (place(a, "rows") for a in (x_BTD, lengths_B, reset_BT))
    arguments = (place(variables), *rows)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(*arguments).compile()
        found = compiled(*arguments)
    (_, dx_BTD), y_BTH = found
    assert dx_BTD.sharding.spec[0] == y_BTH.sharding.spec[0] == "rows"
    assert "all-gather" not in compiled.as_text()
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, jax.device_get(found), jax.device_get(expected))
