"""Joint attention for both texts at the cost of one more text: the image looks at itself once.

    image on image     once, by whatever pattern and backend there is, with its log-sum-exp
    image on text      a few keys, for either text
    text               each its own, on its own text and the image

and the image's answers beside either text are merged by log-sum-exp. Where nobody tells a log-sum-exp (flash, sage, xformers
behind diffusers' dispatch, a plugin that edits the answer), `answer.joint` asks twice instead.
"""

from dataclasses import replace

import torch

from genattn.functional.log_sum_exp import attention_with_lse, merged
from genattn.geometry.token_layout import TokenLayout
from genattn.guidance.nag.cut import Cut, pick, pick_mask
from genattn.seam.plugin import AttentionCall, CallRecord, Inner

Pair = tuple[torch.Tensor, torch.Tensor]


def shared_answers(call: AttentionCall, inner: Inner, cut: Cut) -> Pair | None:
    """(answer for the positive sequence, answer for the negative one), each in the model's order; None where it cannot be.

    Args:
        call: the call on the carried sequence, all of it on this process.
        inner: the rest of the chain.
        cut: where the texts stand.
    """
    stock, negative = cut.stock(), cut.negative()
    image = stock[cut.image_rows()[0]]
    itself = _on_itself(call, inner, cut, _part(call, image, image))
    if itself is None:
        return None
    first = _beside(call, stock, cut.image_rows()[0], itself)
    second = _beside(call, negative, cut.image_rows()[1], itself)
    return first, second


def shared_keys(call: AttentionCall, inner: Inner, cut: Cut) -> Pair | None:
    """The same where the image alone asks: its answers beside either text, [B, S, H, D] each; None where it cannot be.

    Args:
        call: the image's queries on a sequence that carries both texts.
        inner: the rest of the chain.
        cut: where the texts stand.
    """
    stock, negative = cut.stock(), cut.negative()
    rows = torch.arange(call.query.shape[1])
    itself = _on_itself(call, inner, cut, _part(call, rows, stock[cut.image_rows()[0]]))
    if itself is None:
        return None
    answers = []
    for sequence, image in ((stock, cut.image_rows()[0]), (negative, cut.image_rows()[1])):
        is_text = torch.ones(len(sequence), dtype=torch.bool)
        is_text[image] = False
        near = _part(call, rows, sequence[is_text])
        looked = attention_with_lse(near.query, near.key, near.value, near.mask, near.scale)
        answers.append(merged(itself, looked).to(itself[0].dtype))
    return answers[0], answers[1]


def _on_itself(call: AttentionCall, inner: Inner, cut: Cut, alone: AttentionCall) -> Pair | None:
    """The image's answer on itself and its log-sum-exp, by the rest of the chain; None where that is not told.

    Args:
        call: the call on the carried sequence.
        inner: the rest of the chain.
        cut: where the texts stand.
        alone: the call with the image's queries and keys only.
    """
    if call.is_causal or not cut.text or not (call.mask is None or isinstance(call.mask, torch.Tensor)):
        return None
    alone = replace(alone, layout=_image_alone(call.run.layout, cut), record=CallRecord(wants_lse=True))
    out = inner(alone)
    record = alone.record
    if record.lse is None or record.edited:
        return None
    call.record.sparse, call.record.density, call.record.reason = record.sparse, record.density, record.reason
    return out, record.lse


def _beside(call: AttentionCall, sequence: torch.Tensor, image: torch.Tensor, itself: Pair) -> torch.Tensor:
    """The answer of a whole sequence, text and image, when the image's answer on itself is known.

    Args:
        call: the call on the carried sequence.
        sequence: places of the sequence's tokens.
        image: which of them are the image's.
        itself: the image's answer on itself, and its log-sum-exp.
    """
    is_text = torch.ones(len(sequence), dtype=torch.bool)
    is_text[image] = False
    text = is_text.nonzero().flatten()
    near = _part(call, sequence[image], sequence[text])
    looked = attention_with_lse(near.query, near.key, near.value, near.mask, near.scale)
    whole = _part(call, sequence[text], sequence)
    own = attention_with_lse(whole.query, whole.key, whole.value, whole.mask, whole.scale)[0]
    answer = own.new_zeros(own.shape[0], len(sequence), *own.shape[2:])
    answer.index_copy_(1, image.to(own.device), merged(itself, looked).to(own.dtype))
    return answer.index_copy_(1, text.to(own.device), own)


def _part(call: AttentionCall, rows: torch.Tensor, columns: torch.Tensor) -> AttentionCall:
    """Some queries on some keys."""
    return call.with_tensors(
        query=pick(call.query, rows, 1),
        key=pick(call.key, columns, 1),
        value=pick(call.value, columns, 1),
        mask=pick_mask(call.mask, rows, columns, call.key.shape[1]),
    )


def _image_alone(layout: TokenLayout | None, cut: Cut) -> TokenLayout | None:
    """The layout without its text side; None where that is not as long as the image."""
    if layout is None:
        return None
    left = layout.segments
    dropped = 0
    while left and dropped < cut.text:
        end = left[0] if cut.text_first else left[-1]
        dropped += end.length
        left = left[1:] if cut.text_first else left[:-1]
    return TokenLayout(left) if left and sum(s.length for s in left) == cut.image else None
