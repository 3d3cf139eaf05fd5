"""A WordPiece vocabulary learnt from texts, and the tokenizer files that AutoTokenizer reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm3d_ext.data.atomic_files import write_bytes, write_json

__all__ = ["SPECIAL_TOKENS", "build_tokenizer", "learn_wordpieces", "write_tokenizer"]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""As in BERT; their places in this tuple are their ids."""

_CONTINUATION = "##"


def learn_wordpieces(texts: Iterable[str], vocab_size: int) -> list[str]:
    """Learn the pieces of words, lower case, that occur in the texts.

    Every letter of the texts is a piece, also inside a word, so that any word made of them can be spelt.

    Source: WordPiece, Schuster and Nakajima, "Japanese and Korean voice search", ICASSP 2012, as in the `tokenizers`
    library (which merges the most frequent pairs).

    Args:
        texts: where to learn from.
        vocab_size: pieces wanted, special tokens included; fewer if the texts hold fewer.

    Returns:
        The special tokens, then the other pieces in alphabetical order; the same for the same texts on every run.

    Raises:
        ValueError: if `vocab_size` has no room for the letters.
    """
    from tokenizers import Tokenizer, models, trainers

    texts = list(texts)
    learner = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS[1]))
    _lower_case_words(learner)
    letters = sorted({letter for text in texts for letter in learner.normalizer.normalize_str(text)} - {" "})
    continuations = [_CONTINUATION + letter for letter in letters]
    if vocab_size < len(SPECIAL_TOKENS) + 2 * len(letters):
        raise ValueError(
            f"vocab_size {vocab_size} has no room for the {len(letters)} letters of the texts at the start of and "
            f"inside words; give at least {len(SPECIAL_TOKENS) + 2 * len(letters)}."
        )
    # The library numbers letters inside words in the order of a hash table that differs from run to run, and breaks
    # ties between pairs by these numbers. Given beforehand, as if special, they have numbers of their own.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[*SPECIAL_TOKENS, *continuations],
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return [*SPECIAL_TOKENS, *sorted(set(learner.get_vocab()) - set(SPECIAL_TOKENS))]


def build_tokenizer(vocabulary: list[str]) -> Any:
    """Return the `tokenizers.Tokenizer` of a vocabulary: lower case, words and punctuation, [CLS] ... [SEP]."""
    from tokenizers import Tokenizer, decoders, models, processors

    ids = {piece: number for number, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", continuing_subword_prefix=_CONTINUATION))
    _lower_case_words(tokenizer)
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUATION)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def write_tokenizer(folder: Path, vocabulary: list[str], max_positions: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and vocab.txt, which every version of transformers reads.

    Args:
        folder: exists.
        vocabulary: the pieces in the order of their ids.
        max_positions: tokens that the model takes.
    """
    write_bytes(folder / "tokenizer.json", build_tokenizer(vocabulary).to_str(pretty=True).encode())
    write_bytes(folder / "vocab.txt", "".join(f"{piece}\n" for piece in vocabulary).encode())
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": max_positions}
    named = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS}
    write_json(folder / "tokenizer_config.json", settings | named)


def _lower_case_words(tokenizer: Any) -> None:
    from tokenizers import normalizers, pre_tokenizers

    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
