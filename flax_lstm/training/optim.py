# SPDX-License-Identifier: Apache-2.0
"""Optimisers and learning-rate schedules, all from optax."""

from collections.abc import Callable
from typing import Any

import jax
import optax

Schedule = Callable[[Any], Any]  # step -> learning rate


def learning_rate(kind: str, peak: float, warmup_steps: int, steps: int) -> Schedule:
    """Linear warm-up to `peak`, then constant, or a cosine to 0 at `steps` (Loshchilov & Hutter
    2017). For "plateau" the schedule is constant, and the optimiser scales it as the training loss
    stalls."""
    if kind == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup_steps, 1))
    else:
        after = optax.constant_schedule(peak)
    if not warmup_steps:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps]
    )


def decayed(params: Any) -> Any:
    """True for the weights that weight decay acts on: all but biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "bias" not in str(path[-1]), params)


def make_optimizer(
    name: str,
    schedule: Schedule,
    weight_decay: float,
    clip: float,
    plateau_steps: int = 0,
    epsilon: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """AdamW (Loshchilov & Hutter 2019), SGD with momentum 0.9, or Adafactor (Shazeer & Stern 2018),
    after clipping by the global norm. With `plateau_steps`, the step is halved whenever the mean
    loss over that many steps has not improved three times running. `epsilon` is AdamW's: added to
    the root of the mean squared gradient, it keeps gradients much smaller than itself from being
    scaled up, such as those of words far from the end of a sequence."""
    parts: list[optax.GradientTransformation] = []
    if clip:
        parts.append(optax.clip_by_global_norm(clip))
    if name == "adamw":
        parts.append(optax.adamw(schedule, eps=epsilon, weight_decay=weight_decay, mask=decayed))
    elif name == "sgd":
        parts += [
            optax.add_decayed_weights(weight_decay, mask=decayed),
            optax.sgd(schedule, momentum=0.9),
        ]
    else:
        parts.append(
            optax.adafactor(
                schedule, weight_decay_rate=weight_decay or None, weight_decay_mask=decayed
            )
        )
    if plateau_steps:
        parts.append(
            optax.contrib.reduce_on_plateau(factor=0.5, patience=3, accumulation_size=plateau_steps)
        )
    return optax.with_extra_args_support(optax.chain(*parts))


def plateau_scale(opt_state: Any) -> Any:
    """By how much the plateau schedule scales the learning rate now; 1 without one."""
    found = [s.scale for s in opt_state if isinstance(s, optax.contrib.ReduceLROnPlateauState)]
    return found[0] if found else 1.0
