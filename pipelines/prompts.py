"""Sentences of a call: one or one each, or by time span, as text states for every frame."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

#: A sentence, or sentences by the second from which each holds (the first key is 0).
Prompt = str | Mapping[float, str]

Item = TypeVar("Item")


def one_or_each(
    name: str, items: Sequence[Item], batch: int, times: int, of: str = "videos"
) -> list[Item]:
    """Spread entries over videos: one for all or one each, then each ``times`` times in a row.

    Raises:
        ValueError: ``items`` holds neither one nor ``batch`` entries; named ``name``.
    """
    if len(items) not in (1, batch):
        raise ValueError(
            f"{name} holds {len(items)} entries for {batch} {of}; give one for all or one each"
        )
    full = list(items) * batch if len(items) == 1 else items
    return [item for item in full for _ in range(times)]


def as_prompts(prompt: Any) -> list[Prompt]:
    """One prompt or a list of them as a list, each checked."""
    prompts = [prompt] if isinstance(prompt, str | Mapping) else list(prompt)
    if not prompts:
        raise ValueError("prompt must hold at least one sentence, got an empty list")
    for item in prompts:
        spans_of(item)
    return prompts


def as_sentences(name: str, given: str | Sequence[str] | None) -> list[str]:
    """A sentence or a list of them as a list; the empty sentence when None."""
    sentences = [given or ""] if given is None or isinstance(given, str) else list(given)
    if not sentences or not all(isinstance(item, str) for item in sentences):
        raise ValueError(f"{name} must be a sentence or a list of sentences, got {given!r}")
    return sentences


def spans_of(prompt: Any) -> list[tuple[float, str]]:
    """A prompt as (from second, sentence), in order.

    Raises:
        ValueError: neither a sentence nor a mapping of sentences that begins at second 0.
    """
    if isinstance(prompt, str):
        return [(0.0, prompt)]
    if isinstance(prompt, Mapping) and all(isinstance(text, str) for text in prompt.values()):
        try:
            spans = sorted((float(start), text) for start, text in prompt.items())
        except (TypeError, ValueError):
            spans = []
        if spans and spans[0][0] == 0:
            return spans
    raise ValueError(
        "a prompt is a sentence or a mapping from seconds to sentences that begins at 0, got "
        f"{prompt!r}"
    )


def check_embeds(name: str, states: Tensor) -> None:
    """Raise ValueError unless ``states`` are raw text states (B, L, D)."""
    if not isinstance(states, Tensor) or states.ndim != 3:
        given = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise ValueError(f"{name} must be (B, L, D), got {given}")


@dataclass
class TextStates:
    """Raw text states of a call, and which video reads which of them when.

    Args:
        states: (U, L, D), one row a distinct sentence.
        spans: for every video, (from second, row of ``states``), in order.
        negative: (B, L, D) of the unconditional branch; None without guidance.
    """

    states: Tensor
    spans: list[list[tuple[float, int]]]
    negative: Tensor | None = None

    @classmethod
    def of_prompts(
        cls, prompts: Sequence[Prompt], encode: Callable[[list[str]], Tensor]
    ) -> "TextStates":
        """Encode the sentences of B prompts, each distinct one once."""
        timed = [spans_of(prompt) for prompt in prompts]
        distinct = list(dict.fromkeys(text for item in timed for _, text in item))
        spans = [[(start, distinct.index(text)) for start, text in item] for item in timed]
        return cls(encode(distinct), spans)

    @classmethod
    def of_embeds(cls, states: Tensor) -> "TextStates":
        """Given states (B, L, D), one row a video, over its whole length."""
        return cls(states, [[(0.0, row)] for row in range(len(states))])

    def rows(self, first: int, last: int, fps: Sequence[float]) -> Tensor:
        """Row of ``states`` that holds for every video in frames ``first`` to ``last``: (B, T).

        Args:
            first: number of the first frame, which is shown at ``first / fps`` seconds.
            last: number after the last frame.
            fps: frames per second of every video.
        """
        rows = torch.zeros(len(self.spans), last - first, dtype=torch.long)
        for index, spans in enumerate(self.spans):
            seconds = torch.arange(first, last, dtype=torch.float64) / fps[index]
            for start, row in spans:
                rows[index, seconds >= start - 1e-9] = row
        return rows
