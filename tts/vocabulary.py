"""Do target and draft mean the same by a token id? Asked before any weight is loaded."""

import hashlib
import json

from transformers import PreTrainedTokenizerBase

from tts.errors import UserError


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over all (token, id) pairs: equal for two tokenizers that agree id by id."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def check_same_ids(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    """Compare two tokenizers id by id; a padded embedding is none of their business.

    Raises:
        UserError: naming the first id whose token differs.
    """
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours == theirs:
        return
    by_id = {i: t for t, i in ours.items()}, {i: t for t, i in theirs.items()}
    first = min(i for i in by_id[0].keys() | by_id[1].keys() if by_id[0].get(i) != by_id[1].get(i))
    raise UserError(
        f"draft: its tokenizer is not the target's: id {first} is {by_id[0].get(first)!r} in the "
        f"target and {by_id[1].get(first)!r} in the draft: choose a draft with the same ids"
    )
