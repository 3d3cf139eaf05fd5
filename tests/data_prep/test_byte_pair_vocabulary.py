import json

import pytest
from transformers import AutoTokenizer

from data_prep.byte_pair_vocabulary import END_OF_TEXT, PADDING, SPECIAL_TOKENS, learn_byte_pairs, write_chat_tokenizer
from vlm3d_ext.text.report_prompt import IMAGE_MARKER, ReportPrompt, encode_prompt

TEXTS = [
    "Findings: A nodule of 12 mm is seen in the right upper lobe. Impression: Nodule in the right upper lobe.",
    "Findings: A nodule of 7 mm is seen in the left lower lobe. Impression: Nodule in the left lower lobe.",
    "[FINDING] Ground-glass opacity detected in right upper lobe, small",
]


def test_every_text_comes_back_exactly():
    tokenizer = learn_byte_pairs(TEXTS, 400, 20)
    odd = "  Two  spaces,\n\ttab; “quotes” – é 12.5x3 mm?! <image> GROUND-GLASS -7 - x-  "
    for text in (*TEXTS, odd):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_stand_alone_and_words_are_whole():
    tokenizer = learn_byte_pairs(TEXTS, 1000)
    tokens = tokenizer.encode(" nodule of 1207 mm, Ground-glass opacity").tokens
    assert tokens == ["Ġnodule", "Ġof", "Ġ", "1", "2", "0", "7", "Ġmm", ",", "ĠGround-glass", "Ġopacity"]


def test_phrases_are_the_most_frequent_neighbours_and_end_at_signs_and_four_words():
    texts = ["one two, three four five six seven"] * 3 + ["one two"]
    assert learn_byte_pairs(texts, 1000, 1).encode("one two, three").tokens == ["oneĠtwo", ",", "Ġthree"]
    tokenizer = learn_byte_pairs(texts, 1000, 50)
    assert tokenizer.encode("one two, three").tokens == ["oneĠtwo", ",", "Ġthree"]
    tokens = tokenizer.encode(" three four five six seven").tokens
    assert max(token.count("Ġ") for token in tokens) <= 4 and len(tokens) == 2
    assert "".join(tokens) == "ĠthreeĠfourĠfiveĠsixĠseven"


def test_the_same_texts_give_the_same_tokenizer():
    assert learn_byte_pairs(TEXTS, 400, 20).to_str() == learn_byte_pairs(iter(TEXTS), 400, 20).to_str()


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size 200 has no room for the 256 bytes; give at least 261"):
        learn_byte_pairs(TEXTS, 200)


def test_the_files_are_a_chat_tokenizer(tmp_path):
    write_chat_tokenizer(tmp_path, learn_byte_pairs(TEXTS, 400, 20), 128)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.model_max_length) == (PADDING, END_OF_TEXT, 128)
    assert tokenizer.bos_token is None
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<|user|>\nSay it.\n<|assistant|>\nIt.<|end|>"
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>\nSay it.\n<|assistant|>\n"
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and not set(ids) & {0, 1, 2, 3, 4}


def test_prompts_keep_the_place_of_the_image(tmp_path):
    write_chat_tokenizer(tmp_path, learn_byte_pairs(TEXTS, 400), 128)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = ReportPrompt().text([("Lung nodule", 0.83)], [TEXTS[2]])
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    assert rendered.count(IMAGE_MARKER) == 1
    encoded = encode_prompt(tokenizer, prompt)
    assert tokenizer.decode(encoded.before) == "<|user|>\n"
    after = tokenizer.decode(encoded.after)
    assert after.startswith("\nClassified findings: Lung nodule (0.83)\n[FINDING] Ground-glass")
    assert after.endswith(":\n<|assistant|>\n")


def test_settings_are_plain(tmp_path):
    write_chat_tokenizer(tmp_path, learn_byte_pairs(TEXTS, 400), 128)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 128 and "generation" in settings["chat_template"]
