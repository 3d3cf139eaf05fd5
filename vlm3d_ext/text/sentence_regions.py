"""Which of the 20 anatomical regions a report sentence speaks of.

The lexicon is the tables at the top. Lobes need a little grammar besides, because their side may stand before ("left
lung lower lobe"), after ("lower lobes of both lungs"), farther away, or nowhere.
"""

from __future__ import annotations

import re

from vlm3d_ext.data.anatomical_regions import ANATOMICAL_REGIONS

__all__ = ["REGION_LEXICON", "regions_of_sentence"]

_LOBES = {
    ("left", "upper"): "left_upper_lobe",
    ("left", "lower"): "left_lower_lobe",
    ("right", "upper"): "right_upper_lobe",
    ("right", "middle"): "right_middle_lobe",
    ("right", "lower"): "right_lower_lobe",
}
_LEVELS = ("upper", "middle", "lower")
_MEDIASTINAL_VESSELS = ("aorta", "pulmonary_vessels", "superior_vena_cava", "great_vessels")
_BONES = ("thoracic_spine", "ribs_left", "ribs_right", "sternum", "shoulder_girdle")

# Words whose place does not depend on a side -> regions. Lymph node stations count as the structures beside which
# they lie.
REGION_LEXICON: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"trachea\w*|(?:main|central) bronch\w+|endobronch\w+|endotracheal", ("trachea",)),
    (r"(?:\w+-)?(?:para|pre)tracheal", ("trachea", "superior_vena_cava", "great_vessels")),
    (r"(?:sub|infra|pre)carinal|carina", ("trachea", "esophagus")),
    (r"heart|cardiac|cardiomeg\w+|cardiothoracic|cto|cardiophrenic|myocard\w*|(?:epi|peri)cardi\w*", ("heart",)),
    (r"coronary|coronaries|lad|rca|cabg|atri(?:um|al|a)|\w*ventric\w+|pacemaker", ("heart",)),
    (r"(?:mitral|aortic|tricuspid) valve\w*", ("heart",)),
    (r"aort(?:a|as|ic)(?! valve)|arch(?:us)? aorta", ("aorta",)),
    (r"aort(?:ic)?o-?pulmonary", ("aorta", "pulmonary_vessels")),
    (
        r"pulmonary (?:arter\w+|trunk|conus|veins?|venous|vessels?|vascular\w*|(?:thrombo)?embol\w+)",
        ("pulmonary_vessels",),
    ),
    (
        r"(?<!spleen )(?<!splenic )(?<!liver )(?<!hepatic )(?<!renal )(?<!kidney )(?<!fatty )"
        r"(?:peri)?hil(?:ar|um|us|i)(?! of the (?:liver|spleen|(?:left |right )?kidney))",
        ("pulmonary_vessels",),
    ),
    (r"(?<!inferior )vena cava|svc|azyg\w+|central ven\w+ (?:catheter|port)", ("superior_vena_cava",)),
    (r"brachiocephalic|subclavian|carotid\w*|innominate|supra-?aortic|prevascular", ("great_vessels",)),
    (r"mediastin\w+ (?:main |major )*vascular|major (?:mediastin\w+ )?vascular", _MEDIASTINAL_VESSELS),
    (r"mediastin\w+(?! (?:main |major )*vascular)", (*_MEDIASTINAL_VESSELS, "trachea", "esophagus")),
    (r"o?esophag\w+", ("esophagus",)),
    (r"hi\w?atal herni\w+|hiatus herni\w+", ("esophagus", "upper_abdomen")),
    (r"thyroid\w*|goit(?:er|re)", ("thyroid",)),
    (
        r"\w*vertebra\w*|spin(?:e|al|ous)|spondyl\w+|\w*scolio\w+|kypho\w+|osteophyt\w+|neural foramina",
        ("thoracic_spine",),
    ),
    (r"stern(?:um|al|otomy)|\w*manubri\w+|costal cartilage\w*|costochondral|pectus", ("sternum",)),
    (r"clavic\w+|scapul\w+|humer\w+|shoulder\w*|\w*humeral|acromi\w+|axilla\w*|supraclavicular", ("shoulder_girdle",)),
    (r"bones?|bony|osseous|skelet\w+|lytic", _BONES),
    (r"pleura|pleural|pleurae|\w*pneumothora\w+|hydrothora\w+|h(?:a)?emothora\w+|costophrenic|empyema", ("pleura",)),
    (r"(?:effusion|fluid)\w*\b.*\bhemithora\w+|hemithora\w+\b.*\b(?:effusion|fluid)\w*", ("pleura",)),
    (
        r"\w*abdom\w+|liver|caudate|\w*hepat\w+|portal|spleen|splen\w+|\w*gastr\w+|stomach|duoden\w+|\w*pancrea\w+",
        ("upper_abdomen",),
    ),
    (
        r"gall ?bladder|biliary|bile|chol[ae]\w+|\w*adrenal\w*|kidneys?|\w*renal|\w*neph\w+|pelvicalyceal",
        ("upper_abdomen",),
    ),
    (r"mesenter\w+|colon|colonic|bowel|intestin\w+|\w*peritone\w+", ("upper_abdomen",)),
)

_RIB = r"ribs?|costae?|costal(?! cartilage| pleura)|intercostal|(?:chest|thora(?:x|cic)) wall"
# Said of lung tissue only: every lobe of the sides named, unless the sentence names lobes itself.
_LUNG = (
    r"lungs?|pulmonary(?! (?:arter|trunk|conus|vein|venous|vessel|vascular|embol|thromboembol))|fissures?|mosaic|"
    r"parenchymal (?:nodul|sequel|infil|opac|band)\w*|ground[- ]?glass|frosted[- ]glass|\w*emphysem\w*|consolidati\w+|"
    r"\w*at[ea]lect\w+|\w*pneumoni\w+|infiltrat\w+|bronchiect\w+|peribronch\w+|bronchiol\w+|interlobular|"
    r"tree[- ]in[- ]bud\w*|budding tree\w*|crazy[- ]paving|centri?l?o?acinar|pleuroparenchymal|"
    r"(?:sub)?segment(?:al)? bronch\w+"
)
# Segments that lie on one level of the lung, for sentences that do not name the lobe.
_SEGMENTS = {
    "upper": r"apex(?:es)?|apices|(?:bi)?apical|apicoposterior",
    "lower": r"basal|bases|(?:\w+o-?)basal",
}
_LEVEL_WORDS = {"superior": "upper", "inferior": "lower", "mid": "middle"}

_LEVEL = r"(?:upper|middle|mid|lower|superior|inferior)"
_AND = r"\s*(?:,\s*and|,|and|or|&|/|-|to)\s*(?:the\s+)?"
_LOBE_GROUP = re.compile(rf"\b{_LEVEL}(?:(?:\s+lobes?)?{_AND}{_LEVEL})*(?:\s+lung)?\s+lob(?:es?|ar)\b")
_SIDE = r"(left|right|both|bilateral\w*|each)"
_SIDE_JUST_BEFORE = re.compile(rf"\b{_SIDE}(?:[- ]sided)?(?:\s+(?:lungs?|hemithora\w+))?(?:\s+parenchyma)?(?:'s)?\s*$")
_SIDE_AFTER = re.compile(rf"^(?:\s+[\w-]+){{0,4}}?\s+(?:of|in|on)\s+(?:the\s+)?{_SIDE}\b(?:\s+lungs?)?")
_ANY_SIDE = re.compile(rf"\b{_SIDE}\b")
_SIDED_LUNG = re.compile(rf"\b{_SIDE}\s+(?:entire\s+)?lungs?\b")

_COMPILED_LEXICON = tuple((re.compile(rf"\b(?:{words})\b"), regions) for words, regions in REGION_LEXICON)
_COMPILED_SEGMENTS = {level: re.compile(rf"\b(?:{words})\b") for level, words in _SEGMENTS.items()}
_RIB_WORD = re.compile(rf"\b(?:{_RIB})\b")
_LUNG_WORD = re.compile(rf"\b(?:{_LUNG})\b")
_LINGULA = re.compile(r"\b(?:lingul\w*|linguistic segment)\b")
_INDEX = {region.name: region.index for region in ANATOMICAL_REGIONS}


def regions_of_sentence(sentence: str) -> list[str]:
    """Return the anatomical regions that a sentence speaks of, whether it affirms or denies something there.

    Args:
        sentence: one sentence, or one item of a list.

    Returns:
        Names out of `vlm3d_ext.data.anatomical_regions`, each once, in the order of their indices. An empty list
        means that the sentence names no place: it is about the whole chest.

    Example:
        >>> regions_of_sentence("Ground-glass areas in the lower lobes of both lungs and a small pericardial effusion.")
        ['left_lower_lobe', 'right_lower_lobe', 'heart']
    """
    text = " ".join(sentence.lower().split())
    # "When examined in the lung parenchyma window; ..." places the rest in the lungs only if the rest has no place
    # of its own.
    introduction, _, statement = text.rpartition("; ")
    regions = _regions_of_statement(statement)
    if not regions and introduction:
        regions = _regions_of_statement(introduction)
    return sorted(regions, key=_INDEX.__getitem__)


def _regions_of_statement(text: str) -> set[str]:
    regions = _lung_regions(text)
    for pattern, names in _COMPILED_LEXICON:
        if pattern.search(text):
            regions.update(names)
    for match in _RIB_WORD.finditer(text):
        regions.update(f"ribs_{side}" for side in _sides_of_mention(text, match.start(), match.end())[0])
    return regions


def _lung_regions(text: str) -> set[str]:
    regions: set[str] = set()
    unclaimed = text
    for match in _LOBE_GROUP.finditer(text):
        levels = {_LEVEL_WORDS.get(word, word) for word in re.findall(_LEVEL, match.group())}
        sides, spans = _sides_of_mention(text, match.start(), match.end())
        regions |= _lobes(sides, levels)
        unclaimed = _blank(unclaimed, spans)
    if _LINGULA.search(text):
        regions.add("left_upper_lobe")
        unclaimed = unclaimed.replace("left lung", " " * len("left lung"))
    if not regions:
        for level, pattern in _COMPILED_SEGMENTS.items():
            for match in pattern.finditer(text):
                sides, spans = _sides_of_mention(text, match.start(), match.end())
                regions |= _lobes(sides, {level})
                unclaimed = _blank(unclaimed, spans)
    # "nodules in both lungs, the largest in the lower lobe of the right lung" speaks of both lungs
    for side in _SIDED_LUNG.findall(unclaimed):
        regions |= _lobes(_sides(side), set(_LEVELS))
    if not regions and _LUNG_WORD.search(text):
        named = {side for found in _ANY_SIDE.findall(text) for side in _sides(found)}
        regions = _lobes(named or {"left", "right"}, set(_LEVELS))
    return regions


def _lobes(sides: set[str], levels: set[str]) -> set[str]:
    if levels == {"middle"}:
        return {"right_middle_lobe"}  # "the middle lobe", even of "both lungs": there is only the right one
    return {_LOBES[side, level] for side in sides for level in levels if (side, level) in _LOBES}


def _sides_of_mention(text: str, start: int, end: int) -> tuple[set[str], list[tuple[int, int]]]:
    """Return the sides that belong to the mention at `[start, end)`, and the spans of text that say so."""
    before = _SIDE_JUST_BEFORE.search(text, 0, start)
    after = _SIDE_AFTER.search(_up_to_next_mention(text[end:]))
    spans = [(match.start(), match.end()) for match in (before,) if match]
    if after:
        spans.append((end, end + after.end()))
    decisive = before or after
    if decisive:
        return _sides(decisive.group(1)), spans
    earlier = list(_ANY_SIDE.finditer(text, 0, start))
    if earlier:
        last = earlier[-1]
        # "in the left lung at the basal level" narrows one lung; after a comma, or after "both lungs", it is an
        # addition
        narrows = last.group(1) in ("left", "right") and "," not in text[last.start() : start]
        return _sides(last.group(1)), [(last.start(), start)] if narrows else []
    later = _ANY_SIDE.search(text, end)
    return (_sides(later.group(1)) if later else {"left", "right"}), []


def _blank(text: str, spans: list[tuple[int, int]]) -> str:
    for start, end in spans:
        text = text[:start] + " " * (end - start) + text[end:]
    return text


def _up_to_next_mention(text: str) -> str:
    following = _LOBE_GROUP.search(text)
    return text[: following.start()] if following else text


def _sides(word: str) -> set[str]:
    return {word} if word in ("left", "right") else {"left", "right"}
