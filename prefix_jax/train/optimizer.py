"""Optimizer and schedule. Only the leaves labelled "train" have state, and move."""

from __future__ import annotations

from typing import Any

import optax

from prefix_jax.config import OptimConfig


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate by optimizer step: linear warmup, then `config.schedule`.

    Args:
        config: the schedule's name, peak and warmup.
        steps: of the whole run; linear and cosine reach 0 there.
    """
    peak, warmup = config.learning_rate, config.warmup
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if warmup == 0:
        return after
    # The first step already moves: step 0 of `warmup` steps has 1/warmup of the peak.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule, labels: Any
) -> optax.GradientTransformation:
    """The optimizer of the whole tree: a zero update on whatever is frozen.

    Clipping stands inside the "train" branch. A norm over all gradients would make XLA compute
    every frozen weight's, which nothing else asks for.
    """
    if config.name == "adamw":
        update = optax.adamw(
            schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay
        )
    else:
        # Prompt tuning's Adafactor (Lester et al. 2021): no parameter scaling, and second moments
        # unfactored, since a prefix is small. `optax.adafactor` would decay weights by
        # `weight_decay` itself, whatever the learning rate.
        update = optax.chain(
            optax.scale_by_factored_rms(factored=False),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
    if config.clip is not None:
        update = optax.chain(optax.clip_by_global_norm(config.clip), update)
    return optax.multi_transform({"train": update, "freeze": optax.set_to_zero()}, labels)
