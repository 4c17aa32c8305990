"""Which text tokens name the subject: the words the user gave, found in the prompt's own tokens."""

from collections.abc import Sequence
from typing import Any

from genattn.errors import GenAttnError


def subject_tokens(
    tokenizer: Any, prompt: str, subject: str | Sequence[str] | None, max_length: int | None = None
) -> list[int]:
    """Positions of the subject's tokens in the padded prompt, rising.

    subject: words that stand in the prompt, or several; None takes the whole prompt without special tokens.
    """
    limit = max_length or getattr(tokenizer, "model_max_length", None)
    ids = tokenizer(prompt, truncation=limit is not None, max_length=limit).input_ids
    special = set(tokenizer.all_special_ids)
    if subject is None:
        return [i for i, token in enumerate(ids) if token not in special]
    found: set[int] = set()
    for words in [subject] if isinstance(subject, str) else subject:
        spots = _spots(tokenizer, ids, words, special)
        if not spots:
            raise GenAttnError(f"the subject must stand in the prompt as it is written there; {words!r} is not in {prompt!r}")
        found.update(spots)
    return sorted(found)


def _spots(tokenizer: Any, ids: Sequence[int], words: str, special: set[int]) -> set[int]:
    # a word has other tokens at the start of a text than within it, so both spellings are looked for
    for spelling in (words, f" {words}"):
        wanted = [t for t in tokenizer(spelling, add_special_tokens=False).input_ids if t not in special]
        if not wanted:
            continue
        starts = [i for i in range(len(ids) - len(wanted) + 1) if list(ids[i : i + len(wanted)]) == wanted]
        if starts:
            return {i + j for i in starts for j in range(len(wanted))}
    return set()
