# SPDX-License-Identifier: Apache-2.0
"""Keras on TensorFlow or JAX: its layers and its Adam in the training loops of its guides ("Writing
a training loop from scratch"), which have less overhead a step than `fit`."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from workloads import Work


def build(work: Work) -> Any:
    import keras

    w, weights, layers = work.workload, work.weights, keras.layers
    time = None if w.ragged else w.time
    kind = {"lstm": layers.LSTM, "gru": layers.GRU}[w.cell]
    stack = [
        kind(hidden, return_sequences=n + 1 < len(w.hidden)) for n, hidden in enumerate(w.hidden)
    ]
    stack = [layers.Bidirectional(layer) for layer in stack] if w.bidirectional else stack
    head = layers.Dense(w.outputs)
    if w.vocabulary:
        embed = layers.Embedding(w.vocabulary, w.features, mask_zero=w.ragged)
        model = keras.Sequential([keras.Input((time,), dtype="int32"), embed, *stack, head])
        embed.set_weights([weights.embedding])
    else:
        model = keras.Sequential([keras.Input((time, w.features)), *stack, head])
    for layer, arrays in zip([*stack, head], [*weights.keras, list(weights.head)], strict=True):
        layer.set_weights(arrays)
    return model


def make(work: Work, backend: str) -> Callable[[int], Any]:
    os.environ["KERAS_BACKEND"] = backend
    import keras

    work.workload.textbook_only()
    model, optimizer = build(work), keras.optimizers.Adam(1e-3, epsilon=1e-8)
    optimizer.build(model.trainable_variables)

    def loss(outputs: Any, targets: Any) -> Any:
        if work.workload.vocabulary:
            values = keras.ops.sparse_categorical_crossentropy(targets, outputs, from_logits=True)
        else:
            values = keras.ops.square(outputs - targets)
        return keras.ops.mean(values)

    placed = [
        (keras.ops.convert_to_tensor(b.inputs), keras.ops.convert_to_tensor(b.targets))
        for b in work.batches
    ]
    run = {"tensorflow": with_tensorflow, "jax": with_jax}[backend]
    forward, train = run(model, optimizer, loss)
    if not work.workload.train:
        return lambda n: np.asarray(forward(placed[n][0]))
    return lambda n: float(train(*placed[n]))


def with_tensorflow(model: Any, optimizer: Any, loss: Any) -> tuple[Any, Any]:
    import tensorflow as tf

    @tf.function(reduce_retracing=True)
    def train(inputs: Any, targets: Any) -> Any:
        with tf.GradientTape() as tape:
            value = loss(model(inputs, training=True), targets)
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
        return value

    return tf.function(model, reduce_retracing=True), train


def with_jax(model: Any, optimizer: Any, loss: Any) -> tuple[Any, Any]:
    import jax

    weights, rest = (
        [v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables)
    )
    moments = [v.value for v in optimizer.variables]

    def forward(weights: Any, inputs: Any) -> Any:
        return model.stateless_call(weights, rest, inputs)[0]

    def update(weights: Any, moments: Any, inputs: Any, targets: Any) -> Any:
        value, grads = jax.value_and_grad(lambda weights: loss(forward(weights, inputs), targets))(
            weights
        )
        return value, *optimizer.stateless_apply(moments, grads, weights)

    forward_jit, update_jit = jax.jit(forward), jax.jit(update, donate_argnums=(0, 1))

    def train(inputs: Any, targets: Any) -> Any:
        nonlocal weights, moments
        value, weights, moments = jax.block_until_ready(
            update_jit(weights, moments, inputs, targets)
        )
        return value

    return lambda inputs: forward_jit(weights, inputs), train
