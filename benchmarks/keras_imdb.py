# SPDX-License-Identifier: Apache-2.0
"""The tutorial's sentiment model in Keras, on the very token ids and splits that
`configs/imdb_lstm.py` trains on.

    pip install keras && KERAS_BACKEND=jax python benchmarks/keras_imdb.py --seeds 0 1 2

Embedding 128, LSTM 128 (dropout .2, recurrent dropout .2), dense 64, dropout .5, Adam 1e-3, batch
32, at most 10 epochs (three without a better validation accuracy end it), the last 200 tokens of a
review, padded on the left as Keras does. The weights of the best epoch on the validation split are
tested once. One JSON line a seed.

Keras draws a dropout mask of its own for each gate; flax_lstm has one for all gates of a sequence
(the tied masks of Gal & Ghahramani 2016). `--tied` gives Keras' cell such masks, so that the two
train the same model.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
import keras
import numpy as np

from flax_lstm.data.imdb import Imdb


def arrays(dataset, split: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a split as (ids [N, length] padded on the left, labels [N])."""
    inputs, labels = [], []
    for batch in dataset.evaluation(split, 500):
        for ids, size, label, weight in zip(
            batch.inputs, batch.lengths, batch.targets, batch.weights, strict=True
        ):
            if weight:
                inputs.append(np.pad(ids[:size], (length - size, 0)))
                labels.append(label)
    return np.stack(inputs), np.asarray(labels, np.float32)


class TiedCell(keras.layers.LSTMCell):
    """One dropout mask for all gates."""

    def _create_dropout_mask(self, step_input, dropout_rate):
        ones = keras.ops.ones_like(step_input)
        return [keras.random.dropout(ones, dropout_rate, seed=self.seed_generator)] * 4


def build(vocabulary_size: int, length: int, tied: bool) -> keras.Model:
    layers, rates = keras.layers, {"dropout": 0.2, "recurrent_dropout": 0.2}
    model = keras.Sequential(
        [
            keras.Input((length,), dtype="int32"),
            layers.Embedding(vocabulary_size, 128),
            layers.RNN(TiedCell(128, **rates)) if tied else layers.LSTM(128, **rates),
            layers.Dense(64, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile(
        loss="binary_crossentropy", optimizer=keras.optimizers.Adam(1e-3), metrics=["accuracy"]
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--tied", action="store_true")
    options = parser.parse_args()
    data = Imdb(max_length=200, vocabulary_size=20_000)
    with tempfile.TemporaryDirectory() as folder:
        dataset = data.load(Path(folder))
        splits = {
            split: arrays(dataset, split, data.max_length)
            for split in ("train", "validation", "test")
        }
        for seed in options.seeds:
            keras.utils.set_random_seed(seed)
            model, best = (
                build(dataset.info.vocabulary.size, data.max_length, options.tied),
                Path(folder) / "best.weights.h5",
            )
            keep = keras.callbacks.ModelCheckpoint(
                str(best),
                monitor="val_accuracy",
                mode="max",
                save_best_only=True,
                save_weights_only=True,
            )
            stop = keras.callbacks.EarlyStopping(monitor="val_accuracy", mode="max", patience=3)
            began = time.perf_counter()
            history = model.fit(
                *splits["train"],
                batch_size=32,
                epochs=options.epochs,
                validation_data=splits["validation"],
                callbacks=[keep, stop],
                verbose=2,
            ).history
            seconds = time.perf_counter() - began
            model.load_weights(str(best))
            loss, accuracy = model.evaluate(*splits["test"], batch_size=256, verbose=0)
            row = {
                "seed": seed,
                "tied": options.tied,
                "validation": [round(a, 4) for a in history["val_accuracy"]],
                "test_accuracy": round(accuracy, 4),
                "test_loss": round(loss, 4),
                "seconds": round(seconds),
                "keras": keras.__version__,
                "backend": keras.backend.backend(),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
