import pytest

from tests.tiny_language_model import BOS, make_tiny_language_model
from vlm3d_ext.text.pretrained_language_model import load_language_model
from vlm3d_ext.text.report_prompt import (
    IMAGE_MARKER,
    PromptTokenCounter,
    ReportPrompt,
    available_prompt_templates,
    encode_prompt,
)

FINDINGS = [("Lung nodule", 0.834), ("Pleural effusion", 0.7)]
LESIONS = [f"[FINDING] Lung nodule detected in right upper lobe, {size} mm" for size in (9, 7, 5)]


def write_template(folder, text):
    path = folder / "mine.txt"
    path.write_text(text, encoding="utf-8")
    return path


def count_words(text):
    return len(text.split())


# --- the template -----------------------------------------------------------------------------------------------------


def test_the_shipped_prompt_word_for_word():
    assert ReportPrompt().text(FINDINGS, LESIONS[:2]) == (
        "<image>\n"
        "Classified findings: Lung nodule (0.83), Pleural effusion (0.70)\n"
        "[FINDING] Lung nodule detected in right upper lobe, 9 mm\n"
        "[FINDING] Lung nodule detected in right upper lobe, 7 mm\n"
        "Generate a clinical radiology report based on the CT scan findings:"
    )


def test_nothing_found_is_said_and_leaves_no_empty_line():
    assert ReportPrompt("chest_ct_report").text() == (
        "<image>\nClassified findings: none\nGenerate a clinical radiology report based on the CT scan findings:"
    )


def test_every_template_that_is_listed_is_a_report_prompt():
    assert "chest_ct_report" in available_prompt_templates()
    for name in available_prompt_templates():
        text = ReportPrompt(name).text(FINDINGS, LESIONS)
        assert text.count(IMAGE_MARKER) == 1 and not text.endswith(IMAGE_MARKER)


def test_the_template_for_rewriting_is_none():
    assert "rewrite_report" not in available_prompt_templates()
    with pytest.raises(ValueError, match=r"'rewrite_report' is neither a prompt template \(\['chest_ct_report'"):
        ReportPrompt("rewrite_report")


def test_a_template_of_ones_own_with_braces_and_other_letters(tmp_path):
    prompt = ReportPrompt(write_template(tmp_path, "\nBefund {{kurz}}: {image} µm, {findings}.\n\n{lesions}\nText:\n"))
    assert prompt.text(FINDINGS[:1]) == "Befund {kurz}: <image> µm, Lung nodule (0.83).\nText:"
    # what is filled in may hold braces too
    assert "{image}" in prompt.text((), ["{image} {unknown}"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Findings: {findings}", r"\{image\} exactly once .* got \['findings'\]"),
        ("{image} and {image}", r"\{image\} exactly once .* got \['image', 'image'\]"),
        ("{image} {spacing}", r"may have \{findings\} and \{lesions\}, got \['image', 'spacing'\]"),
        ("{image} {}", r"got \['image', ''\]"),
        ("{image} {findings", "write a brace that is meant as such twice"),
        ("{image} }", "write a brace that is meant as such twice"),
    ],
)
def test_bad_templates_are_named(tmp_path, text, problem):
    path = write_template(tmp_path, text)
    with pytest.raises(ValueError, match=problem) as error:
        ReportPrompt(path)
    assert str(path) in str(error.value)


def test_bad_names_and_paths(tmp_path):
    with pytest.raises(ValueError, match=r"'chest_report' is neither a prompt template \(\['chest_ct_report'"):
        ReportPrompt("chest_report")
    with pytest.raises(FileNotFoundError, match=r"absent\.txt does not exist"):
        ReportPrompt(tmp_path / "absent.txt")


# --- fitting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [3, 2, 1, 0])
def test_lesions_are_left_out_from_the_last_on_and_counted(kept):
    prompt = ReportPrompt()
    whole = prompt.text(FINDINGS, LESIONS[:kept])
    assert prompt.fitted(FINDINGS, LESIONS, count_words, count_words(whole)) == (whole, 3 - kept)
    # one word less than the next lesion needs makes no difference
    spare = count_words(LESIONS[0]) - 1
    assert prompt.fitted(FINDINGS, LESIONS[: kept + 1], count_words, count_words(whole) + spare)[0] == whole


def test_a_prompt_too_long_even_without_lesions_is_refused():
    prompt = ReportPrompt()
    length = count_words(prompt.text(FINDINGS))
    with pytest.raises(ValueError, match=rf"takes {length} tokens without any lesion, expected at most {length - 1};"):
        prompt.fitted(FINDINGS, LESIONS, count_words, length - 1)


# --- encoding ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_language_model(str(make_tiny_language_model(tmp_path_factory.mktemp("chat")))).tokenizer


@pytest.fixture
def plain_tokenizer(tokenizer):
    """The same without chat template."""
    template, tokenizer.chat_template = tokenizer.chat_template, None
    yield tokenizer
    tokenizer.chat_template = template


def token_ids(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_with_a_chat_template_the_prompt_is_the_users_message(tokenizer):
    encoded = encode_prompt(tokenizer, "See <image>\nnodule\nReport:")
    assert tokenizer.decode(encoded.before) == f"{BOS}<|start|>user<|end|>See"
    assert tokenizer.decode(encoded.after) == "\nnodule\nReport:<|eot_id|><|start|>assistant<|end|>"
    assert encoded.before.count(tokenizer.bos_token_id) == 1  # the template's own, no second one
    assert len(encoded) == len(encoded.before) + len(encoded.after)


def test_without_chat_template_the_prompt_follows_the_token_that_begins_a_text(plain_tokenizer):
    encoded = encode_prompt(plain_tokenizer, "See <image> and write")
    assert encoded.before == (plain_tokenizer.bos_token_id, *token_ids(plain_tokenizer, "See"))
    assert encoded.after == token_ids(plain_tokenizer, "and write\n")
    image_first = encode_prompt(plain_tokenizer, "<image>\nwrite")
    assert image_first.before == (plain_tokenizer.bos_token_id,)


def test_a_tokenizer_without_such_a_token(plain_tokenizer):
    bos = plain_tokenizer.bos_token
    plain_tokenizer.bos_token = None
    try:
        assert encode_prompt(plain_tokenizer, "<image>\nwrite").before == ()
    finally:
        plain_tokenizer.bos_token = bos


def test_the_marker_itself_is_in_no_token(tokenizer):
    encoded = encode_prompt(tokenizer, ReportPrompt().text(FINDINGS, LESIONS))
    assert IMAGE_MARKER not in tokenizer.decode(encoded.before) + tokenizer.decode(encoded.after)
    assert LESIONS[0] in tokenizer.decode(encoded.after)


def test_the_counter_counts_all_but_the_image(tokenizer):
    prompt = "<image>\nnodule\nReport:"
    rendered = f"{BOS}<|start|>user<|end|>|\nnodule\nReport:<|eot_id|><|start|>assistant<|end|>"
    before, after = rendered.split("|\nn")
    expected = len(token_ids(tokenizer, before)) + len(token_ids(tokenizer, "\nn" + after))
    assert PromptTokenCounter(tokenizer)(prompt) == expected


@pytest.mark.parametrize(("prompt", "times"), [("Report:", 0), ("<image> <image> Report:", 2)])
def test_a_prompt_has_one_image(tokenizer, prompt, times):
    with pytest.raises(ValueError, match=f"has <image> exactly once, got it {times} times"):
        encode_prompt(tokenizer, prompt)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages[0]['content'][:3] }}", "has <image> 0 times after rendering, expected once"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "has <image> 2 times after rendering"),
        ("{{ raise_exception('no users here') }}", "refuses a message of the user: no users here"),
    ],
)
def test_chat_templates_that_lose_the_image_or_refuse_it(plain_tokenizer, template, problem):
    plain_tokenizer.chat_template = template  # the fixture puts the tokenizer's own back
    with pytest.raises(ValueError, match=problem):
        encode_prompt(plain_tokenizer, "<image>\nReport:")
