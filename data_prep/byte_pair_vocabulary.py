"""A byte-level vocabulary of whole words learnt from texts, and the tokenizer files that AutoTokenizer reads."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from vlm3d_ext.data.atomic_files import write_bytes, write_json

__all__ = ["CHAT_TEMPLATE", "END_OF_TEXT", "PADDING", "SPECIAL_TOKENS", "learn_byte_pairs", "write_chat_tokenizer"]

PADDING, END_OF_TEXT = "<|pad|>", "<|end|>"
_SPACE = "\u0120"  # how the byte-level alphabet writes a space
SPECIAL_TOKENS = (PADDING, END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>")
"""Their places in this tuple are their ids."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    f"{{{{ '{END_OF_TEXT}' if message['role'] == 'assistant' else '\\n' }}}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""A turn is its speaker's token, a line break and the words; only the assistant's ends with `END_OF_TEXT`."""

# A word takes the space before it along, and keeps its hyphens. A digit stands alone, so that a number can be copied
# digit by digit; so does every other sign. Words that follow one another with nothing between are a run.
_WORD = r" ?\p{L}+(?:-\p{L}+)*"
_RUN = rf"\p{{N}}|(?:{_WORD})+|[^\s\p{{L}}\p{{N}}]|\s"
_WORD_OR_SIGN = rf"\p{{N}}|{_WORD}|[^\s\p{{L}}\p{{N}}]|\s"
_WORDS_IN_A_PHRASE = 4
_NUM_TEXTS_FOR_PHRASES = 4000
# What says where, or how large, is the same token in a prompt as in a report, whatever stands around it: only then does
# so small a model learn in so short a time to copy it. Such words join one another ("right upper lobe") but no others.
_WORDS_OF_PLACE = frozenset("left right upper middle lower anterior posterior lobe lobes".split())
_GRADES = frozenset("small mild moderate large severe".split())


def learn_byte_pairs(texts: Iterable[str], vocab_size: int, num_phrases: int = 0) -> Any:
    """Learn a `tokenizers.Tokenizer` that gives every text back exactly: all bytes are in its vocabulary.

    Phrases of up to four words that follow one another often, such as " right lower lobe", become one token each, which
    makes texts shorter. They never reach across a digit or a punctuation mark.

    Source: byte pair encoding, Sennrich et al., ACL 2016; over bytes, Radford et al., "Language models are unsupervised
    multitask learners", 2019, section 2.2; phrases after words, SuperBPE, Liu et al., COLM 2025.

    Args:
        texts: where to learn from.
        vocab_size: tokens wanted, special tokens included, phrases not; fewer if all words of the texts are whole
            before.
        num_phrases: phrases wanted beyond.

    Returns:
        The tokenizer; the same for the same texts on every run.

    Raises:
        ValueError: if `vocab_size` has no room for the bytes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = list(texts)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(SPECIAL_TOKENS) + len(alphabet):
        raise ValueError(
            f"vocab_size {vocab_size} has no room for the {len(alphabet)} bytes; give at least "
            f"{len(SPECIAL_TOKENS) + len(alphabet)}."
        )
    words = _split_at(Tokenizer(models.BPE()), _WORD_OR_SIGN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    words.train_from_iterator(texts, trainer)
    if not num_phrases:
        return words
    learnt = json.loads(words.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    vocabulary = dict(learnt["vocab"])
    for pair in _phrases(words, texts[:: max(1, len(texts) // _NUM_TEXTS_FOR_PHRASES)], num_phrases):
        merges.append(pair)
        vocabulary.setdefault("".join(pair), len(vocabulary))
    tokenizer = _split_at(Tokenizer(models.BPE(vocabulary, merges)), _RUN)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _split_at(tokenizer: Any, pattern: str) -> Any:
    from tokenizers import Regex, decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _phrases(words: Any, texts: Sequence[str], number: int) -> Iterator[tuple[str, str]]:
    """Yield the most frequent pair of neighbours, again and again after it has become one; ties by alphabet."""
    runs = _runs_of_words(words, texts)
    rows = [list(run) for run in runs]
    weights = list(runs.values())
    counts: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[int]] = defaultdict(set)

    def count(index: int, sign: int) -> None:
        for pair in pairwise(rows[index]):
            if sum(part.count(_SPACE) for part in pair) <= _WORDS_IN_A_PHRASE:
                counts[pair] += sign * weights[index]
                where[pair].add(index)

    for index in range(len(rows)):
        count(index, 1)
    for _ in range(number):
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            return
        for index in sorted(where.pop(best)):
            count(index, -1)
            rows[index] = _joined(rows[index], best)
            count(index, 1)
        del counts[best]
        yield best


def _runs_of_words(words: Any, texts: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Count the runs of words of one kind in the texts, each as the tokens of its words."""
    runs: Counter[tuple[str, ...]] = Counter()
    for encoding in words.encode_batch(list(texts)):
        for kind, run in groupby(encoding.tokens, _kind_of_token):
            if kind:
                runs[tuple(run)] += 1
    return runs


def _kind_of_token(token: str) -> str:
    word = token.strip(_SPACE).lower()
    if not word.replace("-", "").isalpha() or word in _GRADES:
        return ""
    return "place" if word in _WORDS_OF_PLACE else "word"


def _joined(row: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for token in row:
        if joined and (joined[-1], token) == pair:
            joined[-1] += token
        else:
            joined.append(token)
    return joined


def write_chat_tokenizer(folder: Path, tokenizer: Any, max_positions: int) -> Any:
    """Write tokenizer.json and, with the chat template, tokenizer_config.json; return what AutoTokenizer makes of them.

    Args:
        folder: exists.
        tokenizer: of `learn_byte_pairs`.
        max_positions: tokens that the model takes.
    """
    from transformers import AutoTokenizer

    write_bytes(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "pad_token": PADDING,
        "eos_token": END_OF_TEXT,
        "additional_special_tokens": list(SPECIAL_TOKENS[2:]),
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
