# SPDX-License-Identifier: Apache-2.0
"""Pooling, the sequence model and the two forecasters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_lstm import UserError
from flax_lstm.data.base import Known, SeriesForm
from flax_lstm.nn.models import (
    AttentionPool,
    ConcatPool,
    LanguageModel,
    RecurrentForecaster,
    RecurrentModel,
    TextModel,
    ends_pool,
    last_pool,
    max_pool,
    mean_pool,
)
from flax_lstm.nn.segments import SegmentModel, window_level

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)
LENGTHS = np.array([0, 1, 3, 5], np.int32)  # none, one, some, all steps


def outputs_BTH(seed: int = 0) -> np.ndarray:
    """Negative and positive numbers, zeros where a layer outputs zeros: in the padding."""
    y = np.random.default_rng(seed).normal(size=(4, 5, 6)).astype(np.float32) - 1
    return np.where((np.arange(5) < LENGTHS[:, None])[..., None], y, 0).astype(np.float32)


def by_row(rule, y=None):
    y = outputs_BTH() if y is None else y
    width = rule(np.ones((1, y.shape[-1]))).shape[-1]
    return np.stack(
        [rule(row[:n]) if n else np.zeros(width) for row, n in zip(y, LENGTHS, strict=True)]
    )


def initial(module, *inputs):
    """Variables of the right shapes, all of them drawn, so that no bias is zero; nothing is
    compiled."""
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, KEY, *inputs)
    return jax.tree.map(lambda s: generator.normal(0, 0.5, s.shape).astype(s.dtype), shapes)


def apply(module, variables, *inputs):
    return jax.device_get(jax.jit(module.apply)(variables, *inputs))


def close(one, other, atol=1e-6):
    np.testing.assert_allclose(one, other, atol=atol)


def test_pools_by_hand_for_rows_of_none_one_some_and_all_steps():
    y, lengths = jnp.asarray(outputs_BTH()), jnp.asarray(LENGTHS)
    close(last_pool(y, lengths), by_row(lambda steps: steps[-1]))
    close(mean_pool(y, lengths), by_row(lambda steps: steps.mean(0)))
    close(max_pool(y, lengths), by_row(lambda steps: steps.max(0)))
    close(
        ends_pool(y, lengths), by_row(lambda steps: np.concatenate([steps[-1, :3], steps[0, 3:]]))
    )
    concatenated = by_row(lambda steps: np.concatenate([steps[-1], steps.max(0), steps.mean(0)]))
    close(ConcatPool()(y, lengths), concatenated)
    spoilt = jnp.where((jnp.arange(5)[None] < lengths[:, None])[..., None], y, 7.0)
    for pool in (mean_pool, max_pool):  # padding does not count even where it is not zero
        close(pool(spoilt, lengths), pool(y, lengths))


def test_attention_by_hand_ignores_padding_and_empty_rows():
    y, lengths = jnp.asarray(outputs_BTH()), jnp.asarray(LENGTHS)
    pool = AttentionPool()
    variables = initial(pool, y, lengths)
    first, second = (variables["params"][f"Dense_{n}"] for n in range(2))

    def rule(steps):
        score = np.tanh(steps @ first["kernel"] + first["bias"]) @ second["kernel"]
        share = np.exp(score) / np.exp(score).sum()
        return (share * steps).sum(0)

    close(pool.apply(variables, y, lengths), by_row(rule))
    spoilt = jnp.where((jnp.arange(5)[None] < lengths[:, None])[..., None], y, 7.0)
    close(pool.apply(variables, spoilt, lengths), by_row(rule))


@pytest.mark.parametrize(
    ("pooling", "bidirectional"),
    [
        ("last", False),
        ("last", True),
        ("max", True),
        ("mean", False),
        ("concat", True),
        ("attention", True),
    ],
)
def test_padding_changes_nothing(pooling, bidirectional):
    settings = TextModel(
        hidden_size=4,
        embed_size=4,
        pooling=pooling,
        bidirectional=bidirectional,
        dense=4,
        cell="gru",
    )
    module = settings.sequence(3, vocabulary_size=9)
    tokens = np.random.default_rng(1).integers(1, 9, (4, 5)).astype(np.int32)
    variables = initial(module, tokens, LENGTHS)
    state, outputs = apply(module, variables, tokens, LENGTHS)
    assert outputs.shape == (4, 3) and outputs.dtype == jnp.float32
    wide = (
        np.random.default_rng(2).integers(1, 9, (4, 8)).astype(np.int32)
    )  # another padding, and more of it
    wide[:, :5] = np.where(np.arange(5) < LENGTHS[:, None], tokens, wide[:, :5])
    wide_state, wide_outputs = apply(module, variables, wide, LENGTHS)
    close(outputs, wide_outputs)
    jax.tree.map(close, state, wide_state)
    if pooling == "concat":  # of all the others
        _, alone = apply(
            module, variables, tokens[2:3, :3], None
        )  # a row alone, without any padding
        close(outputs[2], alone[0])


def test_last_of_a_bidirectional_layer_is_what_both_directions_end_with():
    module = RecurrentModel(hidden_size=4, bidirectional=True).sequence(3)
    x = np.random.default_rng(3).normal(size=(4, 5, 2)).astype(np.float32)
    variables = initial(module, x, LENGTHS)
    (((forward, backward),), outputs) = apply(module, variables, x, LENGTHS)
    head = variables["params"]["head"]
    ends = np.concatenate([forward.h_BH, backward.h_BH], axis=-1)
    close(outputs, ends @ head["kernel"] + head["bias"])
    assert np.abs(ends[1:]).min() > 0


def test_tied_embeddings_are_the_head():
    module = LanguageModel(hidden_size=4, embed_size=4, tied=True).language_model(9)
    tokens = np.random.default_rng(4).integers(0, 9, (2, 5)).astype(np.int32)
    params = initial(module, tokens)["params"]
    assert set(params) == {"embed", "head_bias", "recurrent"}
    assert params["embed"]["embedding"].shape == (9, 4)
    table = params["embed"]["embedding"] + (np.arange(9) == 8)[:, None].astype(np.float32)
    changed = {**params, "embed": {"embedding": table}}
    tokens = np.minimum(tokens, 7)  # 8 is read nowhere: only the head can see the change
    difference = np.abs(
        apply(module, {"params": changed}, tokens)[1] - apply(module, {"params": params}, tokens)[1]
    )
    assert difference[..., 8].max() > 1e-3 and difference[..., :8].max() == 0
    narrow = LanguageModel(hidden_size=6, embed_size=4, tied=True).language_model(9)
    params = jax.eval_shape(narrow.init, KEY, tokens)["params"]
    assert params["to_embedding"]["kernel"].shape == (6, 4) and "head" not in params
    untied = LanguageModel(hidden_size=4, embed_size=4).language_model(9)
    assert jax.eval_shape(untied.init, KEY, tokens)["params"]["head"]["kernel"].shape == (4, 9)


@functools.cache
def forecaster(settings, steps, horizon, per_value):
    module = settings.forecaster(SeriesForm(steps, horizon, 2, per_value))
    return functools.partial(initial, module), jax.jit(module.apply)


def forecast(settings, x, horizon=3, per_value=1, covariates=None, variables=None):
    """Variables, drawn unless given, and forecasts [B, N, C, Q] of the first two channels."""
    init, run = forecaster(settings, x.shape[1], horizon, per_value)
    lengths = np.full(len(x), x.shape[1], np.int32)
    if covariates is not None:
        covariates = Known(phase=np.zeros(len(x), np.int32), future=covariates)
    variables = variables or init(x, lengths, None, covariates)
    return variables, np.asarray(run(variables, x, lengths, None, covariates)[1])


def series(steps: int = 7, features: int = 2, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, steps, features)).astype(np.float32)


def test_a_shifted_series_has_a_shifted_forecast():
    x, shift = series(features=3), np.array([100.0, -7.0, 0.0], np.float32)
    for settings in (RecurrentForecaster(hidden_size=4), SegmentModel(hidden_size=4, segment=3)):
        variables, plain = forecast(settings, x)
        _, shifted = forecast(settings, x + shift, variables=variables)
        assert plain.shape == (4, 3, 2, 1)
        close(shifted - plain, np.broadcast_to(shift[None, None, :2, None], plain.shape), atol=1e-4)
    variables, plain = forecast(RecurrentForecaster(hidden_size=4, subtract_last=False), x)
    _, shifted = forecast(
        RecurrentForecaster(hidden_size=4, subtract_last=False), x + shift, variables=variables
    )
    assert (
        np.abs(shifted - plain).max() < 50
    )  # bounded hidden units: nothing of the shift comes through


def test_forecasts_have_their_channels_and_quantiles_in_place():
    x = series()
    variables, plain = forecast(RecurrentForecaster(hidden_size=4), x, per_value=3)
    head = variables["params"]["model"]["head"]
    changed = {
        **head,
        "bias": head["bias"] + np.float32(5) * (np.arange(18) == 8),
    }  # (1 * 2 + 0) * 3 + 2: step 1, channel 0, quantile 2
    variables = {"params": {"model": {**variables["params"]["model"], "head": changed}}}
    _, moved = forecast(RecurrentForecaster(hidden_size=4), x, per_value=3, variables=variables)
    expected = np.zeros((3, 2, 3))
    expected[1, 0, 2] = 5
    close(moved - plain, np.broadcast_to(expected, plain.shape), atol=1e-5)


@pytest.mark.parametrize(("steps", "horizon"), [(6, 6), (7, 4), (8, 2), (3, 7)])
def test_segments_of_any_look_back_and_horizon(steps, horizon):
    x, settings = series(steps), SegmentModel(hidden_size=5, segment=3, dropout=0.0)
    variables, whole = forecast(settings, x, horizon, per_value=2)
    assert whole.shape == (4, horizon, 2, 2)
    _, used = forecast(settings, x[:, steps % 3 :], horizon, per_value=2, variables=variables)
    close(whole, used)  # what is no whole segment is the oldest, and is left out
    assert variables["params"]["position"].shape == (-(-horizon // 3), 2)
    moved = x.copy()
    moved[:, steps % 3] += 1
    assert (
        np.abs(
            forecast(settings, moved, horizon, per_value=2, variables=variables)[1] - whole
        ).max()
        > 1e-4
    )


def test_segment_forecasts_of_channels_do_not_depend_on_each_other():
    x, settings = series(), SegmentModel(hidden_size=4, segment=3)
    variables, plain = forecast(settings, x)
    moved = x.copy()
    moved[..., 1] *= -2
    _, other = forecast(settings, moved, variables=variables)
    np.testing.assert_array_equal(other[:, :, 0], plain[:, :, 0])
    assert np.abs(other[:, :, 1] - plain[:, :, 1]).max() > 0.1


@pytest.mark.parametrize(
    "settings", [RecurrentForecaster(hidden_size=4), SegmentModel(hidden_size=4, segment=3)]
)
def test_known_covariates_of_past_and_future_are_read(settings):
    x = series(7)
    known = np.random.default_rng(6).normal(size=(4, 7 + 4, 2)).astype(np.float32)
    variables, plain = forecast(settings, x, horizon=4, covariates=known)
    for step, matters in (
        (0, isinstance(settings, RecurrentForecaster)),
        (3, True),
        (7, True),
        (10, True),
    ):
        moved = known.copy()
        moved[:, step] += 3
        _, other = forecast(settings, x, horizon=4, covariates=moved, variables=variables)
        assert (np.abs(other - plain).max() > 1e-5) == matters, step


def test_a_segment_longer_than_the_look_back_is_a_user_error():
    with pytest.raises(UserError, match=r"model.segment 24 is longer than data.lookback 7"):
        SegmentModel(segment=24).forecaster(SeriesForm(7, 3, 2))


def test_bfloat16_keeps_weights_and_outputs_in_float32():
    x = series()
    for settings in (
        RecurrentForecaster(hidden_size=4, dtype="bfloat16"),
        SegmentModel(hidden_size=4, segment=3),
    ):
        variables, outputs = forecast(settings, x)
        assert outputs.dtype == np.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    exact = forecast(
        RecurrentForecaster(hidden_size=4),
        x,
        variables=forecast(RecurrentForecaster(hidden_size=4), x)[0],
    )[1]
    rough = forecast(RecurrentForecaster(hidden_size=4, dtype="bfloat16"), x)[1]
    np.testing.assert_allclose(rough, exact, atol=0.05)
    assert np.abs(rough - exact).max() > 0


def known_from(phase, observed=None):
    return Known(phase=np.asarray(phase, np.int32), observed=observed)


def segment_forecast(settings, x, known, form, variables=None):
    module = settings.forecaster(form)
    lengths = np.full(len(x), x.shape[1], np.int32)
    variables = variables or initial(module, x, lengths, None, known)
    return variables, np.asarray(module.apply(variables, x, lengths, None, known)[1])


@pytest.mark.parametrize("window", ["standard", "robust", "seasonal"])
def test_a_normalised_window_makes_forecasts_follow_level_and_scale(window):
    x, form = series(steps=8, features=1), SeriesForm(8, 3, season=3)
    settings = SegmentModel(hidden_size=4, segment=2, window=window)
    known = known_from([0] * 4)
    variables, plain = segment_forecast(settings, x, known, form)
    _, moved = segment_forecast(settings, 30 * x - 7, known, form, variables)
    close(moved, 30 * plain - 7, atol=1e-2)  # a ten-thousandth is added to the scale


def test_the_cycle_is_taken_away_before_and_put_back_after():
    """With a cycle that is known, a series of that cycle is forecast as if it were flat."""
    form, settings = SeriesForm(6, 5, season=4), SegmentModel(hidden_size=4, segment=2, cycle=True)
    cycle_W, phases = np.array([0.0, 3.0, -1.0, 2.0], np.float32), np.array([0, 1, 3])
    steps = phases[:, None] + np.arange(11)
    x = cycle_W[steps[:, :6] % 4][..., None]
    variables, _ = segment_forecast(settings, x, known_from(phases), form)
    assert variables["params"]["cycle"].shape == (4, 1)
    learned, none = (
        {"params": {**variables["params"], "cycle": c}}
        for c in (cycle_W[:, None], np.zeros((4, 1)))
    )
    _, level = segment_forecast(settings, np.zeros_like(x), known_from(phases), form, none)
    _, found = segment_forecast(settings, x, known_from(phases), form, learned)
    close(found[..., 0, 0], level[..., 0, 0] + cycle_W[steps[:, 6:] % 4], atol=1e-5)


def test_what_was_not_observed_does_not_move_the_window():
    x = series(steps=8, features=1)
    observed = np.ones_like(x)
    observed[:, 2] = 0
    for kind in ("standard", "robust"):
        kept = jnp.asarray(np.delete(x, 2, axis=1))
        found = window_level(kind, jnp.asarray(x), jnp.asarray(observed))
        expected = window_level(kind, kept, jnp.ones_like(kept))
        for one, other in zip(found, expected, strict=True):
            close(np.asarray(one), np.asarray(other), atol=1e-6)
    # Of nothing, or next to nothing, no window is as narrow as one that is constant.
    for seen in (0, 1):
        few = np.zeros_like(x)
        few[:, :seen] = 1
        for kind in ("standard", "robust", "seasonal"):
            _, unknown = window_level(kind, jnp.asarray(x), jnp.asarray(few), 2)
            _, constant = window_level(kind, jnp.ones_like(x), jnp.ones_like(x), 2)
            assert (unknown == 1).all() and (constant < 1e-3).all()
    settings = SegmentModel(hidden_size=4, segment=2, window="standard")
    variables, _ = segment_forecast(settings, x, known_from([0] * 4, observed), SeriesForm(8, 3))
    assert "observed" in variables["params"]


@pytest.mark.parametrize(
    ("season", "lookback", "segment"), [(24, 168, 24), (1, 96, 24), (168, 336, 24), (12, 36, 12)]
)
def test_segments_follow_from_the_season(season, lookback, segment):
    assert SegmentModel().steps(SeriesForm(lookback, 12, season=season)) == segment
    assert SegmentModel(segment=5).steps(SeriesForm(lookback, 12, season=season)) == 5


def test_a_seasonal_window_adds_to_the_last_season():
    """Whatever the network says, a series that repeats itself is forecast to go on."""
    x = np.tile(series(steps=4, features=1), (1, 3, 1)) * 50
    form = SeriesForm(12, 6, season=4)
    settings = SegmentModel(hidden_size=4, segment=3, window="seasonal")
    variables, found = segment_forecast(settings, x, known_from([0] * 4), form)
    close(found[..., 0, 0], x[:, [0, 1, 2, 3, 0, 1], 0], atol=1e-2)
    assert variables["params"]["profile"]["kernel"].shape == (4, 4)
    with pytest.raises(UserError, match="needs a look-back of two seasons"):
        settings.forecaster(SeriesForm(7, 6, season=4))


def test_the_highway_adds_a_linear_forecast_of_the_look_back():
    x = series(steps=8, features=2)
    form = SeriesForm(8, 3, channels=2, season=3)
    settings = SegmentModel(hidden_size=4, segment=2, window="last", highway=True)
    known = known_from([0] * len(x))
    variables, found = segment_forecast(settings, x, known, form)
    kernel = variables["params"]["highway"]["kernel"]
    level = {**variables["params"], "highway": {"kernel": np.zeros((8, 3))}}
    _, plain = segment_forecast(settings, x, known, form, {"params": level})
    added = np.einsum("btc,tn->bnc", x - x[:, -1:], np.asarray(kernel))
    close(found[..., 0], plain[..., 0] + added, atol=1e-4)
    # What the queries see of the look-back does not go through the recurrence.
    without = {**variables["params"], "look_back": {"kernel": np.zeros((8, 4)), "bias": np.ones(4)}}
    _, blind = segment_forecast(settings, x, known, form, {"params": without})
    assert np.abs(blind - found).max() > 1e-3


@pytest.mark.parametrize("window", ["last", "seasonal"])
def test_a_sparse_highway_has_one_rule_for_all_steps_of_a_season(window):
    """From the same step of the two seasons that the look-back holds whole."""
    x, form = series(steps=8, features=2), SeriesForm(8, 5, channels=2, season=3)
    settings = SegmentModel(
        hidden_size=4, segment=2, window=window, highway=True, highway_sparse=True
    )
    known, rule_KM = known_from([0] * len(x)), np.array([[0.5, -1.0], [2.0, 0.25]], np.float32)
    variables, _ = segment_forecast(settings, x, known, form)
    without, with_rule = (
        {"params": {**variables["params"], "highway": {"kernel": kernel_KM}}}
        for kernel_KM in (0 * rule_KM, rule_KM)
    )
    _, plain = segment_forecast(settings, x, known, form, without)
    _, found = segment_forecast(settings, x, known, form, with_rule)
    # Relative to the last value, or to the last season, which is itself relative to the last value.
    last = x[:, -1:]
    before = x[:, 2:5] - (x[:, 5:] if window == "seasonal" else last)
    seasons_BKWC = np.stack([before, x[:, 5:] - last], axis=1)
    added_BMWC = np.einsum("bkwc,km->bmwc", seasons_BKWC, rule_KM)
    added_BNC = added_BMWC.reshape(len(x), 6, 2)[:, :5]
    close(found[..., 0], plain[..., 0] + added_BNC, atol=1e-5)


def test_queries_can_be_kept_from_seeing_the_look_back():
    """With a highway that is 0 the forecast is then that of a model without one."""
    x, form = series(steps=8, features=1), SeriesForm(8, 3, season=3)
    settings = SegmentModel(hidden_size=4, segment=2, highway=True, highway_seen=False)
    plain = SegmentModel(hidden_size=4, segment=2)
    known = known_from([0] * len(x))
    variables, expected = segment_forecast(plain, x, known, form)
    highway = {"kernel": np.zeros((8, 3), np.float32)}
    both = {"params": {**variables["params"], "highway": highway}}
    _, found = segment_forecast(settings, x, known, form, both)
    close(found, expected, atol=1e-6)


def test_a_sparse_highway_is_refused_without_a_highway_or_a_season_to_read():
    with pytest.raises(UserError, match=r"add --model\.highway True"):
        SegmentModel(highway_sparse=True)
    sparse = SegmentModel(highway=True, highway_sparse=True)
    with pytest.raises(UserError, match=r"data.season 24, data.lookback 23"):
        sparse.forecaster(SeriesForm(23, 6, season=24))


@pytest.mark.parametrize("window", ["last", "standard", "seasonal"])
def test_with_a_highway_training_begins_at_the_naive_forecast(window):
    x, form = series(steps=8, features=1), SeriesForm(8, 5, season=3)
    settings = SegmentModel(hidden_size=4, segment=2, window=window, highway=True)
    module, known = settings.forecaster(form), known_from([0] * len(x))
    lengths = np.full(len(x), 8, np.int32)
    variables = module.init(jax.random.key(0), x, lengths, None, known)
    _, found = segment_forecast(settings, x, known, form, variables)
    naive = x[:, [5, 6, 7, 5, 6], 0] if window == "seasonal" else np.repeat(x[:, -1], 5, axis=1)
    close(found[..., 0, 0], naive, atol=1e-5)


def test_the_highway_can_make_the_last_value_of_the_last_season():
    x, form = series(steps=8, features=1), SeriesForm(8, 5, season=3)
    settings = SegmentModel(hidden_size=4, segment=2, window="seasonal", highway=True)
    module, known = settings.forecaster(form), known_from([0] * len(x))
    lengths = np.full(len(x), 8, np.int32)
    params = module.init(jax.random.key(0), x, lengths, None, known)["params"]
    undone_TN = np.zeros((8, 5), np.float32)
    undone_TN[[5, 6, 7, 5, 6], range(5)] = -1
    variables = {"params": {**params, "highway": {"kernel": undone_TN}}}
    _, found = segment_forecast(settings, x, known, form, variables)
    close(found[..., 0, 0], np.repeat(x[:, -1], 5, axis=1), atol=1e-5)


def test_channels_that_are_not_told_apart_follow_one_rule():
    x_BT1, form = series(steps=8, features=1), SeriesForm(8, 3, channels=2, season=3)
    x = np.concatenate([x_BT1, x_BT1], axis=-1)
    for apart in (True, False):
        settings = SegmentModel(hidden_size=4, segment=2, apart=apart)
        _, found = segment_forecast(settings, x, known_from([0] * len(x)), form)
        assert (np.abs(found[:, :, 0] - found[:, :, 1]).max() < 1e-6) != apart
