# SPDX-License-Identifier: Apache-2.0
"""Breaks the code on purpose, one named breakage after another, and asks whether a test turns red.

    python tools/mutate.py              all of them
    python tools/mutate.py NAME ...     these

Each is applied to a temporary copy of the tree, so that the checkout stays as it is. The tests must
be green there before. Ends with status 1 if a breakage goes unnoticed, or no longer finds the text
that it replaces.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("flax_lstm", "benchmarks", "configs", "launch", "tests", "docs", "examples")


class Breakage(NamedTuple):
    file: str
    old: str  # occurs once
    new: str
    test: str  # what must turn red


BREAKAGES = {
    "arrays of zeros are made for outputs that do not count": Breakage(
        "flax_lstm/nn/recurrence/primitives.py",
        "spares = to is backward_p and call.of.spares and not levels",
        "spares = False",
        "tests/test_transformations.py::test_no_gradient_of_zeros_is_made_of_outputs_that_do_not_"
        "count",
    ),
    "a second derivative takes a gradient without elements for one": Breakage(
        "flax_lstm/nn/recurrence/primitives.py",
        "jnp.zeros_like(result) if gradient.shape == NOTHING else gradient",
        "gradient",
        "tests/test_transformations.py::test_equals_it_where_the_final_state_alone_counts",
    ),
    "a word that is none is looked up as the last one": Breakage(
        "flax_lstm/nn/recurrence/native/table.h",
        "const bool known = row(n) >= 0 && row(n) < V;",
        "const bool known = row(n) < V;",
        "tests/test_tables.py::test_what_is_looked_up_is_what_jax_takes",
    ),
    "memory is given back after the first step alone": Breakage(
        "flax_lstm/training/loop.py",
        "(shape := jax.tree.map(jnp.shape, batch)) not in shapes",
        "(shape := jax.tree.map(jnp.ndim, batch)) not in shapes",
        "tests/test_loop.py::test_memory_is_given_back_after_whatever_was_compiled",
    ),
    "the heap loses its huge pages when memory is given back": Breakage(
        "flax_lstm/machine/malloc.py",
        "        malloc_trim(0)\n        make_room()\n",
        "        malloc_trim(0)\n",
        "tests/test_malloc.py::test_the_heap_is_made_of_huge_pages_and_has_room_also_after_memory_"
        "was_given_back",
    ),
    "a run that needs no compiler has its embedding updated by it": Breakage(
        "flax_lstm/training/assembly.py",
        ' or config.backend not in ("auto", "cpu")',
        "",
        "tests/test_tables.py::test_only_adamw_alone_and_an_embedding_of_its_own_are_updated_by_"
        "rows",
    ),
    "a loss sees what was looked up": Breakage(
        "flax_lstm/training/steps.py",
        "mean = recipe.loss(outputs, part)",
        "mean = recipe.loss(outputs, seen)",
        "tests/test_tables.py::test_a_loss_sees_the_words_and_not_what_was_looked_up",
    ),
    "runs that know words by other ids are averaged": Breakage(
        "flax_lstm/inference.py",
        "or theirs.vocabulary == ours.vocabulary,",
        "or True,",
        "tests/test_init_from.py::test_runs_that_know_words_by_other_ids_are_not_averaged",
    ),
    "an n-gram counts as often as a row has it": Breakage(
        "flax_lstm/nn/ngrams.py",
        "jnp.where(again_BN, 0, hash_BN)",
        "hash_BN",
        "tests/test_ngrams.py::test_an_ngram_counts_once_however_often_a_row_has_it",
    ),
    "a rare n-gram is taken for the one that has its bucket": Breakage(
        "flax_lstm/nn/ngrams.py",
        " & (jnp.abs(check_BN - checks_M[bucket_BN]) < 0.5)",
        "",
        "tests/test_ngrams.py::test_scores_are_the_sum_of_what_the_ngrams_are_worth",
    ),
    "ratios of n-grams count the rows of all classes": Breakage(
        "flax_lstm/training/ngrams.py",
        "p, q = 1 + having, 1 + count[kept] - having",
        "p, q = 1 + having, 1 + count[kept]",
        "tests/test_ngrams.py::test_ratios_are_those_of_naive_bayes",
    ),
    "rows to learn from beside the given ones are those that judge": Breakage(
        "flax_lstm/data/text.py",
        "for n, text in enumerate(texts) if text not in known)",
        "for n, text in enumerate(texts))",
        "tests/test_text_data.py::test_more_rows_are_learnt_from_and_judge_nothing",
    ),
    "a backtest trains with the config's own settings": Breakage(
        "flax_lstm/commands/backtest.py",
        '[*arguments, "--workdir"',
        '[*arguments[:2], "--workdir"',
        "tests/test_backtest.py::test_a_config_is_trained_first",
    ),
    "rows of a group are split by their texts": Breakage(
        "flax_lstm/data/sources.py",
        "self.seed, rows.groups or ())",
        "self.seed)",
        "tests/test_text_data.py::test_rows_of_a_group_go_to_one_split",
    ),
    "a cooldown is the last third": Breakage(
        "flax_lstm/training/optim.py",
        "last = max(steps // 5, 1)",
        "last = max(steps // 3, 1)",
        "tests/test_steps.py::test_a_cooldown_is_the_last_fifth_and_what_comes_before_does_not_"
        "know_the_length",
    ),
    "parts of a model learn from their mean": Breakage(
        "flax_lstm/nn/models.py",
        "sum(parts) / len(parts) if deterministic else parts",
        "sum(parts) / len(parts)",
        "tests/test_ngrams.py::test_each_part_learns_as_if_it_were_alone",
    ),
    "a start that came to nothing leaves its vocabulary": Breakage(
        "flax_lstm/runs/workdir.py",
        "            shutil.rmtree(self.assets, ignore_errors=True)\n            self.data.unlink",
        "            self.data.unlink",
        "tests/test_init_from.py::test_a_start_that_came_to_nothing_leaves_no_vocabulary",
    ),
    "forget gate's bias begins at 0": Breakage(
        "flax_lstm/nn/cells.py",
        ".at[1].set(1)",
        ".at[1].set(0)",
        "tests/test_cells.py::test_weights_begin_as_said",
    ),
    "input and forget gate swapped": Breakage(
        "flax_lstm/nn/cells.py",
        "gate_fn(f) * state.c_BH + gate_fn(i) * activation_fn(g)",
        "gate_fn(i) * state.c_BH + gate_fn(f) * activation_fn(g)",
        "tests/test_cells.py::test_cell_is_the_textbook_step_by_step",
    ),
    "an adversary moves to where the loss is smaller": Breakage(
        "flax_lstm/tasks/adversary.py",
        "return self.size * unit(jax.grad(total)(start_BTD))",
        "return -self.size * unit(jax.grad(total)(start_BTD))",
        "tests/test_adversary.py::test_an_adversarial_step_is_that_of_both_losses_in_float64",
    ),
    "an answer's change is sought where it is least": Breakage(
        "flax_lstm/tasks/adversary.py",
        "start_BTD = self.probe *",
        "start_BTD = 0 *",
        "tests/test_adversary.py::test_a_virtual_step_moves_along_the_only_direction_there_is",
    ),
    "moves count in deviations of padding, too": Breakage(
        "flax_lstm/nn/models.py",
        "mean_D = jnp.sum(x_BTD * valid_BT1, axis=(0, 1)) / count",
        "mean_D = jnp.sum(x_BTD, axis=(0, 1)) / count",
        "tests/test_adversary.py::test_moves_count_in_deviations_of_the_valid_steps",
    ),
    "processes that keep the same library share a draft": Breakage(
        "flax_lstm/machine/files.py",
        'f".{secrets.token_hex(8)}.part"',
        '".all-of-them.part"',
        "tests/test_cache.py::test_two_processes_may_keep_the_same_at_once",
    ),
    "few rows are the first ones": Breakage(
        "flax_lstm/data/text.py",
        "return train.take(np.sort(places[: self.train_rows]))",
        "return train.take(np.sort(places[self.train_rows : 2 * self.train_rows]))",
        "tests/test_text_data.py::test_fewer_training_rows_are_a_part_of_more",
    ),
    "texts that judge are learnt from without their labels": Breakage(
        "flax_lstm/data/text.py",
        "for text in self.texts_without_labels() if text not in judging]",
        "for text in self.texts_without_labels()]",
        "tests/test_unlabelled.py::test_no_text_that_judges_is_learnt_from",
    ),
    "a row without a label has one": Breakage(
        "flax_lstm/data/buckets.py",
        "np.zeros_like(other.weights)",
        "other.weights",
        "tests/test_unlabelled.py::test_half_the_rows_of_a_batch_have_no_label",
    ),
    "padded lengths are as many as ever": Breakage(
        "flax_lstm/data/text.py",
        "boundaries = choose_boundaries(lengths, self.max_length, self.buckets)",
        "boundaries = choose_boundaries(lengths, self.max_length)",
        "tests/test_text_data.py::test_fewer_padded_lengths_hold_the_same_rows",
    ),
    "weight decay moves a frozen embedding": Breakage(
        "flax_lstm/training/optim.py",
        "    parts += kept\n",
        "",
        "tests/test_vectors.py::test_a_frozen_embedding_holds_the_vectors_at_the_end",
    ),
    "the last of a word's vectors counts": Breakage(
        "flax_lstm/data/vectors.py",
        "if id is None or id in found:",
        "if id is None:",
        "tests/test_vectors.py::test_every_form_of_file_reads_the_same",
    ),
    "pieces are read in the order of the stream": Breakage(
        "flax_lstm/data/prepared.py",
        "return _shuffled(number, self._pieces, self._seed, epoch)",
        "return number",
        "tests/test_prepared.py::test_an_epoch_reads_every_token_once_each_in_its_own_order",
    ),
    "a lane reads on beyond its piece": Breakage(
        "flax_lstm/data/prepared.py",
        "start = begin + window * self._length",
        "start = begin + (window + 1) * self._length",
        "tests/test_prepared.py::test_an_epoch_reads_every_token_once_each_in_its_own_order",
    ),
    "a part of other texts is kept": Breakage(
        "flax_lstm/data/preparing.py",
        'if found.get("texts_sha256") == texts_sha256:',
        "if True:",
        "tests/test_prepared.py::test_other_texts_or_settings_are_noticed",
    ),
    "a part is encoded again": Breakage(
        "flax_lstm/data/preparing.py",
        'if found.get("texts_sha256") == texts_sha256:',
        "if False:",
        "tests/test_prepared.py::test_a_prepare_that_was_cut_short_goes_on_and_ends_alike",
    ),
    "a tag's F1 counts what was given twice": Breakage(
        "flax_lstm/tasks/tagging.py",
        "either_K = given_K + has_K",
        "either_K = 2 * given_K",
        "tests/test_tagging.py::test_figures_are_those_of_scikit_learn",
    ),
    "tags of a row that weighs nothing count": Breakage(
        "flax_lstm/tasks/tagging.py",
        '"given": jnp.sum(weights_B1 * given_BK, axis=0)',
        '"given": jnp.sum(given_BK, axis=0)',
        "tests/test_tagging.py::test_figures_are_those_of_scikit_learn",
    ),
    "settings that tokens were not prepared with are passed over": Breakage(
        "flax_lstm/data/corpus.py",
        "silent = now == field.default and name",
        "silent = name",
        "tests/test_prepared.py::test_labels_that_cannot_be_prepared_are_said",
    ),
    "unknown words are explained by their id": Breakage(
        "flax_lstm/inference.py",
        "words = info.written(text)",
        "words = [info.vocabulary.decode([i]) for i in ids_T]",
        "tests/test_explanation.py::test_words_are_shown_as_the_text_has_them",
    ),
    "the linear model gives no tag that all training rows have": Breakage(
        "flax_lstm/tasks/linear.py",
        "count), np.log(2 * len(texts) + 1))",
        "count), -np.log(2 * len(texts) + 1))",
        "tests/test_tagging.py::test_each_tag_has_a_linear_model_beside_it",
    ),
    "the written list of a row is one tag": Breakage(
        "flax_lstm/data/tables.py",
        "value.split(separator) if written is None else written",
        "value.split(separator)",
        "tests/test_tagging.py::test_every_kind_of_table_gives_the_same_targets",
    ),
    "a long text in files is kept whole": Breakage(
        "flax_lstm/data/prepared.py",
        "return self._stream.read(start, stop)[self._cut]",
        "return self._stream.read(start, stop)[: self._most]",
        "tests/test_prepared.py::test_texts_with_labels_give_the_batches_that_they_give_from_"
        "memory",
    ),
    "files of tokens are trained from unseen": Breakage(
        "flax_lstm/data/corpus.py",
        "        found.verify(file_sha256)\n",
        "",
        "tests/test_prepared.py::test_a_byte_that_differs_is_noticed_before_training_from_it",
    ),
    "labels in files are numbered as they come": Breakage(
        "flax_lstm/data/preparing.py",
        "places = {name: place for place, name in enumerate(names)}",
        "places = {name: place for place, name in enumerate(reversed(names))}",
        "tests/test_prepared.py::test_texts_with_labels_give_the_batches_that_they_give_from_"
        "memory",
    ),
    "a cell knows one batch axis": Breakage(
        "flax_lstm/nn/cells.py",
        "*batch, features = inputs.shape",
        "batch, features = inputs.shape[:1], inputs.shape[-1]",
        "tests/test_flax_contract.py::test_any_number_of_batch_axes",
    ),
    "a carry comes back as ours": Breakage(
        "flax_lstm/nn/cells.py",
        "return jax.tree.unflatten(jax.tree.structure(carry), leaves), y",
        "return jax.tree.unflatten(jax.tree.structure(state), leaves), y",
        "tests/test_flax_contract.py::test_in_flax_rnn_with_every_option",
    ),
    "a prefix of PyTorch's names is ignored": Breakage(
        "flax_lstm/convert.py",
        "if name.startswith(prefix)",
        "if True",
        "tests/test_convert.py::test_a_layer_of_a_whole_torch_model_is_found_by_its_prefix",
    ),
    "PyTorch's bfloat16 goes to NumPy": Breakage(
        "flax_lstm/convert.py",
        'if str(tensor.dtype) == "torch.bfloat16":',
        "if False:",
        "tests/test_convert.py::test_parameters_that_require_gradients_and_bfloat16",
    ),
    "fused: a reset stops the forward pass only": Breakage(
        "flax_lstm/nn/recurrence/fused.py",
        "(dh,) = from_zeros(fresh_B, (scatter(through_matmul(da), d[-1].shape[1]),))",
        "dh = scatter(through_matmul(da), d[-1].shape[1])",
        "tests/test_fused.py::test_resets_and_a_mask_for_each_gate",
    ),
    "fused: gradients of a cell's own weights count padding": Breakage(
        "flax_lstm/nn/recurrence/fused.py",
        "used = keep_where(valid, d, tuple(map(jnp.zeros_like, d)))",
        "used = d",
        "tests/test_fused.py::test_cells_with_equations_of_their_own",
    ),
    "fused: weights have no copy for a row": Breakage(
        "flax_lstm/nn/recurrence/apart.py",
        "if isinstance(value, Copies) and value.rows.shape[:2] == (rows_of_others, 1):",
        "if False:",
        "tests/test_fused.py::test_a_step_of_such_a_cell_is_arithmetic",
    ),
    "fused: any weights [B, ...] are taken for rows": Breakage(
        "flax_lstm/nn/recurrence/apart.py",
        "value.rows.shape[:2] == (rows_of_others, 1)",
        "value.rows.shape[1] == 1",
        "tests/test_apart.py",
    ),
    "fused: every cell is taken to add x and Rh": Breakage(
        "flax_lstm/nn/recurrence/derived.py",
        "return found.state, found.rh, None if adds else found.x, found.small",
        "return found.state, found.rh, None, found.small",
        "tests/test_fused.py::test_cells_with_equations_of_their_own",
    ),
    "fused: a cell with two products is taken": Breakage(
        "flax_lstm/nn/recurrence/derived.py",
        "if len(product.asked) != 1 or any(h is not h_BJ for h, _ in product.asked):",
        "if len(product.asked) == 0:",
        "tests/test_fused.py::test_other_equations_are_scanned",
    ),
    "one mask of the inputs for all gates": Breakage(
        "flax_lstm/nn/layers.py",
        "ones = jnp.ones((batch, 1, cell.gates, features), x_BTD.dtype)",
        "ones = jnp.ones((batch, 1, 1, features), x_BTD.dtype)",
        "tests/test_keras_masks.py::test_gates_see_inputs_under_masks_of_their_own",
    ),
    "fused: gates share the first mask on the way back": Breakage(
        "flax_lstm/nn/recurrence/fused.py",
        "return jnp.sum(dh_BGJ * mask_BGJ, 1)",
        "return jnp.sum(dh_BGJ * mask_BGJ[:, :1], 1)",
        "tests/test_keras_masks.py::test_a_layer_draws_the_same_masks_whatever_runs_it",
    ),
    "layer norm of each gate by itself": Breakage(
        "flax_lstm/nn/variants.py",
        "return normalise(rh_BGH, 2) * weights.own.recurrent_GH[None]",
        "return normalise(rh_BGH, 1) * weights.own.recurrent_GH[None]",
        "tests/test_variants.py::test_the_equations_in_numpy",
    ),
    "nnx: outputs of a reversed layer stay in their places": Breakage(
        "flax_lstm/nnx.py",
        "if reverse and not keep_order:",
        "if False:",
        "tests/test_nnx.py::test_an_rnn_of_nnx_from_its_weights",
    ),
    "nnx: dropout in evaluation": Breakage(
        "flax_lstm/nnx.py",
        "if rnn.drops and not deterministic]",
        "if rnn.drops]",
        "tests/test_nnx.py::test_dropout_draws_from_its_stream_and_is_turned_off_by_eval",
    ),
    "nnx: a derived cell's own step is passed over": Breakage(
        "flax_lstm/nnx.py",
        " and type(self.cell).__call__ is Cell.__call__",
        "",
        "tests/test_nnx.py::test_a_cell_of_others_is_run_by_nnx",
    ),
    "fit: words of an embedding are not taken": Breakage(
        "flax_lstm/training/loop.py",
        "        config.data.adopt(words, assets)",
        "        pass",
        "tests/test_docs.py::test_convert",
    ),
    "fused: gradients of states after steps are lost": Breakage(
        "flax_lstm/nn/recurrence/fused.py",
        "(*d[:rest_of_d], *map(operator.add, d[rest_of_d:], d_after))",
        "(*d[:-1], d[-1] + d_after[-1])",
        "tests/test_fused.py::test_states_after_every_step",
    ),
    "auto: the kernel lays out weights for one step": Breakage(
        "flax_lstm/nn/recurrence/cpu.py",
        "MANY_STEPS = True",
        "FEW_STEPS = True",
        "tests/test_native.py::test_one_step_alone_is_run_by_another_unless_asked_for_by_name",
    ),
    "nnx: a carry begins as no plain pair": Breakage(
        "flax_lstm/nnx.py",
        "zeros = tuple(zeros) if isinstance(zeros, tuple) else zeros",
        "zeros = zeros",
        "tests/test_nnx.py::test_a_cell_of_others_is_run_by_nnx",
    ),
    "nnx: initializers see all gates at once": Breakage(
        "flax_lstm/nnx.py",
        "initializer(k, (*rows, hidden), dtype) for k in keys",
        "initializer(key, (*rows, gates * hidden), dtype)[..., g * hidden :][..., :hidden] "
        "for g, k in enumerate(keys)",
        "tests/test_nnx.py::test_initializers_and_activations_of_nnx",
    ),
    "convert: the order of NNX's gates": Breakage(
        "flax_lstm/convert.py",
        "*(kernel.reshape(-1, gates, hidden) for kernel in kernels),",
        "*(kernel.reshape(-1, hidden, gates).swapaxes(1, 2) for kernel in kernels),",
        "tests/test_nnx.py::test_an_rnn_of_nnx_from_its_weights",
    ),
    "recurrent dropout on the carried state": Breakage(
        "flax_lstm/nn/cells.py",
        "return (1 - z) * n + z * h_BH",
        "return (1 - z) * n + z * (h_BH if mask_BJ is None else h_BH * mask_BJ)",
        "tests/test_cells.py::test_recurrent_dropout_leaves_the_carried_state_alone",
    ),
    "padding changes the state": Breakage(
        "flax_lstm/nn/layers.py",
        "kept = rows.where_rows(valid_B, new, state)",
        "kept = new",
        "tests/test_layers.py::test_padding_is_never_seen",
    ),
    "reverse is ignored": Breakage(
        "flax_lstm/nn/layers.py",
        "        reverse=reverse,\n",
        "        reverse=False,\n",
        "tests/test_layers.py::test_reverse_reads_each_row_from_its_end",
    ),
    "no gradient for the GRU's recurrent bias": Breakage(
        "flax_lstm/nn/recurrence/fused.py",
        "d_bias = jnp.sum(",
        "d_bias = 0 * jnp.sum(",
        "tests/test_backends.py::test_equals_the_scan_in_float64",
    ),
    "scaler fitted on all rows": Breakage(
        "flax_lstm/data/series.py",
        "train_RD = track.values_RD[: borders[1]]",
        "train_RD = track.values_RD",
        "tests/test_series_data.py::test_training_knows_nothing_of_what_follows",
    ),
    "a panel's error scale reaches into the test": Breakage(
        "flax_lstm/data/panel.py",
        "info.scale_of(tracks, [int(n) for n in before_test])",
        "info.scale_of(tracks, [int(n) for n in ends])",
        "tests/test_panel_data.py::test_each_series_is_measured_by_its_own_seasonal_error",
    ),
    "a look-back reaches into the series before": Breakage(
        "flax_lstm/data/windows.py",
        "rows_BS = np.maximum(rows_BS, begin_B1)",
        "rows_BS = np.maximum(rows_BS, 0)",
        "tests/test_panel_data.py::test_short_series_are_padded_told_and_named",
    ),
    "the cycle starts at any step": Breakage(
        "flax_lstm/nn/segments.py",
        "known.phase[:, None] + jnp.arange(",
        "0 * known.phase[:, None] + jnp.arange(",
        "tests/test_models.py::test_the_cycle_is_taken_away_before_and_put_back_after",
    ),
    "quantiles below the point are calibrated as if above": Breakage(
        "flax_lstm/tasks/forecasting.py",
        "_stretch(ratio, level, n > self.point)",
        "_stretch(ratio, level, True)",
        "tests/test_tasks.py::test_intervals_are_calibrated_on_validation",
    ),
    "quantiles are calibrated twice": Breakage(
        "flax_lstm/tasks/forecasting.py",
        "plain = replace(self, stretch=())",
        "plain = self",
        "tests/test_tasks.py::test_intervals_are_calibrated_on_validation",
    ),
    "a hole is interpolated towards what follows the forecast's origin": Breakage(
        "flax_lstm/data/windows.py",
        "        if buffer.held is not None:",
        "        if False:",
        "tests/test_panel_data.py::test_a_look_back_that_ends_in_a_hole_knows_nothing_of_what_"
        "follows",
    ),
    "a refit takes every series to end where another one does": Breakage(
        "flax_lstm/backtest.py",
        "ends.get(str(name), end_R)",
        "end_R",
        "tests/test_backtest.py::test_a_refit_ends_with_its_forecast_whatever_was_closed_in_it",
    ),
    "quantiles may cross": Breakage(
        "flax_lstm/tasks/forecasting.py",
        "        outputs = jnp.sort(outputs, axis=-1)\n        if not self.stretch",
        "        if not self.stretch",
        "tests/test_tasks.py::test_forecasting_figures",
    ),
    "the last season is out of step": Breakage(
        "flax_lstm/nn/segments.py",
        "np.arange(-steps, horizon) % season",
        "np.arange(1 - steps, horizon + 1) % season",
        "tests/test_models.py::test_a_seasonal_window_adds_to_the_last_season",
    ),
    "the test of Diebold and Mariano takes forecasts for independent": Breakage(
        "flax_lstm/tasks/judging.py",
        "variance = (covariances[0] + 2 * sum(covariances[1:])) / count",
        "variance = covariances[0] / count",
        "tests/test_judging.py::test_diebold_and_mariano_by_hand",
    ),
    "models of a comparison are taken to forecast window by window alike": Breakage(
        "flax_lstm/backtest.py",
        "_same(dataset, windows_W, data_of, runs[0], run)",
        "windows_W",
        "tests/test_backtest.py::test_models_of_other_data_or_times_are_not_compared",
    ),
    "a comparison reads the data of all models as the first does": Breakage(
        "flax_lstm/backtest.py",
        "zip(names, runs, settings, datasets, strict=True)",
        "zip(names, runs, settings, [dataset] * len(runs), strict=True)",
        "tests/test_backtest.py::test_models_are_compared_on_the_same_windows_under_their_own_"
        "names",
    ),
    "a refit prints the progress of every training": Breakage(
        "flax_lstm/backtest.py",
        "plots=False, quiet=True)",
        "plots=False)",
        "tests/test_backtest.py::test_a_refit_says_a_line_for_each_origin",
    ),
    "a year that is seen once is told of": Breakage(
        "flax_lstm/data/series.py",
        "step <= x / 2 and 2 * x <= whole",
        "step <= x / 2",
        "tests/test_series_data.py::test_frequencies",
    ),
    "validation takes a short series' rows whole": Breakage(
        "flax_lstm/data/panel.py",
        "np.minimum(steps, own_P)",
        "np.full(len(tracks), steps)",
        "tests/test_panel_data.py::test_a_short_series_among_long_ones_trains_and_has_a_scale_of_"
        "its_own",
    ),
    "a series that none trains on has the scale of one row": Breakage(
        "flax_lstm/data/panel.py",
        "np.where(train > info.horizon, learned, before_test)",
        "learned",
        "tests/test_panel_data.py::test_a_short_series_among_long_ones_trains_and_has_a_scale_of_"
        "its_own",
    ),
    "steps that are counted have a calendar": Breakage(
        "flax_lstm/data/series.py",
        "    if frequency.counted:\n        return ()\n",
        "",
        "tests/test_series_data.py::test_steps_that_are_counted_are_as_good_as_times",
    ),
    "years are taken for steps that are counted": Breakage(
        "flax_lstm/data/timetable.py",
        "np.median(steps) == 1 and bool(dates.isna().any())",
        "np.median(steps) == 1",
        "tests/test_series_data.py::test_which_whole_numbers_count_steps",
    ),
    "a backtest judges what was filled in": Breakage(
        "flax_lstm/tasks/judging.py",
        "(values_WNC * self.counted_WNC).sum() / count",
        "values_WNC.mean()",
        "tests/test_judging.py::test_what_was_not_measured_is_not_judged",
    ),
    "invented values are scored": Breakage(
        "flax_lstm/data/windows.py",
        "weights=(observed_BSC[:, lookback:] & counted_B11)",
        "weights=(observed_BSC[:, lookback:] | counted_B11)",
        "tests/test_series_data.py::test_absent_values",
    ),
    "windows see the first step to forecast": Breakage(
        "flax_lstm/data/windows.py",
        "inputs_BTD = np.ascontiguousarray(values_BSD[:, :lookback])",
        "inputs_BTD = np.ascontiguousarray(values_BSD[:, 1 : lookback + 1])",
        "tests/test_series_data.py::test_forecast_steps_are_not_in_the_inputs",
    ),
    "quantiles are set where none are forecast": Breakage(
        "flax_lstm/tasks/forecasting.py",
        "bool(self.levels) or (self.quantiles",
        "True or (self.quantiles",
        "tests/test_tasks.py::test_settings_of_quantiles_do_something_or_are_refused",
    ),
    "every command begins with the config of train": Breakage(
        "flax_lstm/commands/grammar.py",
        'vars(kind)["config"]',
        '"quickstart"',
        "tests/test_cli.py::test_flags_are_those_of_the_commands_own_config",
    ),
    "the archive of reviews is looked for where a run goes on": Breakage(
        "flax_lstm/data/imdb.py",
        '(*TextData.paths, "data_dir", "archive")',
        '(*TextData.paths, "data_dir")',
        "tests/test_text_sources.py::test_every_setting_that_names_a_place_is_made_absolute",
    ),
    "copies of a text in training and validation": Breakage(
        "flax_lstm/data/sources.py",
        "[steady_number(key, seed) for key in keys or rows.texts]",
        "[steady_number(f'{key}{n}', seed) for n, key in enumerate(keys or rows.texts)]",
        "tests/test_text_data.py::test_more_rows_move_none_and_copies_stay_together",
    ),
    "every epoch in the same order": Breakage(
        "flax_lstm/data/order.py",
        "default_rng([seed, epoch])",
        "default_rng([seed])",
        "tests/test_series_data.py::test_each_window_once_an_epoch",
    ),
    "weights ignored in the loss": Breakage(
        "flax_lstm/tasks/base.py",
        "weights = jnp.broadcast_to(weights_B, values_B.shape)",
        "weights = jnp.ones_like(values_B)",
        "tests/test_steps.py::test_rows_of_weight_zero_change_nothing",
    ),
    "accumulated gradients summed, not averaged": Breakage(
        "flax_lstm/training/steps.py",
        "jax.tree.map(lambda g: g / weight, grads)",
        "jax.tree.map(lambda g: g * recipe.accumulate / weight, grads)",
        "tests/test_steps.py::test_sgd_with_momentum_and_averaged_weights_by_hand",
    ),
    "carried state never forgotten": Breakage(
        "flax_lstm/training/steps.py",
        "reset.reshape(-1, *(1,) * (s.ndim - 1)), 0, s)",
        "reset.reshape(-1, *(1,) * (s.ndim - 1)), s, s)",
        "tests/test_steps.py::test_carried_state_makes_two_windows_one_sequence",
    ),
    "a resumed run reads the data from the start": Breakage(
        "flax_lstm/training/loop.py",
        "batches(self.source, self.step, train.steps)",
        "batches(self.source, 0, train.steps)",
        "tests/test_resume.py::test_ten_steps_are_five_and_five_more",
    ),
    "averaged weights not used in validation": Breakage(
        "flax_lstm/training/loop.py",
        'self.figures("validation", self.state.evaluated)',
        'self.figures("validation", self.state.params)',
        "tests/test_cli.py::test_figures_are_those_of_the_averaged_weights_at_the_best_step",
    ),
    "averaged weights not used after training": Breakage(
        "flax_lstm/training/checkpoint.py",
        "self.restore(step, abstract)[0].evaluated",
        "self.restore(step, abstract)[0].params",
        "tests/test_cli.py::test_figures_are_those_of_the_averaged_weights_at_the_best_step",
    ),
    "a changed byte of a checkpoint is not noticed": Breakage(
        "flax_lstm/runs/manifest.py",
        "if content and _sha256(folder / name) != digest:",
        "if False:",
        "tests/test_checkpoint.py::test_damage_to_any_file_is_noticed_and_the_next_checkpoint_used",
    ),
    "a manifest is believed whatever it says": Breakage(
        "flax_lstm/runs/manifest.py",
        'content["sha256"] == _of_entries(files)',
        "True",
        "tests/test_checkpoint.py::test_damage_to_any_file_is_noticed_and_the_next_checkpoint_used",
    ),
    "two runs on one folder": Breakage(
        "flax_lstm/machine/lock.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_UN",
        "tests/test_owner.py::test_a_second_run_on_the_folder_is_refused_and_told_by_whom",
    ),
    "a library of anybody's is loaded": Breakage(
        "flax_lstm/machine/cache.py",
        "own = is_own(path) and is_own(noted)",
        "own = True",
        "tests/test_cache.py::test_a_planted_file_is_not_intact",
    ),
    "a spoilt file of the cache is believed": Breakage(
        "flax_lstm/data/cache.py",
        "    if intact(path):",
        "    if path.exists():",
        "tests/test_vocabulary.py::test_a_spoilt_or_planted_file_is_made_anew",
    ),
    "changed reviews go unnoticed": Breakage(
        "flax_lstm/data/imdb.py",
        '.glob("*.array_record*")',
        '.glob("nothing")',
        "tests/test_imdb_data.py::test_a_run_knows_the_reviews_by_their_content_alone",
    ),
    "process 0 listens everywhere": Breakage(
        "flax_lstm/machine/distributed.py",
        "                if meant or not loopback:\n",
        "                if not loopback:\n",
        "tests/test_distributed.py::test_process_0_listens_where_the_coordinator_is_named_and_"
        "nowhere_else",
    ),
    "who was killed is not named": Breakage(
        "flax_lstm/machine/distributed.py",
        "key=lambda one: one[1])",
        "key=lambda one: one[0])",
        "tests/test_distributed.py::"
        "test_the_process_that_was_killed_is_named_and_not_one_that_it_brought_down",
    ),
    "SIGTERM before training begins is a failure": Breakage(
        "flax_lstm/machine/distributed.py",
        "        stopped.set()\n",
        "",
        "tests/test_distributed.py::test_sigterm_before_the_processes_can_save_is_as_good_as_saved",
    ),
    "SIGTERM before anything is read is a failure": Breakage(
        "flax_lstm/commands/train.py",
        "lambda *_: os._exit(75)",
        "signal.SIG_DFL",
        "tests/test_distributed.py::test_sigterm_before_anything_is_read_is_as_good_as_saved",
    ),
    "each process of a machine counts on all its memory": Breakage(
        "flax_lstm/training/room.py",
        "len(devices) * processes_here()",
        "len(devices)",
        "tests/test_bad_values.py::test_processes_of_a_run_share_the_memory_of_their_machine",
    ),
    "a damaged vocabulary whose manifest is gone is used": Breakage(
        "flax_lstm/runs/workdir.py",
        " or (self.assets.is_dir() and any(sealed))",
        "",
        "tests/test_owner.py::test_damage_to_what_was_fitted_is_noticed",
    ),
    "a prepare that was killed at its first file is in its own way": Breakage(
        "flax_lstm/data/preparing.py",
        'ours = ("lock", f"{path.name}.part")',
        'ours = ("lock",)',
        "tests/test_prepared.py::"
        "test_a_prepare_that_was_killed_at_any_file_goes_on_and_leaves_nothing_else",
    ),
    "local processes meet where anybody comes": Breakage(
        "flax_lstm/machine/distributed.py",
        'f"{LOCAL}{private}/0"',
        '"127.0.0.1:8476"',
        "tests/test_distributed.py::test_local_processes_meet_where_no_other_user_comes",
    ),
    "rows that found no room are lost with the session": Breakage(
        "flax_lstm/training/loop.py",
        "unwritten=tuple(journal.log.unwritten),",
        "unwritten=(),",
        "tests/test_full_disk.py::"
        "test_a_run_whose_log_cannot_be_written_is_not_finished_and_goes_on_whole",
    ),
    "a run finishes without its log": Breakage(
        "flax_lstm/training/loop.py",
        "journal.log.write()  #",
        "pass  #",
        "tests/test_full_disk.py::"
        "test_a_run_whose_log_cannot_be_written_is_not_finished_and_goes_on_whole",
    ),
    "changed data go unnoticed": Breakage(
        "flax_lstm/runs/workdir.py",
        "None in (before, data_sha256) or before == data_sha256,",
        "True,",
        "tests/test_owner.py::test_the_same_command_on_changed_data_is_refused",
    ),
    "a damaged vocabulary is used": Breakage(
        "flax_lstm/runs/workdir.py",
        "                verify(self.assets)",
        "                pass",
        "tests/test_owner.py::test_damage_to_what_was_fitted_is_noticed",
    ),
    "a state is kept before the step after it is known": Breakage(
        "flax_lstm/training/checkpoint.py",
        "self._saving.step < step and",
        "self._saving.step <= step and",
        "tests/test_loop.py::test_what_is_not_finite_ends_the_run_and_is_never_saved",
    ),
    "the worst checkpoint taken for the best": Breakage(
        "flax_lstm/training/progress.py",
        "value > self.value if maximise else value < self.value",
        "value < self.value if maximise else value > self.value",
        "tests/test_cli.py::test_figures_are_those_of_the_averaged_weights_at_the_best_step",
    ),
    "ties count whole under the curve": Breakage(
        "flax_lstm/tasks/metrics.py",
        "below + negatives / 2",
        "below + negatives",
        "tests/test_metrics.py::test_area_under_curve_with_ties_against_all_pairs",
    ),
    "a failed start leaves its scaler to the next": Breakage(
        "flax_lstm/runs/workdir.py",
        "shutil.rmtree(self.assets, ignore_errors=True)",
        "pass",
        "tests/test_bad_input.py::test_only_what_a_failed_start_leaves_is_taken_over",
    ),
    "parameters whole on every device": Breakage(
        "flax_lstm/machine/sharding.py",
        'split[largest] = (*used[largest], "fsdp")',
        "pass",
        "tests/test_sharding.py::test_each_device_stores_its_share_of_parameters_and_optimiser",
    ),
    "moments of the optimiser whole on every device": Breakage(
        "flax_lstm/machine/sharding.py",
        "s if x.shape == p.shape else replicated(mesh)",
        "replicated(mesh)",
        "tests/test_sharding.py::test_each_device_stores_its_share_of_parameters_and_optimiser",
    ),
    "native code sees the whole batch": Breakage(
        "flax_lstm/nn/layers.py",
        "return on_each_device(run, partitioned=backend is None)(",
        "return run(",
        "tests/test_sharding.py::test_a_backend_that_the_compiler_cannot_split_runs_on_each_device",
    ),
    "gradients of hidden units not summed over the mesh": Breakage(
        "flax_lstm/nn/recurrence/fused.py",
        'jax.lax.psum_scatter(h_BJ, "model", scatter_dimension=1, tiled=True)',
        'jax.lax.dynamic_slice_in_dim(h_BJ, jax.lax.axis_index("model") * units, units, 1)',
        "tests/test_sharding.py::test_the_first_step_of_a_language_model_on_a_mesh_of_all_three_"
        "axes",
    ),
    "hidden units gathered twice a step": Breakage(
        "flax_lstm/nn/recurrence/fused.py",
        'jax.lax.all_gather(h, "model", axis=h.ndim - 1, tiled=True)',
        '(jax.lax.all_gather(h, "model", axis=h.ndim - 1, tiled=True)'
        ' + jax.lax.all_gather(h * 2, "model", axis=h.ndim - 1, tiled=True)) / 3',
        "tests/test_sharding.py::test_a_time_loop_gathers_once_and_reduces_once",
    ),
    "a process takes its number on the node": Breakage(
        "flax_lstm/machine/distributed.py",
        'int(env["SLURM_PROCID"]), device',
        'int(env["SLURM_LOCALID"]), device',
        "tests/test_distributed.py::test_launchers_are_recognised",
    ),
    "a stopped job is not put in the queue again": Breakage(
        "launch/slurm_node.sbatch",
        '"$status" -eq 75',
        '"$status" -eq 76',
        "tests/test_launch.py::test_slurm_puts_a_stopped_run_in_the_queue_again",
    ),
    "a saved config is executed": Breakage(
        "flax_lstm/runs/saved_config.py",
        "        module = ast.parse(path.read_text())\n",
        "        module = ast.parse(path.read_text())\n        exec(path.read_text())\n",
        "tests/test_config.py::test_reading_executes_nothing",
    ),
    "cuDNN: empty rows are handed over": Breakage(
        "flax_lstm/nn/recurrence/cudnn.py",
        "jnp.clip(lengths_B, 1, time)",
        "jnp.clip(lengths_B, 0, time)",
        "tests/test_backends.py::test_one_step_and_all_rows_empty",
    ),
    "cuDNN: padding reversed with its row": Breakage(
        "flax_lstm/nn/recurrence/rows.py",
        "jnp.where(t < ends, ends - 1 - t, t)",
        "jnp.where(t < ends, len(t[0]) - 1 - t, t)",
        "tests/test_backends.py::test_equals_the_scan",
    ),
    "cuDNN: dropout between layers forgotten": Breakage(
        "flax_lstm/nn/layers.py",
        "dropped = not deterministic and any(rnn.dropout for rnn in rnns)",
        "dropped = False",
        "tests/test_cudnn.py::test_one_call_where_there_is_nothing_in_between",
    ),
    "bfloat16: gradients of all steps add up in it": Breakage(
        "flax_lstm/nn/layers.py",
        "weights = self.weights(features)\n",
        "weights = cell.cast(self.weights(features), x_BTD)\n",
        "tests/test_bfloat16.py::test_gradients_add_up_in_float32",
    ),
    "bfloat16: gradients multiplied in float32": Breakage(
        "flax_lstm/nn/recurrence/fused.py",
        "jnp.matmul(da, transposed, preferred",
        "jnp.matmul(da.astype(state_dtype), transposed.astype(state_dtype), preferred",
        "tests/test_bfloat16.py::test_matmuls_are_bfloat16",
    ),
    "chunks of time by the units of all devices": Breakage(
        "flax_lstm/nn/recurrence/fused.py",
        "units = weights.recurrent_JGH.shape[-1]",
        "units = cell.features",
        "tests/test_sharding.py::test_time_is_cut_in_chunks_by_what_one_device_keeps",
    ),
    "the layer before a tied head whole on every device": Breakage(
        "flax_lstm/nn/models.py",
        'dense(self.embed.features, "hidden", dtype=self.dtype',
        "dense(self.embed.features, None, dtype=self.dtype",
        "tests/test_plan.py::test_the_large_model_is_whole_nowhere",
    ),
    "plan: exchanges in a loop counted once": Breakage(
        "flax_lstm/plan/program.py",
        "times * self.trips(operation), True",
        "times, True",
        "tests/test_plan.py::test_what_is_in_a_loop_counts_as_often_as_it_runs",
    ),
    "plan: one exchange in several fusions counted for each": Breakage(
        "flax_lstm/plan/program.py",
        "chains.add(chain[1])",
        "pass",
        "tests/test_plan.py::test_the_text_of_a_tpu_program",
    ),
    "plan: arrays that are written in place counted whole": Breakage(
        "flax_lstm/plan/program.py",
        "in_place = {origin(body, op.operands[0]) for op in updates}",
        "in_place = set()",
        "tests/test_plan.py::test_slices_count_alone",
    ),
    "plan: FLOPs of a loop counted once": Breakage(
        "flax_lstm/plan/compiler.py",
        'repeat, loop = times * parameters["length"], True',
        "repeat, loop = times, True",
        "tests/test_plan.py::test_flops_of_a_classifier_by_hand",
    ),
    "plan: FLOPs of one device taken for all": Breakage(
        "flax_lstm/plan/compiler.py",
        "repeat = times * math.prod(",
        "repeat = times + 0 * math.prod(",
        "tests/test_plan.py::test_flops_of_a_language_model_by_hand",
    ),
    "plan: products that nobody asks for": Breakage(
        "flax_lstm/plan/compiler.py",
        "jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))",
        "pass",
        "tests/test_plan.py::test_flops_of_a_classifier_by_hand",
    ),
    "plan: gradients and activations take no memory": Breakage(
        "flax_lstm/plan/compiler.py",
        '"activations": memory.temp_size_in_bytes',
        '"activations": 0',
        "tests/test_plan.py::test_bytes_are_those_of_the_real_step",
    ),
    "plan: steps are traced for the machine at hand": Breakage(
        "flax_lstm/machine/sharding.py",
        "return jax.default_backend() if device is None else device.platform",
        "return jax.default_backend()",
        "tests/test_plan.py::test_steps_know_what_they_are_traced_for",
    ),
    "plan: the compiler's environment is everybody's": Breakage(
        "flax_lstm/plan/__init__.py",
        "    return {**os.environ, **settings}",
        "    os.environ.update(settings)\n    return dict(os.environ)",
        "tests/test_plan.py::test_the_command",
    ),
    "plan: an all-reduce goes round once": Breakage(
        "flax_lstm/plan/__init__.py",
        'rounds = 2 if exchange["kind"]',
        'rounds = 1 if exchange["kind"]',
        "tests/test_plan.py::test_time_of_an_exchange",
    ),
    "plan: a single chip takes the whole batch": Breakage(
        "flax_lstm/plan/__init__.py",
        "train=replace(config.train, batch_size=rows)",
        "train=config.train",
        "tests/test_plan.py::test_fewer_chips_have_the_same_share_of_the_batch",
    ),
    "native kernel: a reset leaves the gradient through": Breakage(
        "flax_lstm/nn/recurrence/native/kernel.h",
        "clear_fresh(f.reset, mine, z, s, f.reverse, through + block * rows * COLS, COLS, COLS);",
        "{}",
        "tests/test_resets.py::test_every_backend_resets_as_the_scan",
    ),
    "native kernel: a reset keeps the state": Breakage(
        "flax_lstm/nn/recurrence/native/kernel.h",
        "clear_fresh(f.reset, mine, z, s, f.reverse, carry, stride, H);",
        "",
        "tests/test_resets.py::test_every_backend_resets_as_the_scan",
    ),
    "benchmark of a GPU: nobody is ever wrong": Breakage(
        "benchmarks/gpu.py",
        "far <= numbers.allowed",
        "True",
        "tests/test_benchmarks.py::test_the_benchmark_of_a_gpu_says_who_is_wrong",
    ),
    "benchmark: the limit forgets a product": Breakage(
        "benchmarks/limit.py",
        "products += [inputs, recurrent, recurrent]",
        "products += [inputs, recurrent]",
        "tests/test_benchmarks.py::test_operations_are_those_of_the_products_written_out",
    ),
    "native kernel: bfloat16 loses what a bias has beyond it": Breakage(
        "flax_lstm/nn/recurrence/native/kernel.h",
        "for (float& v : bias) v -= Number::value(Number::of(v));",
        "for (float& v : bias) v = 0;",
        "tests/test_bfloat16.py::test_the_native_kernel_rounds_what_it_multiplies_and_nothing_else",
    ),
    "native kernel: gradients of weights are rounded to bfloat16": Breakage(
        "flax_lstm/nn/recurrence/cpu.py",
        "ROUNDS = True",
        "ROUNDED = True",
        "tests/test_bfloat16.py::test_the_native_kernel_rounds_what_it_multiplies_and_nothing_else",
    ),
    "native kernel: a narrow last panel loses columns": Breakage(
        "flax_lstm/nn/recurrence/native/kernel.h",
        "if (width <= LANES) return run(NoVec{});",
        "if (width <= COLS - 1) return run(NoVec{});",
        "tests/test_native.py::test_each_instruction_set_equals_the_scan",
    ),
    "native kernel: a word is looked up in another place": Breakage(
        "flax_lstm/nn/recurrence/native/kernel.h",
        "mine.time(r, s, f.reverse));\n      const long word",
        "s);\n      const long word",
        "tests/test_words.py::test_tables_give_what_embeddings_give",
    ),
    "native kernel: one row waits for a helper who is not there": Breakage(
        "flax_lstm/nn/recurrence/native/alone.h",
        "a.advance(s, 0, sharing ? a.half : a.blocks, x, *state);",
        "a.advance(s, 0, a.half, x, *state);",
        "tests/test_words.py::test_a_row_by_itself_gives_what_it_gives_among_others",
    ),
    "weights of 8 bits: what 128 adds is left in": Breakage(
        "flax_lstm/nn/words.py",
        "table_VGH - excess_GH[None]",
        "table_VGH",
        "tests/test_int8.py::test_the_kernel_multiplies_whole_numbers",
    ),
    "weights of 8 bits: h is cut, not rounded": Breakage(
        "flax_lstm/nn/recurrence/native/int8.h",
        "h * 127.0f + 128.5f",
        "h * 127.0f + 128.0f",
        "tests/test_int8.py::test_the_kernel_multiplies_whole_numbers",
    ),
    "a table of words lacks the bias": Breakage(
        "flax_lstm/nn/words.py",
        "+ weights.bias_GH[None]",
        "",
        "tests/test_words.py::test_tables_give_what_embeddings_give",
    ),
    "a table by rows: words that nobody looked up stay where they are": Breakage(
        "flax_lstm/nn/recurrence/native/table.h",
        "update<true>(a, F, nullptr, p + at, m + at, v + at);",
        "{}",
        "tests/test_tables.py::test_updates_by_rows_are_those_of_adamw",
    ),
    "a table by rows: the global norm forgets the table": Breakage(
        "flax_lstm/training/tables.py",
        "jnp.sqrt(jnp.sum(jnp.square(sums_NF)))[None]",
        "jnp.zeros(1)",
        "tests/test_tables.py::test_updates_by_rows_are_those_of_adamw",
    ),
    "native kernel: shapes are not checked": Breakage(
        "flax_lstm/nn/recurrence/native/binding.cc",
        "if (problem_.empty() && found != wanted",
        "if (false && found != wanted",
        "tests/test_wrong_calls.py::test_the_kernel_itself_refuses_every_wrong_shape",
    ),
    "a reset read backward is one step late": Breakage(
        "flax_lstm/nn/recurrence/rows.py",
        "return jnp.pad(reset_BT[:, 1:], ((0, 0), (0, 1)))",
        "return reset_BT",
        "tests/test_resets.py::test_the_scan_with_resets_is_every_sequence_alone",
    ),
    "NaN in padding passes into gradients": Breakage(
        "flax_lstm/nn/recurrence/rows.py",
        "return jnp.where(valid(lengths_B, x_BTD.shape[1])[..., None], x_BTD, 0)",
        "return x_BTD",
        "tests/test_wrong_calls.py::test_nothing_in_padding_reaches_outputs_or_gradients",
    ),
    "a state is not checked": Breakage(
        "flax_lstm/nn/checks.py",
        "and leaf.shape in (shape.shape, (1, *shape.shape[1:]))",
        "",
        "tests/test_wrong_calls.py::test_500_wrong_calls_are_500_clear_errors",
    ),
    "one gradient for all examples of a vmap": Breakage(
        "flax_lstm/nn/recurrence/primitives.py",
        "sums = tuple(axis is None for axis in self.axes[len(self.axes) - linear :])",
        "sums = (False,) * linear",
        "tests/test_transformations.py::test_equals_that_of_the_scan",
    ),
    "explicit axes: a foreign cell begins with a state that is whole everywhere": Breakage(
        "flax_lstm/nn/layers.py",
        "state, lengths_B, reset_BT = with_rows_of((state, lengths_B, reset_BT), x_BTD)",
        "pass",
        "tests/test_sharding.py::test_explicit_axes_keep_the_rows_where_they_are",
    ),
    "explicit axes: results are whole everywhere": Breakage(
        "flax_lstm/machine/sharding.py",
        "jax.sharding.auto_axes(run, out_sharding=PartitionSpec(spec[0]))",
        "jax.sharding.auto_axes(run, out_sharding=PartitionSpec())",
        "tests/test_sharding.py::test_explicit_axes_keep_the_rows_where_they_are",
    ),
    "the compiler gathers the batch for the kernel": Breakage(
        "flax_lstm/machine/sharding.py",
        "_is_split.set(len(devices) > 1)",
        "_is_split.set(False)",
        "tests/test_transformations.py::test_a_batch_sharded_by_others_is_never_gathered",
    ),
    "a row that ended in an earlier piece outputs zeros": Breakage(
        "flax_lstm/nn/models.py",
        "return self.pool(y_BTH, lengths_B) if end is None else end.astype(y_BTH.dtype)",
        "return self.pool(y_BTH, lengths_B)",
        "tests/test_streams.py::test_rows_that_ended_in_an_earlier_piece_keep_their_last_output",
    ),
    "native kernel: padding changes the state": Breakage(
        "flax_lstm/nn/recurrence/native/kernel.h",
        "[&](long l) { return l > step; }",
        "[&](long l) { return l >= step; }",
        "tests/test_backends.py::test_rows_of_all_lengths_on_every_thread",
    ),
    "native kernel: reverse begins at the padded end": Breakage(
        "flax_lstm/nn/recurrence/native/kernel.h",
        "reverse ? length[r] - 1 - step : step",
        "reverse ? length[0] - 1 - step : step",
        "tests/test_backends.py::test_rows_of_all_lengths_on_every_thread",
    ),
    "native kernel: recurrent dropout forgotten backwards": Breakage(
        "flax_lstm/nn/recurrence/native/kernel.h",
        "t *= load(tied + b * H + unit, left);",
        "",
        "tests/test_backends.py::test_equals_the_scan",
    ),
    "native kernel: gates share the first mask": Breakage(
        "flax_lstm/nn/recurrence/native/kernel.h",
        "return h_in + std::min(g, masks - 1) * masked;",
        "return h_in + 0 * g;",
        "tests/test_keras_masks.py::test_a_layer_draws_the_same_masks_whatever_runs_it",
    ),
    "native kernel: gradients of all gates come back under the last mask": Breakage(
        "flax_lstm/nn/recurrence/native/kernel.h",
        "sum += t * m;",
        "sum = t * m;",
        "tests/test_backends.py::test_equals_the_scan",
    ),
    "native kernel: only the last chunk's gradients": Breakage(
        "flax_lstm/nn/recurrence/native/kernel.h",
        "h_panel[std::min(g, masks - 1)], ldh, panel, steps, true,",
        "h_panel[std::min(g, masks - 1)], ldh, panel, steps, false,",
        "tests/test_backends.py::test_long_sequences",
    ),
    "a run that begins with another makes a vocabulary of its own": Breakage(
        "flax_lstm/data/corpus.py",
        "vocabulary.save(ours / VOCABULARY)",
        "pass",
        "tests/test_init_from.py::test_encoder_embedding_and_vocabulary_come_from_the_other_run",
    ),
    "the weights of --init-from are not taken": Breakage(
        "flax_lstm/training/loop.py",
        "params = params if init_from is None else weights_of(init_from, config, console)",
        "pass",
        "tests/test_init_from.py::test_encoder_embedding_and_vocabulary_come_from_the_other_run",
    ),
    "a row without a text spoils the answers to the others": Breakage(
        "flax_lstm/data/tables.py",
        "if blank and [*frame.columns].count(name) == 1:",
        "if False:",
        "tests/test_examination.py::test_predict_keeps_the_users_columns",
    ),
    "a tag's precision is its recall": Breakage(
        "flax_lstm/tasks/examination.py",
        "(given_NK & has_NK).sum(axis=0), has_NK.sum(axis=0), given_NK.sum(axis=0)",
        "(given_NK & has_NK).sum(axis=0), given_NK.sum(axis=0), has_NK.sum(axis=0)",
        "tests/test_tagging.py::test_each_tag_is_judged_as_scikit_learn_does",
    ),
    "a plain text is one document": Breakage(
        "flax_lstm/data/documents.py",
        'return kind(path) == ".txt" and not path.is_dir()',
        "return False",
        "tests/test_prepared.py::test_a_plain_text_has_a_document_in_each_line",
    ),
    "what wins beside a classifier is the least accurate": Breakage(
        "flax_lstm/runs/report.py",
        '"Classification": ("accuracy", -1),',
        '"Classification": ("accuracy", 1),',
        "tests/test_loop.py::test_a_classifier_that_loses_to_the_linear_model_is_told_what_to_try",
    ),
    "padding is turned round with the row": Breakage(
        "flax_lstm/nn/recurrence/rows.py",
        "jnp.where(t < ends, ends - 1 - t, t)",
        "x_BTD.shape[1] - 1 - t + 0 * ends",
        "tests/test_backwards.py::test_a_model_gives_for_a_row_what_it_would_for_the_turned_row",
    ),
    "documents are read forwards whatever is asked for": Breakage(
        "flax_lstm/data/language.py",
        "-1 if self.backwards else 1",
        "1",
        "tests/test_backwards.py::test_a_language_model_reads_the_same_documents_each_turned_round",
    ),
    "a run begins with one that reads the other way": Breakage(
        "flax_lstm/training/loop.py",
        "theirs == backwards(config)",
        "True",
        "tests/test_backwards.py::test_a_run_that_reads_the_other_way_is_no_beginning",
    ),
    "words are drawn without the temperature": Breakage(
        "flax_lstm/tasks/generation.py",
        "np.exp((logits_V - logits_V.max()) / temperature)",
        "np.exp(logits_V - logits_V.max())",
        "tests/test_generation.py::test_words_are_drawn_as_often_as_the_softmax_says",
    ),
    "a continued text forgets its state": Breakage(
        "flax_lstm/inference.py",
        "reset=np.zeros(1, bool))",
        "reset=np.ones(1, bool))",
        "tests/test_generation.py::test_word_by_word_is_the_whole_text_at_once",
    ),
    "contributions of the word before": Breakage(
        "flax_lstm/tasks/explanation.py",
        "without = [np.delete(ids_T, t) for t",
        "without = [np.delete(ids_T, t - 1) for t",
        "tests/test_explanation.py::test_leaving_a_word_out_is_predicting_without_it",
    ),
    "integrated gradients at the text alone": Breakage(
        "flax_lstm/tasks/explanation.py",
        "sum(gradient(share * x_TE) for share in shares_S) / STEPS",
        "gradient(x_TE)",
        "tests/test_explanation.py::test_integrated_gradients_add_up_to_what_the_embeddings_change",
    ),
    "rows for judgement are weighed": Breakage(
        "flax_lstm/data/text.py",
        'rows["train"] = self._weighed(info, rows["train"], splits["train"].weights)',
        "rows = {n: self._weighed(info, r, splits[n].weights) for n, r in rows.items()}",
        "tests/test_text_data.py::test_rows_weigh_as_said_and_classes_alike_where_balanced",
    ),
    "balanced classes forget the rows' weights": Breakage(
        "flax_lstm/data/text.py",
        "np.bincount(train.labels, weights_N, minlength=len(info.labels))",
        "np.bincount(train.labels, minlength=len(info.labels))",
        "tests/test_text_data.py::test_rows_weigh_as_said_and_classes_alike_where_balanced",
    ),
    "copies of test reviews are trained on": Breakage(
        "flax_lstm/data/imdb.py",
        " if text not in known)",
        ")",
        "tests/test_imdb_data.py::test_no_test_review_reaches_training_or_vocabulary",
    ),
    "the linear model is fitted on the split it is judged on": Breakage(
        "flax_lstm/tasks/linear.py",
        'fit(dataset.read("train"), new)',
        "fit(new, new)",
        "tests/test_examination.py::test_the_result_has_the_linear_model_beside_it",
    ),
    "errors are shown with other rows' texts": Breakage(
        "flax_lstm/tasks/classification.py",
        "order, read = dataset.order(split), dataset.read(split)",
        "order, read = np.arange(dataset.size(split)), dataset.read(split)",
        "tests/test_examination.py::test_evaluate_examines_a_split",
    ),
    "the temperature multiplies": Breakage(
        "flax_lstm/tasks/examination.py",
        "    return 1 / low\n",
        "    return low\n",
        "tests/test_examination.py::test_the_temperature_is_where_the_loss_is_least",
    ),
    "every layer learns at the same rate": Breakage(
        "flax_lstm/training/optim.py",
        "decay**below, 0.0)",
        "1.0, 0.0)",
        "tests/test_optim.py::test_each_level_learns_at_its_share_of_the_rate_once_it_is_thawed",
    ),
    "no layer is frozen at first": Breakage(
        "flax_lstm/training/optim.py",
        "thawed = state.made >= below * unfreeze_every",
        "thawed = state.made >= 0",
        "tests/test_optim.py::test_each_level_learns_at_its_share_of_the_rate_once_it_is_thawed",
    ),
    "candidates not divided by their chance": Breakage(
        "flax_lstm/tasks/sampled_softmax.py",
        "score_NS += (bias_V[among.ids_S] - among.log_chance_S)[None]",
        "score_NS += bias_V[among.ids_S][None]",
        "tests/test_sampled_softmax.py::test_the_denominator_is_right_on_average",
    ),
    "the target counted twice where it is a candidate": Breakage(
        "flax_lstm/tasks/sampled_softmax.py",
        "jnp.where(is_target_NS, -1e30, score_NS)",
        "score_NS",
        "tests/test_sampled_softmax.py::test_the_denominator_is_right_on_average",
    ),
    "evaluation of language models is not bounded": Breakage(
        "flax_lstm/data/language.py",
        "sorted(order[before < settings.evaluation_tokens].tolist())",
        "sorted(order.tolist())",
        "tests/test_language_data.py::test_evaluation_is_bounded_and_training_is_not",
    ),
    "evaluation of language models is sampled": Breakage(
        "flax_lstm/tasks/language.py",
        "lambda step: judge(outputs._replace(features_BTE=step[0]).scores(), step[1]),",
        "lambda step: judge(0 * outputs._replace(features_BTE=step[0]).scores(), step[1]),",
        "tests/test_sampled_softmax.py::test_evaluation_scores_every_word_a_step_at_a_time",
    ),
    "a step-by-step model sees the season of another step": Breakage(
        "flax_lstm/nn/autoregression.py",
        "return jnp.stack([last - kept_PL[:, 0], kept_PL[:, 1] - last], axis=-1)",
        "return jnp.stack([last - kept_PL[:, 1], kept_PL[:, 1] - last], axis=-1)",
        "tests/test_autoregression.py::test_what_is_drawn_is_what_teacher_forcing_gives_for_it",
    ),
    "Student's t without the logarithm of its spread": Breakage(
        "flax_lstm/nn/likelihoods.py",
        "freedom) - jnp.log(\n            spread\n        )",
        "freedom)",
        "tests/test_likelihoods.py::test_students_t_is_scipys",
    ),
    "counts: a quantile that is one too large": Breakage(
        "flax_lstm/nn/likelihoods.py",
        "betainc(size, middle + 1, share)",
        "betainc(size, middle, share)",
        "tests/test_likelihoods.py::test_the_negative_binomial_is_scipys",
    ),
    "a cutoff lets one more row be known": Breakage(
        "flax_lstm/data/series.py",
        "known = np.asarray(times <= stamp)",
        "known = np.roll(np.asarray(times <= stamp), 1) | np.asarray(times <= stamp)",
        "tests/test_autoregression.py::test_cutoffs_give_the_forecasts_of_what_was_known",
    ),
    "the highway sees values, not what they are relative to": Breakage(
        "flax_lstm/nn/segments.py",
        "self._highway(x_BTC, relative_BTC)",
        "self._highway(x_BTC, x_BTC)",
        "tests/test_models.py::test_the_highway_adds_a_linear_forecast_of_the_look_back",
    ),
    "the highway sees nothing of the last season": Breakage(
        "flax_lstm/nn/segments.py",
        "last_BSC = x_BTC[:, -season:] - x_BTC[:, -1:]",
        "last_BSC = x_BTC[:, -season:] - x_BTC[:, -season:]",
        "tests/test_models.py::test_the_highway_can_make_the_last_value_of_the_last_season",
    ),
    "a sparse highway reads the first seasons of a look-back": Breakage(
        "flax_lstm/nn/segments.py",
        "x_BCT = x_BCT[..., x_BCT.shape[-1] % season :]",
        "x_BCT = x_BCT[..., : x_BCT.shape[-1] - x_BCT.shape[-1] % season]",
        "tests/test_models.py::test_a_sparse_highway_has_one_rule_for_all_steps_of_a_season",
    ),
    "queries see the look-back in any case": Breakage(
        "flax_lstm/nn/segments.py",
        "if self.highway_seen:",
        "if self:",
        "tests/test_models.py::test_queries_can_be_kept_from_seeing_the_look_back",
    ),
    "a sparse highway is passed over without a highway": Breakage(
        "flax_lstm/nn/segments.py",
        "self.highway or not self.highway_sparse",
        "True",
        "tests/test_models.py::test_a_sparse_highway_is_refused_without_a_highway_or_a_season_to_"
        "read",
    ),
    "few series are validated on one origin": Breakage(
        "flax_lstm/data/panel.py",
        "max(wanted, horizon)",
        "horizon",
        "tests/test_panel_data.py::test_few_series_are_validated_on_many_origins",
    ),
    "any season of a frequency is one of the series": Breakage(
        "flax_lstm/data/series.py",
        "fits = 2 * natural.season <= lookback and repeats(natural.season)",
        "fits = 2 * natural.season <= lookback",
        "tests/test_series_data.py::test_the_season_of_a_frequency_is_taken_only_where_it_repeats",
    ),
    "a level that wanders looks like a season": Breakage(
        "flax_lstm/data/series.py",
        "change_R = np.diff(value_R)",
        "change_R = value_R",
        "tests/test_series_data.py::test_the_season_of_a_frequency_is_taken_only_where_it_repeats",
    ),
    "channels are told apart in any case": Breakage(
        "flax_lstm/nn/segments.py",
        "if not self.apart:",
        "if not self:",
        "tests/test_models.py::test_channels_that_are_not_told_apart_follow_one_rule",
    ),
    "with a highway the forecast begins anywhere": Breakage(
        "flax_lstm/nn/segments.py",
        "initial = nn.initializers.zeros if self.highway else GLOROT",
        "initial = GLOROT",
        "tests/test_models.py::test_with_a_highway_training_begins_at_the_naive_forecast",
    ),
    "short series are given a look-back without a season": Breakage(
        "flax_lstm/data/series.py",
        "room = max(room, two_seasons)",
        "room = max(room, 1)",
        "tests/test_panel_data.py::test_a_look_back_holds_two_seasons_where_the_rows_allow_it",
    ),
    "a number of a series may be absent": Breakage(
        "flax_lstm/data/series.py",
        "bool(column.categories) or len(absent) == 0",
        "bool(column.categories) or True",
        "tests/test_hostile_tables.py::test_a_panel_is_refused_with_a_reason",
    ),
    "all weeks go on from the day of training": Breakage(
        "flax_lstm/data/grid.py",
        'if self.unit == "W" and time',
        "if not time",
        "tests/test_hostile_tables.py::test_a_panel_is_read_right",
    ),
    "a frequency is the median where more is missing": Breakage(
        "flax_lstm/data/grid.py",
        "if counts.max() > len(steps) / 5:",
        "if False:",
        "tests/test_hostile_tables.py::test_a_panel_is_read_right",
    ),
    "holidays of the first year alone": Breakage(
        "flax_lstm/data/covariates.py",
        "years=sorted(set(times.year))",
        "years=[times.year[0]], expand=False",
        "tests/test_series_data.py::test_holidays_are_known_in_advance",
    ),
    "ETS knows the first value to forecast": Breakage(
        "flax_lstm/tasks/statistical.py",
        "buffer.values_RD[begin:first, :channels]",
        "buffer.values_RD[begin : first + 1, :channels]",
        "tests/test_backtest.py::test_statistical_models_know_what_was_before_their_origin",
    ),
    "the linear forecast is judged on another split": Breakage(
        "flax_lstm/tasks/forecasting.py",
        "for batch in dataset.evaluation(split, 256):",
        'for batch in dataset.evaluation("train", 256):',
        "tests/test_backtest.py::test_figures_over_all_origins_are_those_of_evaluate",
    ),
    "a value that no figure could hold is let through": Breakage(
        "flax_lstm/data/measures.py",
        "far_RD = np.abs(scaled_RD) > FARTHEST",
        "far_RD = np.abs(scaled_RD) > np.inf",
        "tests/test_bad_values.py::test_a_number_that_no_figure_could_hold_is_told_by_column_and_"
        "row",
    ),
    "a spread whose square is 0 divides": Breakage(
        "flax_lstm/data/measures.py",
        "constant = np.ptp(known) <= SMALLEST",
        "constant = np.ptp(known) == 0",
        "tests/test_bad_values.py::test_a_spread_in_training_that_float64_cannot_square_is_none",
    ),
    "damage within a gzip file is not told": Breakage(
        "flax_lstm/data/tables.py",
        "except (gzip.BadGzipFile, EOFError, zlib.error) as error:",
        "except gzip.BadGzipFile as error:",
        "tests/test_bad_values.py::test_every_damage_to_a_compressed_file_is_told",
    ),
    "a gzip bomb inflates to its end": Breakage(
        "flax_lstm/data/tables.py",
        "require(size < BOMB * packed,",
        "require(True,",
        "tests/test_bad_values.py::test_what_inflates_without_end_is_refused_before_it_fills_the_"
        "memory",
    ),
    "half a character reaches a label": Breakage(
        "flax_lstm/data/tables.py",
        'return str(value).strip().encode(errors="replace").decode()',
        "return str(value).strip()",
        "tests/test_bad_values.py::test_half_a_character_becomes_a_question_mark",
    ),
    "a column of the user's own is lost": Breakage(
        "flax_lstm/tasks/base.py",
        "        names[name] = own\n",
        "        names[name] = name\n",
        "tests/test_bad_values.py::test_the_users_columns_are_kept_whatever_they_are_called",
    ),
    "predictions replace their input": Breakage(
        "flax_lstm/commands/tables.py",
        "require(not same,",
        "require(True,",
        "tests/test_bad_values.py::test_outputs_that_cannot_be",
    ),
    "a draft is called by the whole name": Breakage(
        "flax_lstm/machine/files.py",
        'f".{secrets.token_hex(8)}.part"',
        'f".{secrets.token_hex(8)}.{path.name}.part"',
        "tests/test_full_disk.py::test_a_draft_goes_with_the_writer_that_fails",
    ),
    "a seed of 33 bits": Breakage(
        "flax_lstm/config.py",
        'within("seed", self.seed, 0, 2**32 - 1)',
        'within("seed", self.seed, 0, 2**33 - 1)',
        "tests/test_bad_values.py::test_seeds_that_jax_would_take_for_one_another_are_refused",
    ),
    "layers without end": Breakage(
        "flax_lstm/nn/models.py",
        'within("model.num-layers", self.num_layers, 1, LAYERS)',
        'within("model.num-layers", min(self.num_layers, LAYERS), 1)',
        "tests/test_bad_values.py::test_settings_have_bounds",
    ),
    "what does not fit into memory is tried": Breakage(
        "flax_lstm/training/room.py",
        "        stored + kept <= free,",
        "        True,",
        "tests/test_bad_values.py::test_what_does_not_fit_into_memory_is_refused_before_it_is_"
        "allocated",
    ),
    "the limit of a container does not count": Breakage(
        "flax_lstm/machine/memory.py",
        "*map(_of_group, _groups())",
        "UNLIMITED",
        "tests/test_bad_values.py::test_the_limit_of_a_container_counts",
    ),
}


def copy_tree(folder: Path) -> None:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)


def run_tests(folder: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n0",
        "--no-header",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, check=False
    )


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was printed"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a breakage, or a part of its name; all without"
    )
    asked = parser.parse_args().names
    chosen = {n: b for n, b in BREAKAGES.items() if not asked or any(part in n for part in asked)}
    if not chosen:
        parser.error(f"no such breakage; known: {', '.join(BREAKAGES)}")
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_tree(folder)
        before = run_tests(folder, sorted({breakage.test for breakage in chosen.values()}))
        if before.returncode:
            print(f"{before.stdout}{before.stderr}\nred before anything was broken")
            return 1
        print(f"before: {last_line(before.stdout)}", flush=True)
        for name, (file, old, new, test) in chosen.items():
            path, text = folder / file, (ROOT / file).read_text()
            if text.count(old) != 1:
                print(
                    f"STALE  {name}: its text occurs {text.count(old)} times in {file}", flush=True
                )
                survivors += 1
                continue
            path.write_text(text.replace(old, new))
            after = run_tests(folder, [test])
            path.write_text(text)
            noticed = after.returncode == 1  # 2 and above: the test was not there, or not run
            survivors += not noticed
            print(
                f"{'red   ' if noticed else 'GREEN '} {name}: "
                f"{last_line(after.stdout + after.stderr)}",
                flush=True,
            )
    print(f"{len(chosen) - survivors} of {len(chosen)} breakages were noticed")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
