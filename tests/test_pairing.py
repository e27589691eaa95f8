# SPDX-License-Identifier: Apache-2.0
"""Every data set with every task and every model: it builds, or one message says why not."""

import itertools

import pytest

import flax_lstm
from flax_lstm import Config, MeshConfig, TrainConfig, UserError
from flax_lstm import data as data_sets
from flax_lstm.training.assembly import assemble
from flax_lstm.training.pairing import check_parts, noun, offers, shipped

# What goes together, said by hand: task -> (data, models).
TEXTS = {"Imdb", "RottenTomatoes", "TextTable"}
TOGETHER = {
    "Classification": (TEXTS | {"Sequences"}, {"TextModel", "RecurrentModel"}),
    "Forecasting": (
        {"SeriesTable", "PanelTable"},
        {"RecurrentForecaster", "SegmentModel", "StepModel"},
    ),
    "LanguageModeling": ({"ImdbLanguage", "LanguageTable"}, {"LanguageModel"}),
    "Tagging": ({"TagTable"}, {"TextModel"}),
    "SequenceRegression": ({"AddingProblem", "Sequences"}, {"RecurrentModel"}),
}
TASKS = [getattr(flax_lstm, name) for name in TOGETHER]
PAIRS = list(itertools.product(shipped(data_sets, "gives"), TASKS, shipped(flax_lstm, "reads")))


def config_of(data, task, model):
    train, mesh = TrainConfig(batch_size=8), MeshConfig(data=1)
    return Config("pair", data(), task(), model(hidden_size=4), train, mesh)


@pytest.mark.parametrize(
    ("data", "task", "model"), PAIRS, ids=lambda kind: getattr(kind, "__name__", None)
)
def test_a_pairing_is_accepted_or_refused_with_what_would_do(data, task, model):
    goes_with, built_by = TOGETHER[task.__name__]
    reads_it = offers(data.gives, model.reads)
    good = data.__name__ in goes_with and model.__name__ in built_by and reads_it
    if good:
        check_parts(config_of(data, task, model))
        return
    with pytest.raises(UserError) as refused:
        check_parts(config_of(data, task, model))
    told = str(refused.value)
    assert ("needs data with" in told) or ("needs a model that builds" in told)
    assert any(name in told for names in TOGETHER.values() for name in names[0] | names[1])


def test_the_table_is_not_empty():
    assert len(PAIRS) >= 7 * 4 * 5


def test_what_goes_together_builds():
    """Where settings alone tell the form of the data, the module is built too."""
    for data, task, model in PAIRS:
        info = data().outline()
        if info is None or not offers(data.gives, model.reads):
            continue
        config = config_of(data, task, model)
        try:
            check_parts(config)
        except UserError:
            continue
        assert assemble(config, info).steps.abstract.params


def test_the_message_names_what_is_missing_and_what_has_it():
    config = config_of(data_sets.AddingProblem, flax_lstm.Classification, flax_lstm.RecurrentModel)
    with pytest.raises(UserError) as refused:
        check_parts(config)
    assert str(refused.value) == (
        "task Classification needs data with labels; AddingProblem has none. "
        "Data with labels: Imdb, RottenTomatoes, Sequences, TextTable"
    )


def test_a_noun_is_the_docstring_up_to_its_colon():
    class Apples:
        """Red apples: sweet."""

    assert noun(Apples) == "red apples"
