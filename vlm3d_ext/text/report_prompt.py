"""What a language model is asked: a template in a text file, filled with what is known of a scan, and encoded around
the place of the image.
"""

from __future__ import annotations

import os
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .lesion_locations import LesionLocation

__all__ = [
    "IMAGE_MARKER",
    "EncodedPrompt",
    "PromptTokenCounter",
    "ReportPrompt",
    "available_prompt_templates",
    "encode_prompt",
]

IMAGE_MARKER = "<image>"
"""Where the image's embeddings stand in a prompt."""

_FOLDER = Path(__file__).parent / "prompt_templates"
_PLACES = ("image", "findings", "lesions")


def available_prompt_templates() -> list[str]:
    """Return the names of the report prompts that ship with the package: the templates with a place for the image."""
    return sorted(path.stem for path in _FOLDER.glob("*.txt") if "{image}" in path.read_text(encoding="utf-8"))


class ReportPrompt:
    """Fills a template with classified findings and located lesions.

    A template is a text with the places ``{image}``, once, and, where wanted, ``{findings}`` and ``{lesions}``.
    Findings are written as ``Lung nodule (0.83), Pleural effusion (0.77)``, or ``none``. A line that holds nothing but
    a place that has nothing to say is left out.

    Args:
        template: name of one that ships, such as ``chest_ct_report``, or the path of a text file.

    Raises:
        ValueError: if the name is unknown, or the template lacks ``{image}``, has it twice, or has other places.
        FileNotFoundError: if a path is given and there is no such file.
    """

    def __init__(self, template: str | os.PathLike = "chest_ct_report") -> None:
        name = os.fspath(template)
        path = _FOLDER / f"{name}.txt" if name in available_prompt_templates() else Path(name)
        if path.suffix != ".txt":
            raise ValueError(
                f"{name!r} is neither a prompt template ({available_prompt_templates()}) nor the path of a .txt file."
            )
        if not path.is_file():
            raise FileNotFoundError(f"prompt template {name} does not exist; give a name or another path.")
        self.template = path.read_text(encoding="utf-8").strip()
        try:
            places = [place for _, place, _, _ in string.Formatter().parse(self.template) if place is not None]
        except ValueError as error:
            raise ValueError(f"{path}: {error}; write a brace that is meant as such twice.") from None
        unknown = sorted(set(places) - set(_PLACES))
        if unknown or places.count("image") != 1:
            raise ValueError(
                f"{path}: a prompt template has {{image}} exactly once and may have {{findings}} and {{lesions}}, got "
                f"{places}."
            )

    def text(self, findings: Sequence[tuple[str, float]] = (), lesions: Sequence[str] = ()) -> str:
        """Return the prompt, with `IMAGE_MARKER` at the place of the image.

        Args:
            findings: names and probabilities, in the order in which they are to be named.
            lesions: one line for each, such as those of `vlm3d_ext.text.lesion_locations.LesionLocationInjector`.
        """
        filled = {
            "image": IMAGE_MARKER,
            "findings": ", ".join(f"{name} ({probability:.2f})" for name, probability in findings) or "none",
            "lesions": "\n".join(lesions),
        }
        lines = [line.format(**filled) for line in self.template.split("\n")]
        return "\n".join(line for line in lines if line.strip())

    def fitted(
        self,
        findings: Sequence[tuple[str, float]],
        lesions: Sequence[str],
        count_tokens: Callable[[str], int],
        max_tokens: int,
    ) -> tuple[str, int]:
        """Return the prompt with as many lesions as fit into `max_tokens`, from the first on, and how many do not.

        Raises:
            ValueError: if it does not even fit without lesions.
        """
        for kept in range(len(lesions), -1, -1):
            text = self.text(findings, lesions[:kept])
            length = count_tokens(text)
            if length <= max_tokens:
                return text, len(lesions) - kept
        raise ValueError(
            f"the prompt takes {length} tokens without any lesion, expected at most {max_tokens}; raise "
            "max_prompt_tokens, or shorten the template."
        )

    def of_evidence(
        self,
        findings: Mapping[str, Mapping[str, Any]],
        lesions: Sequence[Mapping[str, Any]],
        count_tokens: Callable[[str], int],
        max_tokens: int,
    ) -> tuple[str, int]:
        """Return the prompt of what networks say of a scan, and how many lesions do not fit; see `fitted`.

        Args:
            findings: name -> ``probability`` and ``prediction``; those predicted are named.
            lesions: as `LesionLocation.to_json` has them.
            count_tokens: how many tokens a prompt takes.
            max_tokens: how many it may take.
        """
        named = [(name, float(of["probability"])) for name, of in findings.items() if of["prediction"]]
        lines = [LesionLocation.from_json(lesion).sentence() for lesion in lesions]
        return self.fitted(named, lines, count_tokens, max_tokens)


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids before and after the image."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


def encode_prompt(tokenizer: Any, prompt: str) -> EncodedPrompt:
    """Encode a prompt up to where the answer begins, by the tokenizer's chat template if it has one.

    Without a chat template the prompt is taken as it is, after the token for the beginning of a text, if there is one,
    and before a line break.

    Args:
        tokenizer: of Hugging Face.
        prompt: with `IMAGE_MARKER` once.

    Raises:
        ValueError: if the marker is not there exactly once, or the chat template loses it or refuses the message.
    """
    if prompt.count(IMAGE_MARKER) != 1:
        raise ValueError(f"a prompt has {IMAGE_MARKER} exactly once, got it {prompt.count(IMAGE_MARKER)} times.")
    if getattr(tokenizer, "chat_template", None):
        try:
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise whatever it likes
            raise ValueError(f"the tokenizer's chat template refuses a message of the user: {error}.") from None
        if rendered.count(IMAGE_MARKER) != 1:
            raise ValueError(
                f"the tokenizer's chat template has {IMAGE_MARKER} {rendered.count(IMAGE_MARKER)} times after "
                "rendering, expected once; use a tokenizer without a chat template, or mend the template."
            )
        start: list[int] = []
    else:
        rendered = prompt + "\n"
        start = [] if getattr(tokenizer, "bos_token_id", None) is None else [tokenizer.bos_token_id]
    before, after = (
        tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
        for part in (piece.strip(" ") for piece in rendered.split(IMAGE_MARKER))
    )
    return EncodedPrompt((*start, *before), tuple(after))


class PromptTokenCounter:
    """Counts the tokens of a prompt without its image.

    Args:
        tokenizer: of Hugging Face.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, prompt: str) -> int:
        """Return how many tokens the encoded prompt has."""
        return len(encode_prompt(self.tokenizer, prompt))
