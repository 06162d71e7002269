"""A byte-level BPE tokenizer of any size, made without a corpus, for random test checkpoints.

Every string round-trips: the vocabulary starts with the 256 bytes. The rest are merges over common letters in
a fixed order, so that the same size always gives the same tokenizer, and the special tokens have the last ids.
It knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
END_OF_TURN = "<|end_of_turn|>"
START_OF_ROLE = "<|start_of_role|>"
SPECIAL_TOKENS = (BEGIN_OF_TEXT, END_OF_TEXT, END_OF_TURN, START_OF_ROLE)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_of_role|>{{ message['role'] }}\n{{ message['content'] }}<|end_of_turn|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant\n{% endif %}"
)

# "Ġ" is the byte-level form of the space.
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs, then triples, then quadruples of letters, each of them perhaps after a space."""
    stems = ["Ġ", *_LETTERS]
    for _ in range(3):
        longer: list[str] = []
        for stem in stems:
            for letter in _LETTERS:
                yield stem, letter
                longer.append(stem + letter)
        stems = longer


def special_token_id(token: str, vocab_size: int) -> int:
    return vocab_size - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(token)


def media_token_id(token: str, media_tokens: Sequence[str], vocab_size: int) -> int:
    """Of one of the placeholder tokens that `write_tokenizer` was given: they lie before the special tokens."""
    return vocab_size - len(SPECIAL_TOKENS) - len(media_tokens) + media_tokens.index(token)


def write_tokenizer(
    directory: Path,
    vocab_size: int,
    *,
    adds_begin_of_text: bool,
    media_tokens: Sequence[str] = (),
    chat_template: str = CHAT_TEMPLATE,
) -> None:
    """Writes tokenizer.json and tokenizer_config.json with `vocab_size` tokens, 260 and the media tokens or more."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    special_tokens = (*media_tokens, *SPECIAL_TOKENS)
    num_merges = vocab_size - 256 - len(special_tokens)
    assert num_merges >= 0, f"the bytes and the special tokens need {256 + len(special_tokens)} ids"
    merges = list(islice(_merges(), num_merges))
    assert len(merges) == num_merges, f"at most {256 + len(merges) + len(special_tokens)} tokens can be made"
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    if adds_begin_of_text:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN_OF_TEXT} $A", special_tokens=[(BEGIN_OF_TEXT, special_token_id(BEGIN_OF_TEXT, vocab_size))]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
