import subprocess
import sys

import pytest

from data_prep.wordpiece_vocabulary import SPECIAL_TOKENS, build_tokenizer, learn_wordpieces, write_tokenizer

TEXTS = ["Pleural effusion is seen.", "No pleural effusion.", "Effusions were seen, 5 mm."]


def test_special_tokens_first_and_the_rest_in_order():
    vocabulary = learn_wordpieces(TEXTS, 500)
    assert tuple(vocabulary[:5]) == SPECIAL_TOKENS
    assert vocabulary[5:] == sorted(vocabulary[5:]) and len(set(vocabulary)) == len(vocabulary)
    assert {"pleural", "effusion", "effusions", "seen", "5", "."} <= set(vocabulary)


def test_any_word_of_known_letters_can_be_spelt():
    tokenizer = build_tokenizer(learn_wordpieces(TEXTS, 500))
    encoding = tokenizer.encode("Useful mission")
    assert "[UNK]" not in encoding.tokens and encoding.tokens[0] == "[CLS]" and encoding.tokens[-1] == "[SEP]"
    assert "".join(encoding.tokens[1:-1]).replace("##", "") == "usefulmission"


def test_the_size_is_kept_and_must_have_room_for_the_letters():
    assert len(learn_wordpieces(TEXTS, 60)) == 60
    with pytest.raises(ValueError, match=r"vocab_size 20 has no room for the \d+ letters"):
        learn_wordpieces(TEXTS, 20)


def test_processes_agree():
    """Left to itself, the library numbers pieces in the order of a hash table seeded anew in each process."""
    texts = [f"{word} {word[::-1]} {word[1:]}" for word in ("consolidation", "bronchiectasis", "atelectasis", "edema")]
    code = f"from data_prep.wordpiece_vocabulary import learn_wordpieces as l; print(l({texts!r}, 70))"
    found = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(3)}
    assert found == {f"{learn_wordpieces(texts, 70)}\n"}


def test_files_give_the_same_tokens_through_transformers(tmp_path):
    from transformers import AutoTokenizer, BertConfig

    vocabulary = learn_wordpieces(TEXTS, 500)
    write_tokenizer(tmp_path, vocabulary, 32)
    BertConfig(vocab_size=len(vocabulary)).save_pretrained(tmp_path)
    text = "No PLEURAL effusion, 15 mm; un-seen."
    expected = build_tokenizer(vocabulary).encode(text).ids
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(text)["input_ids"] == expected
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.model_max_length) == (0, 4, 32)
    (tmp_path / "tokenizer.json").unlink()  # vocab.txt alone is what Bio_ClinicalBERT ships
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == expected
