"""Optimizer and schedule. Only leaves with the label "train" have state and change."""

from __future__ import annotations

from typing import Any

import optax

from prefix_jax.config import OptimConfig
from prefix_jax.train.partition import part_of


def make_schedule(config: OptimConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """Makes the learning-rate schedule: linear warmup, then `config.schedule`.

    Args:
        config: the name of the schedule, its peak, warmup and decay.
        steps: optimizer steps of the whole run, at which "linear" and "cosine" reach 0.
        peak: the peak learning rate; None uses `config.learning_rate`.
    """
    peak, warmup = config.learning_rate if peak is None else peak, config.warmup_steps
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "exponential": optax.exponential_decay(
            peak, config.decay_every or 1, config.decay, staircase=True
        ),
    }[config.schedule]
    if warmup == 0:
        return after
    # The first step already has an effect: step 0 of the warmup has 1/warmup of the peak.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: OptimConfig,
    schedule: optax.Schedule,
    labels: Any,
    head_schedule: optax.Schedule | None = None,
) -> optax.GradientTransformation:
    """Makes the optimizer of the whole tree, with zero updates for frozen leaves.

    Clipping is inside the "train" branch: a norm over all gradients would make XLA compute those of
    every frozen weight. A prefix and a head share one norm, as with
    `torch.nn.utils.clip_grad_norm_` over all trained parameters.

    Args:
        config: the update rule.
        schedule: the learning rate.
        labels: the labels of all leaves, see `partition.labels`.
        head_schedule: the learning rate of a head; None uses `schedule`.
    """
    update = _rule(config, schedule)
    if head_schedule is not None:
        update = optax.multi_transform(
            {"prefix": update, "head": _rule(config, head_schedule)}, part_of
        )
    if config.clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    return optax.multi_transform({"train": update, "freeze": optax.set_to_zero()}, labels)


def _rule(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    if config.name == "adamw":
        return optax.adamw(
            schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay
        )
    # Adafactor as in prompt tuning (Lester et al. 2021): without parameter scaling, and with
    # unfactored second moments, because a prefix is small. `optax.adafactor` would apply
    # `weight_decay` without the learning rate.
    return optax.chain(
        optax.scale_by_factored_rms(factored=False, decay_rate=0.8),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
