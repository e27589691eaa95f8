# SPDX-License-Identifier: Apache-2.0
"""What is done with a model that was trained: figures of a split, predictions for new inputs."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd

from flax_lstm.config import Config
from flax_lstm.data.base import Batch, Dataset
from flax_lstm.data.corpus import VocabularyInfo
from flax_lstm.data.fingerprint import content_sha256
from flax_lstm.data.language import LanguageInfo
from flax_lstm.data.text import TextDataset, TextInfo
from flax_lstm.errors import UserError, listing, require
from flax_lstm.machine.files import found_at
from flax_lstm.nn.models import DTYPES, DTypeName, TextModel
from flax_lstm.nn.words import LARGEST, cells_for_tables, with_tables
from flax_lstm.runs.saved_config import read_config
from flax_lstm.runs.workdir import Workdir
from flax_lstm.tasks.base import Examiner, Forecaster, Outputs
from flax_lstm.tasks.examination import log_softmax
from flax_lstm.tasks.explanation import Explanation, integrated_gradients, leave_one_out
from flax_lstm.tasks.generation import continue_text
from flax_lstm.training.assembly import assemble
from flax_lstm.training.checkpoint import Checkpoints
from flax_lstm.training.evaluation import add_up, evaluate
from flax_lstm.training.steps import apply

logger = logging.getLogger(__name__)

METHODS = ("leave-one-out", "gradients")
SPLITS = ("train", "validation", "test")
ReadName = DTypeName | Literal["int8"]  # what is computed in


class Run:
    """A trained model: what `load` returns."""

    def __init__(self, workdir: Path, config: Config, eight_bits: bool = False):
        self.workdir, self.eight_bits = workdir, eight_bits
        self._folder = Workdir(workdir)
        self.assets = self._folder.assets
        self._folder.check_assets()
        self.config = config = replace(config, task=config.task.settled(self._folder.path))
        self.info = config.data.restore(self._folder.assets)
        self._parts = assemble(config, self.info)
        self._checkpoints = Checkpoints(self._folder.checkpoints)
        alone = self._parts.mesh.size == 1
        require(
            not eight_bits or (alone and bool(cells_for_tables(self._module()))),
            f"dtype int8: {workdir} cannot be read with weights of 8 bits. It is for models that "
            "answer for whole texts, by an LSTM, GRU or simple RNN with the backend cpu, on one "
            f"device, whose tables take at most {LARGEST >> 20} MiB",
        )
        self._ready: tuple[Any, Callable[[Batch], np.ndarray]] | None = None  # of `forward`

    def step(self, checkpoint: str | int = "best") -> int:
        """The step of a checkpoint named "best", "latest", or by its step."""
        latest = self._checkpoints.latest()
        if latest is None:
            raise UserError(f"{self.workdir}: no checkpoint yet; train it first")
        if checkpoint == "latest":
            return latest
        if checkpoint == "best":
            return self._checkpoints.best() or latest
        kept = self._checkpoints.steps()
        require(
            str(checkpoint).isdecimal() and int(checkpoint) in kept,
            f"--checkpoint {checkpoint}: choose best, latest or one of {listing(kept)}",
        )
        return int(checkpoint)

    def params(self, checkpoint: str | int = "best") -> Any:
        """The weights that are evaluated: the averaged ones where the run has them."""
        return self._checkpoints.restore_params(self.step(checkpoint), self._parts.steps.abstract)

    def __repr__(self) -> str:
        config, kept = self.config, self._checkpoints.steps()
        sections = (config.data, config.task, config.model)
        parts = ", ".join(type(section).__name__ for section in sections)
        return f"Run({str(self.workdir)!r}: {config.name}, {parts}; checkpoints {listing(kept)})"

    def dataset(self, data: Any = None, file: str | Path | None = None) -> Dataset:
        """The data of the run, or those of a new labelled file, as the split "input"; see
        `evaluate`."""
        settings = self.config.data if data is None else self.config.data.holding(data)
        if file is not None:
            return settings.labelled(Path(file), self.assets)
        self._warn_of_other_data()
        return settings.load(self.assets)

    def evaluate(
        self,
        split: str = "test",
        checkpoint: str | int = "best",
        data: Any = None,
        file: str | Path | None = None,
    ) -> dict[str, Any]:
        """The figures of a split, with `split`, `step` and `examples`.

        data: what `fit` was given as `data`, if it was; other data are refused.
        file: a file of new labelled data, judged instead of a split.
        """
        split, dataset = self._split(split, file), self.dataset(data, file)
        step, size = self.step(checkpoint), dataset.size(split)
        figures = self._figures(dataset, split, step)
        return {**figures, "split": split, "step": step, "examples": size}

    def _figures(self, dataset: Dataset, split: str, step: Any) -> dict[str, float]:
        """The task's figures of a split, by the checkpoint of a step."""
        if self.eight_bits:
            return self._measured(dataset, split, self.forward(step))
        task, parts, params = self.config.task, self._parts, self.params(step)
        batches = dataset.evaluation(split, self.config.train.batch_size)
        return evaluate(parts.steps, params, task, dataset.info, batches, parts.mesh)

    def data_sha256(self) -> str | None:
        """The fingerprint of the data of the training; None where they were no files."""
        return self._folder.data_sha256()

    def _warn_of_other_data(self) -> None:
        before, found = self.data_sha256(), None
        with suppress(OSError):  # what cannot be read is named when the data are
            found = content_sha256(self.config.data.files(), self.config.data.below)
        if before and found and before != found:
            logger.warning(
                "warning: the data are not those that %s was trained on (SHA-256 of their content "
                "%s... then, %s... now)",
                self.workdir,
                before[:16],
                found[:16],
            )

    def _split(self, split: str, file: str | Path | None) -> str:
        """The name of the split that is judged."""
        require(split in SPLITS, f"--split {split}: choose one of {listing(SPLITS)}")
        return split if file is None else "input"

    def examine(
        self,
        split: str = "test",
        checkpoint: str | int = "best",
        data: Any = None,
        file: str | Path | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `evaluate` says, and for a classifier of texts what `flax_lstm.tasks.examination`
        does beyond, in one pass over the rows; else an empty dictionary."""
        task = self.config.task
        dataset = self.dataset(data, file)
        if not (isinstance(task, Examiner) and isinstance(dataset, TextDataset)):
            return self.evaluate(split, checkpoint, data, file), {}
        split = self._split(split, file)
        forward, rows = self.forward(checkpoint), []

        def kept(batch: Batch) -> np.ndarray:
            rows.append(forward(batch))
            return rows[-1]

        figures = self._measured(dataset, split, kept)
        size = dataset.size(split)
        places = {"split": split, "step": self.step(checkpoint), "examples": size}
        outputs = np.concatenate(rows)[:size]
        held_out = None if split == "validation" else self._held_out(forward, data)
        return {**figures, **places}, task.examine(dataset, split, outputs, held_out)

    def _measured(
        self, dataset: Dataset, split: str, forward: Callable[[Batch], np.ndarray]
    ) -> dict[str, float]:
        """The task's figures of what `forward` gives for a split."""
        task, info = self.config.task, dataset.info
        measure = jax.jit(lambda outputs, batch: task.measure(outputs, batch, info))
        batches = dataset.evaluation(split, self.config.train.batch_size)
        return task.figures(add_up(measure(forward(b), b) for b in batches), info)

    def _held_out(self, forward: Callable[[Batch], np.ndarray], data: Any) -> Outputs | None:
        """Of the validation split, where it is to be had."""
        try:
            dataset = self.dataset(data)
        except UserError as error:
            logger.warning("no calibration without the validation split: %s", error)
            return None
        size = dataset.size("validation")
        batches = [*dataset.evaluation("validation", self.config.train.batch_size)]
        outputs = np.concatenate([forward(batch) for batch in batches])
        return Outputs(outputs[:size], np.concatenate([b.targets for b in batches])[:size])

    def forward(self, checkpoint: str | int = "best") -> Callable[[Batch], np.ndarray]:
        """A function from a batch to the module's outputs. Words are read by `with_tables` where
        that is possible: what `evaluate` says is the same but for rounding. Asked again, with
        no other checkpoint there by now, the run gives the same function: nothing is read, restored
        or compiled anew."""
        asked = (checkpoint, self._checkpoints.steps())
        if self._ready is None or self._ready[0] != asked:
            self._ready = asked, self._made(self.step(checkpoint))
        return self._ready[1]

    def _module(self) -> Any:
        return self.config.task.build(self.config.model, self.info)

    def _made(self, step: int) -> Callable[[Batch], np.ndarray]:
        params, steps = self.params(step), self._parts.steps
        alone = self._parts.mesh.size == 1
        reader = with_tables(self._module(), params, self.eight_bits) if alone else None
        run: Callable[..., Any] = steps.forward
        if reader is not None:
            run, params = jax.jit(partial(apply, reader[0])), reader[1]

        def forward(batch: Batch) -> np.ndarray:
            outputs = jax.device_get(run(params, None, jax.tree.map(np.asarray, batch))[1])
            require(
                all(bool(np.isfinite(x).all()) for x in jax.tree.leaves(outputs)),
                f"{self.workdir}: what the model answers to this input is not finite: the input "
                "is too far from what it was trained on, or the training had diverged",
            )
            return outputs

        return forward

    def generate(
        self,
        prompt: str,
        tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        checkpoint: str | int = "best",
    ) -> str:
        """What a language model has follow a beginning, or precede an end where it reads
        backwards; for the settings see `flax_lstm.tasks.generation`. Words are separated by spaces,
        as the vocabulary reads them."""
        steps, info = self._parts.steps, self.info
        if not isinstance(info, LanguageInfo):
            raise UserError(f"--prompt: {self.workdir} is no language model")
        params = self.params(checkpoint)
        carry = jax.tree.map(lambda s: np.zeros((1, *s.shape[1:]), s.dtype), steps.abstract.carry)

        def advance(ids: Sequence[int]) -> np.ndarray:
            nonlocal carry
            inputs = np.asarray([ids], np.int32)
            weights, lengths = np.ones_like(inputs, np.float32), np.array([len(ids)], np.int32)
            batch = Batch(inputs, inputs, lengths, weights, reset=np.zeros(1, bool))
            carry, logits_BTV = steps.forward(params, carry, batch)
            return np.asarray(logits_BTV[0, -1])

        begun = info.order(info.vocabulary.encode([prompt])[0].tolist())
        rest = continue_text(advance, begun, tokens, temperature, top_p, seed)
        return info.vocabulary.decode(info.order([*begun, *rest]))

    def explain(
        self,
        text: str,
        label: str | None = None,
        method: str = "leave-one-out",
        checkpoint: str | int = "best",
    ) -> Explanation:
        """Which words of a text the answer of a classifier rests on.

        label: the class that is explained; None: the answer. method: "leave-one-out" or
        "gradients" (integrated), see `flax_lstm.tasks.explanation`.
        """
        info, task = self.info, self.config.task
        require(
            isinstance(info, TextInfo),
            f"{self.workdir} is no classifier of texts with one label each",
        )
        assert isinstance(info, TextInfo)
        require(method in METHODS, f"--method {method}: choose one of {listing(METHODS)}")
        known = label is None or label in info.labels
        require(known, f"--label {label}: choose one of {listing(info.labels)}")
        ids_T = info.encode([text])[0]
        require(len(ids_T) > 0, "--text has no words")
        forward = self.forward(checkpoint)

        def logits_of(rows: Sequence[np.ndarray]) -> np.ndarray:
            batches = info.padded(rows, 64)
            return np.concatenate([forward(batch) for batch in batches])[: len(rows)]

        log_K = log_softmax(logits_of([ids_T]))[0]
        k = int(log_K.argmax()) if label is None else info.labels.index(label)
        if method == "leave-one-out":
            contributions_T = leave_one_out(logits_of, ids_T, k)
        else:
            module = task.build(self.config.model, info)
            model = self.config.model
            require(
                not (isinstance(model, TextModel) and model.ngrams),
                "--method gradients follows the embeddings alone, and this model has n-grams "
                "beside them: --method leave-one-out",
            )
            contributions_T = integrated_gradients(module, self.params(checkpoint), ids_T, k)
        words = info.written(text)
        share = float(np.exp(log_K[k]))
        return Explanation(info.labels[k], share, words, contributions_T.tolist())

    def predict(
        self,
        inputs: Any,
        checkpoint: str | int = "best",
        cutoffs: Sequence[str] = (),
        paths: bool = False,
    ) -> pd.DataFrame:
        """Predictions for new inputs; see the task's `predict`.

        inputs: a DataFrame with the columns of the training data; for texts also one text, or a
            list or Series of them; for sequences of numbers also a list of arrays.
        cutoffs, paths: of forecasts, see `flax_lstm.tasks.base.Forecaster`.
        """
        table, task = self.config.data.table(inputs), self.config.task
        settings = (table, self.info, self.forward(checkpoint))
        batch_size = min(self.config.train.batch_size, 256)
        if isinstance(task, Forecaster):
            return task.forecast(*settings, batch_size, cutoffs, paths)
        require(
            not cutoffs and not paths,
            f"{self.workdir}: cutoffs and paths are for runs that forecast",
        )
        return task.predict(*settings, batch_size)


class Ensemble(Run):
    """Several runs on the same data as one model: the mean of what they say.

    Classes by their mean probability, numbers and quantiles by their mean, each run calibrated as
    it was at its end. `step` is a list, of one step a run. Raises UserError for runs on different
    data, for different tasks, and for language models.
    """

    def __init__(self, workdir: Path, members: Sequence[Run]):
        first = members[0]
        vars(self).update(vars(first))
        self.workdir, self.members = workdir, tuple(members)
        plain = [read_config(Workdir(run.workdir).config) for run in members]
        self.config = replace(first.config, task=plain[0].task)
        for run, config in zip(members, plain, strict=True):
            same_data = run.data_sha256() == first.data_sha256()
            differ = {
                "data": config.data != plain[0].data or not same_data,
                "task": config.task != plain[0].task,
            }
            pair = f"{first.workdir} and {run.workdir}"
            require(
                not any(differ.values()),
                f"{pair} differ in their {' and '.join(name for name in differ if differ[name])}: "
                "only runs on the same data and for the same task are averaged",
            )
            theirs, ours = first.info, run.info
            require(
                not (isinstance(theirs, VocabularyInfo) and isinstance(ours, VocabularyInfo))
                or theirs.vocabulary == ours.vocabulary,
                f"{pair} differ in their assets (a vocabulary by --init-from, say): only "
                "runs that read their data alike are averaged",
            )
        require(
            not isinstance(self.info, LanguageInfo),
            f"{first.workdir} is a language model: these are not averaged; name one folder",
        )

    def step(self, checkpoint: Any = "best") -> Any:
        if isinstance(checkpoint, list):
            return checkpoint
        return [run.step(checkpoint) for run in self.members]

    def params(self, checkpoint: str | int = "best") -> Any:
        raise UserError(f"{self.workdir}: several runs have no weights in common; load one of them")

    def __repr__(self) -> str:
        return f"Ensemble({', '.join(map(repr, self.members))})"

    def _figures(self, dataset: Dataset, split: str, step: Any) -> dict[str, float]:
        return self._measured(dataset, split, self.forward(step))

    def forward(self, checkpoint: Any = "best") -> Callable[[Batch], np.ndarray]:
        steps = zip(self.members, self.step(checkpoint), strict=True)
        forwards = [(run.config.task, run.forward(step)) for run, step in steps]
        pooled = self.config.task.pooled
        return lambda batch: pooled([task.final(f(batch), batch) for task, f in forwards])


def load(workdir: str | Path, *others: str | Path, dtype: ReadName | None = None) -> Run:
    """The trained model in a work directory, ready to `evaluate` and `predict`. Its config is read
    as data, not run.

    dtype: what is computed in, where that shall be another than in training: "bfloat16" is faster
    on processors and accelerators that have it, and a little less exact; "int8" rounds the
    recurrent weights of a model of words to 8 bits, for CPUs (see docs/backends.md).
    Of several folders, or of a folder that `--seeds` filled, the runs are averaged: an `Ensemble`.
    """
    folders = [seed for folder in (workdir, *others) for seed in seeds_of(Path(folder))]
    runs = [_load(folder, dtype) for folder in folders]
    return Ensemble(Path(workdir), runs) if len(runs) > 1 else runs[0]


def seeds_of(folder: Path) -> list[Path]:
    """The runs in a folder that `--seeds` filled, by seed; else the folder itself."""
    found = {
        int(number): path
        for path in folder.glob("seed-*")
        if (number := path.name.removeprefix("seed-")).isdecimal() and Workdir(path).config.exists()
    }
    if Workdir(folder).config.exists() or not found:
        return [folder]
    return [found[number] for number in sorted(found)]


def _load(workdir: Path, dtype: ReadName | None) -> Run:
    path = Workdir(workdir).config
    require(
        found_at(path) is not None,
        f"{workdir}: no run here ({path.name} is missing); name the folder that train.py wrote",
    )
    # The backend of the training may not be there where the model is used.
    config = read_config(path).with_backend("auto")
    names = (*DTYPES, "int8")
    require(dtype is None or dtype in names, f"dtype {dtype}: choose one of {listing(names)}")
    if dtype is not None and dtype != "int8":
        config = replace(config, model=replace(config.model, dtype=dtype))
    return Run(workdir, config, eight_bits=dtype == "int8")


def checkpoints(workdir: str | Path, verify: bool = False) -> list[dict[str, Any]]:
    """What is kept of a run: for each checkpoint `step`, `bytes`, `monitor` (its validation figure,
    or None), `best`, `latest`, `intact` and `damage` (a text, or None).

    verify: compare every byte with the hash that was saved. Without it just names and sizes are
    compared, and `intact` is None; it is False for checkpoints of version 0.1.0, which have no
    hashes. Those that training has set aside are listed, too. Raises UserError where there is no
    run.
    """
    folder = Workdir(workdir)
    require(
        found_at(folder.config) is not None,
        f"{workdir}: no run here ({folder.config.name} is missing)",
    )
    return Checkpoints(folder.checkpoints).listing(verify)
