# SPDX-License-Identifier: Apache-2.0
"""Models: embed -> recurrent stack -> pooling -> head.

`RecurrentModel`, `TextModel`, `LanguageModel` and `RecurrentForecaster` are settings of the `model`
section of a config; their methods build the Flax modules. The modules (`SequenceModel`,
`Forecaster`) can be used without any config. The segment-wise forecaster is in `segments.py`.

Axes: B batch, T time, D input features, H hidden units, O outputs, N horizon, C target channels, K
covariates, Q outputs per forecast value (1, or the number of quantiles). Every module maps
`(inputs, lengths_B, state, covariates, deterministic)` to `(state, outputs)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_lstm.data.base import Features, SeriesForm, Tokens, Windows
from flax_lstm.errors import ArgumentError, require, within
from flax_lstm.machine.sharding import named
from flax_lstm.nn.layers import RNN, Bidirectional, Stack
from flax_lstm.nn.likelihoods import placed
from flax_lstm.nn.ngrams import NGrams
from flax_lstm.nn.recurrence import BackendName
from flax_lstm.nn.recurrence.rows import reverse_rows
from flax_lstm.nn.variants import BY_NAME, CellName

Array = jax.Array
DTypeName = Literal["float32", "bfloat16"]
PoolingName = Literal["last", "max", "mean", "concat", "attention"]
Pool = Callable[[Array, Array], Array]  # (y_BTH, lengths_B) -> [B, features]

DTYPES: dict[DTypeName, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def valid_steps(y_BTH: Array, lengths_B: Array) -> Array:
    """[B, T, 1]: True where a step is not padding."""
    return (jnp.arange(y_BTH.shape[1])[None] < lengths_B[:, None])[..., None]


def last_pool(y_BTH: Array, lengths_B: Array) -> Array:
    """The output of the last valid step; zeros for an empty row."""
    steps = jnp.maximum(lengths_B - 1, 0)
    return jnp.take_along_axis(y_BTH, steps[:, None, None], axis=1)[:, 0]


def ends_pool(y_BTH: Array, lengths_B: Array) -> Array:
    """What each half of a bidirectional layer gave after reading everything: the last step and the
    first."""
    forward, backward = jnp.split(y_BTH, 2, axis=-1)
    return jnp.concatenate([last_pool(forward, lengths_B), backward[:, 0]], axis=-1)


def mean_pool(y_BTH: Array, lengths_B: Array) -> Array:
    """The mean over the valid steps; zeros for an empty row."""
    total = jnp.sum(jnp.where(valid_steps(y_BTH, lengths_B), y_BTH, 0), axis=1, dtype=jnp.float32)
    return (total / jnp.maximum(lengths_B, 1)[:, None]).astype(y_BTH.dtype)


def max_pool(y_BTH: Array, lengths_B: Array) -> Array:
    """The maximum over the valid steps; zeros for an empty row."""
    lowest = jnp.finfo(y_BTH.dtype).min
    highest = jnp.max(jnp.where(valid_steps(y_BTH, lengths_B), y_BTH, lowest), axis=1)
    return jnp.where(lengths_B[:, None] > 0, highest, 0)


def uniform_embedding(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    """Uniform in (-0.05, 0.05)."""
    return jax.random.uniform(key, shape, dtype, -0.05, 0.05)


GLOROT = nn.initializers.glorot_uniform()


def dense(
    width: int,
    rows: str | None = None,
    columns: str | None = None,
    initial: Any = GLOROT,
    **settings: Any,
) -> nn.Dense:
    """`nn.Dense` with Glorot's initial weights, or others, whose kernel's axes have these names
    (see `sharding.RULES`)."""
    kernel = named(initial, rows, columns)
    return nn.Dense(
        width, kernel_init=kernel, bias_init=named(nn.initializers.zeros, columns), **settings
    )


class ConcatPool(nn.Module):
    """Last, max and mean side by side (Howard & Ruder 2018)."""

    last: Pool = last_pool

    def __call__(self, y_BTH: Array, lengths_B: Array) -> Array:
        return jnp.concatenate(
            [pool(y_BTH, lengths_B) for pool in (self.last, max_pool, mean_pool)], axis=-1
        )


class AttentionPool(nn.Module):
    """A weighted mean over the valid steps, the weights from a layer of their own (Yang et al.
    2016, section 2.2)."""

    @nn.compact
    def __call__(self, y_BTH: Array, lengths_B: Array) -> Array:
        u_BTH = nn.tanh(dense(y_BTH.shape[-1], dtype=y_BTH.dtype)(y_BTH))
        score_BT1 = dense(1, use_bias=False, dtype=jnp.float32)(u_BTH)
        valid_BT1 = valid_steps(y_BTH, lengths_B)
        share_BT1 = nn.softmax(jnp.where(valid_BT1, score_BT1, -1e30), axis=1) * valid_BT1
        return jnp.sum(share_BT1.astype(y_BTH.dtype) * y_BTH, axis=1)


class Factored(NamedTuple):
    """The scores of all words at all steps before they are multiplied out: features weights' +
    bias, for what needs a few of them (sampled softmax), or those of a step at a time."""

    features_BTE: Array
    weights_VE: Array
    bias_V: Array
    u: Array  # uniform in [0, 1) while training, the randomness of a loss

    def scores(self) -> Array:
        """[B, T, V], or [B, V] of the features [B, E] of a step."""
        weights_VE = self.weights_VE.astype(self.features_BTE.dtype)
        products = jnp.dot(self.features_BTE, weights_VE.T).astype(jnp.float32)
        return products + self.bias_V.reshape((1,) * (products.ndim - 1) + (-1,))


class Parts(NamedTuple):
    """The outputs of parts of a model that learn each by itself, and answer by their mean."""

    recurrent_BO: Array
    ngrams_BO: Array


class SequenceModel(nn.Module):
    """Embed -> recurrent stack -> pooling -> head.

    recurrent: a `Stack` (or any layer of that form).
    outputs: size O of the head.
    embed: turns the inputs into [B, T, D]; None where they have that form.
    embed_dropout: share of the steps whose whole embedding is dropped (word dropout).
    pool: (y_BTH, lengths_B) -> [B, features], a function or a module; None: an output for every
    step.
    dense: width of a ReLU layer before the head; 0: none.
    dropout: share of features dropped before the head.
    tied: the head shares the weights of `embed` (Press & Wolf 2017); only where that is an
    `nn.Embed` of O entries.
    factored: give `Factored` scores; only where the head is tied.
    ngrams: maps the inputs to outputs as well; the mean of both is the answer. Training gets them
    as `Parts`.
    backwards: the recurrent layers read each row from its last valid step to its first.
    dtype: what the dense layers compute in; the outputs are float32 at least.
    """

    recurrent: nn.Module
    outputs: int
    embed: nn.Module | None = None
    embed_dropout: float = 0.0
    pool: Pool | None = last_pool
    dense: int = 0
    dropout: float = 0.0
    tied: bool = False
    factored: bool = False
    ngrams: NGrams | None = None
    backwards: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        lengths_B: Array | None = None,
        state: Any = None,
        context_BK: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Any, Any]:
        """Final state and outputs: [B, O], or [B, T, O] without pooling.

        context_BK: features put beside the pooled ones before the head (known covariates, for
        example).
        state: what an earlier call over the steps before these came to: a stream in pieces gives
        what it gives in one, a row without further steps its last output again. Models that must
        see a whole row at once (bidirectional, pooled over all steps) refuse it.
        """
        if lengths_B is None:
            lengths_B = jnp.full(inputs.shape[0], inputs.shape[1], jnp.int32)
        x_BTD = inputs if self.embed is None else self.embed(inputs)
        move_BTD = self.move(x_BTD, lengths_B)
        x_BTD = nn.Dropout(self.embed_dropout, broadcast_dims=(2,))(
            x_BTD, deterministic=deterministic
        )
        if move_BTD is not None:
            x_BTD = x_BTD + move_BTD
        if self.backwards:
            x_BTD = reverse_rows(x_BTD, lengths_B)
        before = state
        state, y = self.recurrent(x_BTD, lengths_B, before, deterministic=deterministic)
        if self.pool is not None:
            y = self.pooled(y, state, lengths_B)
        if before is not None:
            y = self.streamed(y, state)
        if context_BK is not None:
            y = jnp.concatenate([y, context_BK.astype(y.dtype)], axis=-1)
        if self.dense:
            y = nn.relu(dense(self.dense, dtype=self.dtype, name="dense")(y))
        y = nn.Dropout(self.dropout)(y, deterministic=deterministic)
        if self.tied:
            assert isinstance(self.embed, nn.Embed)
            if y.shape[-1] != self.embed.features:
                y = dense(self.embed.features, "hidden", dtype=self.dtype, name="to_embedding")(y)
            zeros = named(nn.initializers.zeros, "vocabulary")
            bias = self.param("head_bias", zeros, (self.outputs,), jnp.float32)
            if self.factored:
                u = jnp.zeros(()) if deterministic else jax.random.uniform(self.make_rng("dropout"))
                return state, Factored(y, self.embed.embedding, bias, u)
            scores = self.embed.attend(y).astype(jnp.float32)
            return state, scores + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        outputs = "vocabulary" if self.pool is None else None
        y = dense(self.outputs, "hidden", outputs, dtype=self.dtype, name="head")(y)
        y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        if self.ngrams is None:
            return state, y
        parts = Parts(y, self.ngrams(inputs, lengths_B, deterministic=deterministic))
        return state, sum(parts) / len(parts) if deterministic else parts

    def move(self, x_BTD: Array, lengths_B: Array) -> Array | None:
        """What the variable `inputs` of the collection `moves`, [B, T, D], adds to the inputs of
        the recurrent layers: it counts in standard deviations of each feature over the valid steps
        of the batch. None without such a variable; asked for as mutable, it is made, of zeros."""
        if not self.is_initializing() and self.is_mutable_collection("moves"):
            self.put_variable("moves", "inputs", jnp.zeros_like(x_BTD))
        if not self.has_variable("moves", "inputs"):
            return None
        valid_BT1 = valid_steps(x_BTD, lengths_B)
        dtype, x_BTD = x_BTD.dtype, jax.lax.stop_gradient(x_BTD.astype(jnp.float32))
        count = jnp.maximum(jnp.sum(valid_BT1), 1)
        mean_D = jnp.sum(x_BTD * valid_BT1, axis=(0, 1)) / count
        from_mean_BTD = (x_BTD - mean_D[None, None]) * valid_BT1
        deviation_D = jnp.sqrt(jnp.sum(from_mean_BTD**2, axis=(0, 1)) / count)
        return deviation_D[None, None].astype(dtype) * self.get_variable("moves", "inputs")

    def pooled(self, y_BTH: Array, state: Any, lengths_B: Array) -> Array:
        """What the outputs of all steps become. The last of them are in the state, where gradients
        cost no array over time."""
        assert self.pool is not None
        reads = self.recurrent
        ends = (self.pool is last_pool and streams(reads)) or (
            self.pool is ends_pool and both_ways(reads)
        )
        end = last_output(reads, state) if ends else None
        return self.pool(y_BTH, lengths_B) if end is None else end.astype(y_BTH.dtype)

    def streamed(self, y: Array, state: Any) -> Array:
        """The pooled outputs of a call that goes on from another."""
        streamed = streams(self.recurrent) and self.pool in (None, last_pool)
        if not streamed or self.ngrams or self.backwards:
            raise ArgumentError(
                "state: this model sees a whole row at once (it is bidirectional, reads backwards, "
                "pools over all steps or counts n-grams) and cannot go on from a carried state; "
                "None begins anew"
            )
        if self.pool is None:
            return y
        if last_output(self.recurrent, state) is None:
            raise ArgumentError(
                "state: the last output of a row without steps is not in the state of this model "
                "(its uppermost layer is residual, or of others); None begins anew"
            )
        return y


def streams(layer: Any) -> bool:
    """Whether a layer over pieces of rows, each from the state after the one before, gives what it
    gives over whole rows."""
    if isinstance(layer, Stack):
        return all(map(streams, layer.layers))
    return not isinstance(layer, Bidirectional)


def both_ways(layer: Any) -> bool:
    """Whether the uppermost layer reads in both directions."""
    return isinstance(layer.layers[-1] if isinstance(layer, Stack) else layer, Bidirectional)


def last_output(layer: Any, state: Any) -> Array | None:
    """The last output of each row, of each direction in its own order, where it is in the state of
    a layer."""
    if isinstance(layer, Stack):
        return None if layer.residual else last_output(layer.layers[-1], state[-1])
    if isinstance(layer, Bidirectional):
        first, second = map(last_output, layer.directions(), state)
        return None if first is None or second is None else jnp.concatenate([first, second], -1)
    return layer.cell.output(state) if hasattr(getattr(layer, "cell", None), "output") else None


class Forecaster(nn.Module):
    """Forecasts all N steps at once from the state after the look-back.

    `inputs` [B, T, D] hold the C target channels first. With `subtract_last` the model sees them
    relative to their last value and forecasts the difference from it, so that a drifting level
    costs nothing. What else is known (see `flax_lstm.data.base.Known`) is put beside the inputs and
    before the head. Outputs [B, N, C, Q].
    """

    model: nn.Module  # maps to [B, N * C * Q]
    form: SeriesForm
    subtract_last: bool = True

    def __call__(
        self,
        x_BTD: Array,
        lengths_B: Array | None = None,
        state: Any = None,
        known: Any = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Any, Array]:
        x_BTD, channels = jnp.asarray(x_BTD), self.form.channels
        batch, steps, _ = x_BTD.shape
        last_BC = (
            x_BTD[:, -1, :channels]
            if self.subtract_last
            else jnp.zeros((batch, channels), x_BTD.dtype)
        )
        x_BTD = x_BTD.at[:, :, :channels].add(-last_BC[:, None])
        context: list[Array] = []
        if known is not None:
            if known.future is not None:
                x_BTD = jnp.concatenate([x_BTD, known.future[:, :steps]], axis=-1)
                context.append(known.future[:, steps:].reshape(batch, -1))
            if known.observed is not None:
                x_BTD = jnp.concatenate([x_BTD, known.observed], axis=-1)
            if known.static is not None:
                context.append(known.static)
            context += [
                jax.nn.one_hot(known.codes[:, n], size)
                for n, size in enumerate(self.form.categories)
            ]
        context_BK = jnp.concatenate(context, axis=-1) if context else None
        state, y = self.model(x_BTD, lengths_B, state, context_BK, deterministic=deterministic)
        y_BNCQ = y.reshape(batch, self.form.horizon, channels, -1)
        zero_B1C = jnp.zeros_like(last_BC[:, None])
        return state, placed(y_BNCQ, last_BC[:, None], zero_B1C, zero_B1C + 1, self.form)


LAYERS, WIDEST = 100, 2**20  # of any model: what is larger is a slip of the finger


@dataclass(frozen=True)
class RecurrentLayers:
    """The settings that every model of recurrent layers has: layers of one cell, and a head."""

    cell: CellName = "lstm"  # the recurrence
    # Units of a layer; several numbers give layers of those widths
    hidden_size: int | tuple[int, ...] = 128
    num_layers: int = 1  # layers of the same width
    bidirectional: bool = False  # read in both directions
    residual: bool = False  # add a layer's input to its output where the widths agree
    dropout: float = 0.0  # on the input of every layer, one mask a sequence
    recurrent_dropout: float = 0.0  # on the recurrent input of every layer, one mask a sequence
    weight_dropout: float = 0.0  # on the recurrent weights (DropConnect)
    # dropout and recurrent-dropout draw a mask for each gate, as Keras
    masks_per_gate: bool = False
    dense: int = 0  # width of a ReLU layer before the head; 0: none
    head_dropout: float = 0.0  # dropout before the head
    dtype: DTypeName = "float32"  # what is computed in; weights and state stay float32
    backend: BackendName = "auto"  # how the recurrence is run

    def __post_init__(self) -> None:
        within("model.num-layers", self.num_layers, 1, LAYERS)
        for size in self.sizes:
            within("model.hidden-size", size, 1, WIDEST)
        within("model.dense", self.dense, 0, WIDEST)
        for name in ("dropout", "recurrent_dropout", "weight_dropout", "head_dropout"):
            check_rate(name, getattr(self, name))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The width of each layer."""
        if isinstance(self.hidden_size, int):
            return (self.hidden_size,) * max(self.num_layers, 1)
        require(
            0 < len(self.hidden_size) <= LAYERS,
            f"model.hidden-size: name from one to {LAYERS} sizes",
        )
        require(
            self.num_layers in (1, len(self.hidden_size)),
            f"model.num-layers {self.num_layers} does not agree with the {len(self.hidden_size)} "
            "sizes of model.hidden-size; leave one of them out",
        )
        return self.hidden_size

    def stack(self) -> Stack:
        """The recurrent layers."""
        cell, dtype = BY_NAME[self.cell], DTYPES[self.dtype]

        def rnn(size: int) -> RNN:
            return RNN(
                cell(size, dtype=dtype),
                dropout=self.dropout,
                recurrent_dropout=self.recurrent_dropout,
                weight_dropout=self.weight_dropout,
                masks_per_gate=self.masks_per_gate,
                backend=self.backend,
            )

        return Stack(
            [
                Bidirectional(rnn(size), rnn(size)) if self.bidirectional else rnn(size)
                for size in self.sizes
            ],
            residual=self.residual,
        )

    def module(self, outputs: int, **parts: Any) -> SequenceModel:
        """The layers with a head of `outputs`; `parts` are further fields of `SequenceModel`."""
        return SequenceModel(
            self.stack(),
            outputs,
            dense=self.dense,
            dropout=self.head_dropout,
            dtype=DTYPES[self.dtype],
            **parts,
        )


@dataclass(frozen=True)
class RecurrentModel(RecurrentLayers):
    """Recurrent layers over sequences of numbers, for classification and regression."""

    pooling: PoolingName = "last"  # how the outputs of the steps become one

    reads: ClassVar[type] = Features

    def pool(self) -> Pool:
        """How the outputs of the steps become one."""
        last = ends_pool if self.bidirectional else last_pool
        pools: dict[PoolingName, Callable[[], Pool]] = {
            "last": lambda: last,
            "max": lambda: max_pool,
            "mean": lambda: mean_pool,
            "concat": lambda: ConcatPool(last),
            "attention": AttentionPool,
        }
        return pools[self.pooling]()

    def sequence(
        self, outputs: int, vocabulary_size: int = 0, per_step: bool = False
    ) -> SequenceModel:
        """A module with `outputs` outputs a sequence, or a step."""
        require(
            not per_step or self.pooling == "last",
            f"model.pooling {self.pooling}: every step has a target of its own; nothing is pooled",
        )
        return self.module(outputs, pool=None if per_step else self.pool())


@dataclass(frozen=True)
class TextModel(RecurrentModel):
    """Recurrent layers over the embeddings of tokens, for classification and regression."""

    embed_size: int = 128  # features of a token's embedding
    embed_dropout: float = 0.0  # share of the tokens dropped whole
    # A linear classifier of which n-grams a text has, up to so many tokens, joins the recurrence
    # (NB-SVM, Wang & Manning 2012); 0: none
    ngrams: int = 0
    # read from the end to the beginning: another view, to be averaged with the first
    backwards: bool = False

    reads: ClassVar[type] = Tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        check_embedding(self.embed_size, self.embed_dropout)
        within("model.ngrams", self.ngrams, 0, 10)
        require(
            not (self.backwards and self.bidirectional),
            "model.backwards: a bidirectional model reads backwards as well; leave one",
        )

    def sequence(
        self, outputs: int, vocabulary_size: int = 0, per_step: bool = False
    ) -> SequenceModel:
        """A module with `outputs` outputs a sequence of tokens, or a token."""
        require(
            not (self.ngrams and per_step),
            "model.ngrams are of whole texts, and these data have an answer for each token: give 0",
        )
        require(
            not (self.backwards and per_step),
            "model.backwards: these data have an answer for each token, which is read forwards",
        )
        return self.module(
            outputs,
            embed=embedding(vocabulary_size, self.embed_size, self.dtype),
            embed_dropout=self.embed_dropout,
            pool=None if per_step else self.pool(),
            ngrams=NGrams(outputs, self.ngrams) if self.ngrams else None,
            backwards=self.backwards,
        )


@dataclass(frozen=True)
class LanguageModel(RecurrentLayers):
    """Recurrent layers over the embeddings of tokens, with an output for the token after each."""

    embed_size: int = 128  # features of a token's embedding
    embed_dropout: float = 0.0  # share of the tokens dropped whole
    tied: bool = False  # the head shares the embedding's weights

    reads: ClassVar[type] = Tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        check_embedding(self.embed_size, self.embed_dropout)
        require(not self.bidirectional, "model.bidirectional: a language model reads forwards only")

    def language_model(self, vocabulary_size: int, factored: bool = False) -> SequenceModel:
        """A module whose outputs at every step are logits of the next token, or `Factored`
        ones."""
        require(
            self.tied or not factored,
            "task.candidates needs a head that shares the embedding's weights: --model.tied True",
        )
        return self.module(
            vocabulary_size,
            embed=embedding(vocabulary_size, self.embed_size, self.dtype),
            embed_dropout=self.embed_dropout,
            pool=None,
            tied=self.tied,
            factored=factored,
        )


@dataclass(frozen=True)
class RecurrentForecaster(RecurrentModel):
    """Recurrent layers that read the look-back step by step; the whole horizon from their state."""

    subtract_last: bool = True  # forecast the difference from the last value

    reads: ClassVar[type] = Windows

    def forecaster(self, form: SeriesForm) -> Forecaster:
        """A module that forecasts series of this form."""
        module = self.sequence(form.horizon * form.channels * form.outputs)
        return Forecaster(module, form, self.subtract_last)


def embedding(vocabulary_size: int, width: int, dtype: DTypeName) -> nn.Embed:
    """A table of `vocabulary_size` embeddings, whose axes have names (see `sharding.RULES`)."""
    words = named(uniform_embedding, "vocabulary", "features")
    return Embed(vocabulary_size, width, dtype=DTYPES[dtype], embedding_init=words)


class Embed(nn.Embed):
    """`nn.Embed` that rounds what was looked up in place of the whole table: gradients add up in
    the dtype of the table, as those of all other weights do. Inputs [..., D] of floats were looked
    up before (see `training/tables.py`)."""

    def __call__(self, inputs: Array) -> Array:
        if jnp.issubdtype(inputs.dtype, jnp.floating) and inputs.shape[-1:] == (self.features,):
            return inputs.astype(self.dtype)
        if self.dtype == self.param_dtype:
            return super().__call__(inputs)
        return jnp.take(self.embedding, inputs, axis=0).astype(self.dtype)


def check_embedding(size: int, dropout: float) -> None:
    within("model.embed-size", size, 1, WIDEST)
    check_rate("embed_dropout", dropout)


def check_rate(name: str, rate: float) -> None:
    """Raises UserError for a share to drop that is none."""
    flag = f"model.{name.replace('_', '-')}"
    require(0 <= rate < 1, f"{flag} {rate}: must be at least 0 and below 1")
