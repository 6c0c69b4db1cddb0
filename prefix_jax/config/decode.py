"""The `decode` section: generation settings."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from prefix_jax.validation import (
    Fraction,
    Interval,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
    Size,
    check_conditions,
    check_fields,
    renamed,
)

# Beams times vocabulary must fit 32 bits, and searches rarely gain from more than ten beams.
_Beams = Annotated[int, Interval(ge=1, le=1024)]
# Every sample of a prompt is a row of the batch.
_Samples = Annotated[int, Interval(ge=1, le=4096)]
# Lengths to a higher power overflow float32.
_LengthPenalty = Annotated[float, Interval(ge=-5, le=5)]
# Defaults of the fields that only beam search reads.
_BEAM_SEARCH = {"length_penalty": 1.0, "early_stopping": False}


@renamed(beams="num_beams", samples="num_samples", no_repeat_ngram="no_repeat_ngram_size")
@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Generation settings. A checkpoint's `generation_config.json` does not change these defaults;
    only its end tokens and forced tokens are used.

    Attributes:
        max_new_tokens: maximum number of generated tokens, not counting the start token of an
            encoder-decoder.
        min_new_tokens: number of tokens before which a text cannot end.
        num_beams: width of beam search; 1 turns it off.
        length_penalty: the score of a finished beam is its log-probability divided by its length to
            this power, between -5 and 5. Requires `num_beams` above 1, as does `early_stopping`.
        early_stopping: when beam search stops, as in transformers: with true, once `num_beams`
            hypotheses have finished; with false, once the best running beam scores no better than
            the worst of them; with "never", once it could not even at its best possible length.
        temperature: divisor of the logits for sampling; 0 decodes greedily.
        top_k: sample from this many of the most probable tokens; None is off. Requires a
            temperature above 0, as do `top_p` and `min_p`.
        top_p: sample from the most probable tokens that together reach this probability (nucleus
            sampling, Holtzman et al. 2020); None is off.
        min_p: drop tokens below this fraction of the highest probability; None is off.
        repetition_penalty: divides positive and multiplies negative logits of tokens that have
            occurred (Keskar et al. 2019); 1 is off.
        no_repeat_ngram_size: length of n-grams that may not occur twice; 0 is off.
        banned_words: texts that are never generated.
        stop: texts that end the generation; they are removed from the result.
        num_samples: continuations per prompt.
        seed: seed for sampling. The samples for a record also depend on its position in the file.
    """

    max_new_tokens: Size = 64
    min_new_tokens: Annotated[int, Interval(ge=0, le=2**20)] = 0
    num_beams: _Beams = 1
    length_penalty: _LengthPenalty = 1.0
    early_stopping: bool | Literal["never"] = False
    temperature: NonNegativeFloat = 0.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Interval(gt=0, le=1)] | None = None
    min_p: Fraction | None = None
    repetition_penalty: PositiveFloat = 1.0
    no_repeat_ngram_size: Annotated[int, Interval(ge=0, le=1024)] = 0
    banned_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    num_samples: _Samples = 1
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        sampling = self.temperature > 0
        for_beams = [name for name in _BEAM_SEARCH if getattr(self, name) != _BEAM_SEARCH[name]]
        for_sampling = [n for n in ("top_k", "top_p", "min_p") if getattr(self, n) is not None]
        defaults = ", ".join(f"{name}: {str(_BEAM_SEARCH[name]).lower()}" for name in for_beams)
        check_conditions(
            (
                self.min_new_tokens <= self.max_new_tokens,
                f"min_new_tokens {self.min_new_tokens} exceeds "
                f"max_new_tokens {self.max_new_tokens}",
            ),
            (
                not (sampling and self.num_beams > 1),
                "beam search does not sample; set either num_beams or temperature",
            ),
            (
                sampling or not for_sampling,
                f"set a temperature above 0 to use {', '.join(for_sampling)}",
            ),
            (
                self.num_beams > 1 or not for_beams,
                f"set num_beams above 1 to use {', '.join(for_beams)}, got {self.num_beams}; or "
                f"keep the default {defaults}",
            ),
            (
                sampling or self.num_samples <= self.num_beams,
                f"num_samples {self.num_samples} would be identical without sampling; set a "
                f"temperature above 0, or num_beams to at least {self.num_samples}",
            ),
            (
                "" not in (*self.stop, *self.banned_words),
                "stop and banned_words must not contain an empty text",
            ),
        )
