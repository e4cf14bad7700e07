"""What the model says at every evaluation: one short text, drawn so that training never notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from niels_gpt.chat import system_prompt
from niels_gpt.chat_format import chat_format_for
from niels_gpt.data.types import Message
from niels_gpt.infer.sampling import Sampling
from niels_gpt.infer.steps import stream_steps
from niels_gpt.model.gpt import GPT
from niels_gpt.rng import generator_for
from niels_gpt.settings import PhaseSettings, Settings
from niels_gpt.tokenizer import Tokenizer
from niels_gpt.train.memory import is_out_of_memory


@dataclass(frozen=True)
class Sample:
    """What was asked of the model and what it said."""

    prompt: str
    text: str


def sampler_for(phase: str, settings: Settings, tokenizer: Tokenizer) -> Callable[[GPT], Sample | None] | None:
    """A function that continues (pretrain) or answers (sft) the phase's `sample_prompt`; None if that is null.

    Pretraining samples as `settings.generation` says, with the same seed every time: the likeliest continuation of a
    young model is one word again and again. Fine-tuning takes the likeliest reply.
    """
    options: PhaseSettings = getattr(settings.training, phase)
    prompt = options.sample_prompt
    if prompt is None:
        return None
    chat = chat_format_for(tokenizer)
    sampling = Sampling.of(settings.generation) if phase == "pretrain" else Sampling(temperature=0.0)
    ids = tokenizer.encode(prompt) if phase == "pretrain" else _question(prompt, tokenizer, settings, options)

    def sample(model: GPT) -> Sample | None:
        if not ids:
            return None
        try:
            steps = stream_steps(
                model,
                ids,
                max_new_tokens=options.sample_tokens,
                sampling=sampling,
                generator=generator_for(options.seed, "sample"),
                stop_ids=chat.stop_ids,
                banned_ids=chat.banned_ids,
                tokenizer=tokenizer,
            )
            return Sample(prompt, "".join(step.text for step in steps))
        except (ValueError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            return Sample(prompt, f"({error})")  # a model that diverged, or no memory: nothing to end a run for

    return sample


def _question(prompt: str, tokenizer: Tokenizer, settings: Settings, options: PhaseSettings) -> list[int]:
    """Ids of one chat turn, with the system prompt that a chat would have if it fits; [] if not even the turn does."""
    chat, asked = chat_format_for(tokenizer), Message("user", prompt)
    for messages in ([Message("system", system_prompt()), asked], [asked]):
        try:
            return chat.encode_prompt(messages, context=settings.model.T, max_new_tokens=options.sample_tokens).ids
        except ValueError:
            continue
    return []
