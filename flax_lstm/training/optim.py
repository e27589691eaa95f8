# SPDX-License-Identifier: Apache-2.0
"""Optimisers and learning-rate schedules, all from optax."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_lstm.errors import listing, require

Schedule = Callable[[Any], Any]  # step -> learning rate
Parts = list[optax.GradientTransformation]  # one after the other


def cooldown(peak: float, steps: int) -> Schedule:
    """Constant, then linearly to 0 in the last fifth of the steps (Haegele et al. 2024): until that
    begins, a run does not depend on how long it will be, and can be given more steps."""
    last = max(steps // 5, 1)
    down = optax.linear_schedule(peak, 0.0, last)
    return optax.join_schedules([optax.constant_schedule(peak), down], [steps - last])


# What follows the warm-up, from its peak over so many steps. "plateau" is constant: the optimiser
# scales it as the training loss stalls.
SCHEDULES: dict[str, Callable[[float, int], Schedule]] = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "cooldown": cooldown,
    "cosine": optax.cosine_decay_schedule,
    "plateau": lambda peak, steps: optax.constant_schedule(peak),
}


def learning_rate(kind: str, peak: float, warmup_steps: int, steps: int) -> Schedule:
    """Linear warm-up to `peak`, then constant, a cosine to 0 at `steps` (Loshchilov & Hutter 2017),
    or a `cooldown` to 0 there. Raises UserError for a kind that is none of `SCHEDULES`."""
    require(kind in SCHEDULES, f"train.schedule {kind}: choose one of {listing(SCHEDULES)}")
    after = SCHEDULES[kind](peak, max(steps - warmup_steps, 1))
    if not warmup_steps:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps]
    )


def decayed(params: Any) -> Any:
    """True for the weights that weight decay acts on: all but biases, and what is counted of
    n-grams."""

    def learnt(path: tuple[Any, ...], _: Any) -> bool:
        return not any(name in str(path[-1]) for name in ("bias", "ratios", "checks"))

    return jax.tree_util.tree_map_with_path(learnt, params)


def levels_below_head(params: Any) -> Any:
    """How far below the head each weight works: 0 for the head and all else that is neither a
    recurrent layer nor the embedding, 1 for the last recurrent layer, ..., most for the
    embedding."""

    def height(path: tuple[Any, ...]) -> int | None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if layer := re.search(r"(?:^|/)layers_(\d+)/", name):
            return int(layer[1]) + 1
        return 0 if re.search(r"(?:^|/)embed/", name) else None

    found = [height(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    top = max((level for level in found if level is not None), default=-1) + 1

    def below(path: tuple[Any, ...], _: Any) -> int:
        level = height(path)
        return 0 if level is None else top - level

    return jax.tree_util.tree_map_with_path(below, params)


class Updates(NamedTuple):
    """How many updates were made."""

    made: jax.Array


def by_level(decay: float, unfreeze_every: int) -> optax.GradientTransformation:
    """Updates of a weight that works n levels below the head, times decay ** n (discriminative
    fine-tuning), and 0 in the first n `unfreeze_every` steps (gradual unfreezing): Howard & Ruder
    2018, sections 3.2 and 3.3."""

    def update(updates: Any, state: Updates, params: Any = None) -> tuple[Any, Updates]:
        def scale(update: jax.Array, below: int) -> jax.Array:
            thawed = state.made >= below * unfreeze_every
            return update * jnp.where(thawed, decay**below, 0.0).astype(update.dtype)

        scaled = jax.tree.map(scale, updates, levels_below_head(updates))
        return scaled, Updates(state.made + 1)

    return optax.GradientTransformation(lambda _: Updates(jnp.zeros((), jnp.int32)), update)


def keeping(parts: Sequence[str]) -> optax.GradientTransformation:
    """No update for the weights of these parts of the model. Raises UserError, at the first state,
    for a part that it does not have."""

    def init(params: Any) -> optax.EmptyState:
        for part in parts:
            require(
                part in params,
                f"train.frozen {part}: the model has no such part; its parts: {listing(params)}",
            )
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        zeros = {part: jax.tree.map(jnp.zeros_like, updates[part]) for part in parts}
        return {**updates, **zeros}, state

    return optax.GradientTransformation(init, update)


def adamw(schedule: Schedule, weight_decay: float, epsilon: float) -> Parts:
    """Loshchilov & Hutter 2019. `epsilon` is added to the root of the mean squared gradient: it
    keeps gradients much smaller than itself from being scaled up, such as those of words far from
    the end of a sequence."""
    return [optax.adamw(schedule, eps=epsilon, weight_decay=weight_decay, mask=decayed)]


def sgd(schedule: Schedule, weight_decay: float, epsilon: float) -> Parts:
    """With momentum 0.9."""
    return [
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.sgd(schedule, momentum=0.9),
    ]


def adafactor(schedule: Schedule, weight_decay: float, epsilon: float) -> Parts:
    """Shazeer & Stern 2018."""
    rate = weight_decay or None
    return [optax.adafactor(schedule, weight_decay_rate=rate, weight_decay_mask=decayed)]


OPTIMIZERS: dict[str, Callable[[Schedule, float, float], Parts]] = {
    "adamw": adamw,
    "sgd": sgd,
    "adafactor": adafactor,
}


def make_optimizer(
    name: str,
    schedule: Schedule,
    weight_decay: float,
    clip: float,
    plateau_steps: int = 0,
    epsilon: float = 1e-8,
    layer_decay: float = 1.0,
    unfreeze_every: int = 0,
    frozen: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """One of `OPTIMIZERS`, after clipping by the global norm. With `plateau_steps`, the step is
    halved whenever the mean loss over that many steps has not improved three times running.
    `epsilon` is AdamW's. For `layer_decay` and `unfreeze_every` see `by_level`, for `frozen`
    `keeping`."""
    require(name in OPTIMIZERS, f"train.optimizer {name}: choose one of {listing(OPTIMIZERS)}")
    # Before all others, so that the norm is that of the weights that learn, and after them, for
    # weight decay needs no gradient.
    kept: Parts = [keeping(frozen)] if frozen else []
    parts: Parts = [*kept]
    if clip:
        parts.append(optax.clip_by_global_norm(clip))
    parts += OPTIMIZERS[name](schedule, weight_decay, epsilon)
    if layer_decay != 1 or unfreeze_every:
        parts.append(by_level(layer_decay, unfreeze_every))
    parts += kept
    if plateau_steps:
        parts.append(
            optax.contrib.reduce_on_plateau(factor=0.5, patience=3, accumulation_size=plateau_steps)
        )
    return optax.with_extra_args_support(optax.chain(*parts))


def of_plateau(path: Any, _: Any) -> bool:
    return getattr(path[-1], "tuple_name", "") == "ReduceLROnPlateauState"


def plateau_scale(opt_state: Any) -> Any:
    """By how much the plateau schedule scales the learning rate now; 1 without one."""
    return optax.tree.get(opt_state, "scale", 1.0, filtering=of_plateau)
