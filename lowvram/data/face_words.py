"""The built-in faces in words: what is drawn (lowvram.data.peeps.attributes) -> an English caption.

A caption names what can be seen: under a mask no mouth and no beard, behind dark glasses no eyes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

SKIN = {"#ffdbb4": "pale", "#edb98a": "light", "#d08b5b": "tan", "#ae5d29": "brown", "#694d3d": "dark"}

# Hair is drawn in black ink, but for the heads and beards with {hair} below.
HAIR = {
    "#2c1b18": "black",
    "#e8e1e1": "white",
    "#ecdcbf": "platinum",
    "#d6b370": "blond",
    "#f59797": "pink",
    "#b58143": "golden",
    "#a55728": "auburn",
    "#724133": "brown",
    "#4a312c": "dark brown",
    "#c93305": "red",
}

# {hair} and {cloth} are colours.
HEAD = {
    "afro": "a black afro",
    "bangs": "{hair} hair with bangs",
    "bangs2": "a black bob with bangs",
    "bantuKnots": "black bantu knots",
    "bear": "the head of a bear",
    "bun": "a bun and {cloth} bow",
    "bun2": "a bun and {cloth} band",
    "buns": "many black buns",
    "cornrows": "a {hair} ponytail",
    "cornrows2": "a black braid",
    "dreads1": "long black dreads",
    "dreads2": "short black dreads",
    "flatTop": "a short black flat top",
    "flatTopLong": "a tall black flat top",
    "grayBun": "a {hair} bun",
    "grayMedium": "parted {hair} hair",
    "grayShort": "short {hair} hair",
    "hatBeanie": "a {cloth} beanie",
    "hatHip": "a black hat",
    "hijab": "a black hijab",
    "long": "long black hair",
    "longAfro": "a huge black afro",
    "longBangs": "long black hair with bangs",
    "longCurly": "long curly black hair",
    "medium1": "a short black bob",
    "medium2": "flipped black hair",
    "medium3": "shoulder length black hair",
    "mediumBangs": "wavy black hair with bangs",
    "mediumBangs2": "curly {hair} hair",
    "mediumBangs3": "black pigtails with bangs",
    "mediumStraight": "straight black hair",
    "mohawk": "a {hair} mohawk",
    "mohawk2": "a spiky {hair} mohawk",
    "noHair1": "a bald head",
    "noHair2": "a few hairs",
    "noHair3": "balding {hair} hair",
    "pomp": "a black pompadour",
    "shaved1": "slick black undercut",
    "shaved2": "tousled black undercut",
    "shaved3": "messy half shaved hair",
    "short1": "cropped black hair",
    "short2": "short black hair",
    "short3": "short wavy black hair",
    "short4": "a {hair} quiff",
    "short5": "short spiky black hair",
    "turban": "a {cloth} turban",
    "twists": "short black twists",
    "twists2": "flat black twists",
}

# What the eyes do, and what the mouth does; either may say nothing.
EXPRESSION = {
    "angryWithFang": ("angry eyes", "a fang"),
    "awe": ("big shiny eyes", "smirking"),
    "blank": ("a blank look", ""),
    "calm": ("happy closed eyes", "smiling"),
    "cheeky": ("cheeky eyes", "whistling"),
    "concerned": ("worried eyes", "open mouth"),
    "concernedFear": ("sad closed eyes", "open mouth"),
    "contempt": ("eyes looking down", "sneering"),
    "cute": ("winking eyes", "smiling"),
    "cyclops": ("one big eye", "grimacing"),
    "driven": ("determined eyes", "smiling"),
    "eatingHappy": ("happy closed eyes", "chewing"),
    "explaining": ("open eyes", "talking"),
    "eyesClosed": ("eyes closed", ""),
    "fear": ("scared wide eyes", "frowning"),
    "hectic": ("wide eyes", "showing teeth"),
    "lovingGrin1": ("heart eyes", "laughing"),
    "lovingGrin2": ("heart eyes", "grinning"),
    "monster": ("three eyes", "fangs"),
    "old": ("old eyes", "grumpy"),
    "rage": ("wide angry eyes", "shouting"),
    "serious": ("stern eyes", ""),
    "smile": ("", "smiling"),
    "smileBig": ("happy closed eyes", "grinning"),
    "smileLOL": ("tears of joy", "laughing"),
    "smileTeethGap": ("", "gap toothed grin"),
    "solemn": ("sad closed eyes", "frowning"),
    "suspicious": ("a raised eyebrow", ""),
    "tired": ("tired eyes", ""),
    "veryAngry": ("angry eyes", "frowning"),
}

FACIAL_HAIR = {
    "chin": "a black chin beard",
    "full": "a short black beard",
    "full2": "a black beard",
    "full3": "a thick black beard",
    "full4": "a {hair} beard",
    "goatee1": "a thin black goatee",
    "goatee2": "a black goatee",
    "moustache1": "a pencil moustache",
    "moustache2": "a long black moustache",
    "moustache3": "a big curled moustache",
    "moustache4": "a thin curled moustache",
    "moustache5": "a bushy black moustache",
    "moustache6": "a black moustache",
    "moustache7": "a wavy black moustache",
    "moustache8": "a huge curling moustache",
    "moustache9": "a {hair} moustache",
}

ACCESSORIES = {
    "eyepatch": "an eyepatch",
    "glasses": "square glasses",
    "glasses2": "round glasses",
    "glasses3": "black glasses",
    "glasses4": "white glasses",
    "glasses5": "small round glasses",
    "sunglasses": "sunglasses",
    "sunglasses2": "big sunglasses",
}
_DARK = {"sunglasses", "sunglasses2"}

MASK = {"medicalMask": "a white face mask", "respirator": "a teal respirator"}


def caption(attributes: Mapping[str, str]) -> str:
    """The caption of one face, such as "a person with tan skin, long black hair and sunglasses, smiling, in a red
    shirt": at most 32 words and punctuation marks.

    attributes: as `lowvram.data.peeps.attributes` gives them; what is left out is not mentioned, and a variant or
    colour that is not known here is named by its own words.
    """
    colours = {
        "hair": _colour(HAIR, attributes.get("headContrastColor", "#2c1b18")),
        "cloth": attributes.get("clothingName", "bright"),
    }
    accessory, mask = attributes.get("accessoriesVariant", ""), attributes.get("maskVariant", "")
    beard = "" if mask else attributes.get("facialHairVariant", "")
    expression = attributes.get("expressionVariant", "")
    eyes, mouth = EXPRESSION.get(expression, (_plain(expression), ""))
    eyes, mouth = "" if accessory in _DARK else eyes, "" if mask else mouth
    traits = [
        f"{_colour(SKIN, attributes['skinColor'])} skin" if "skinColor" in attributes else "",
        *(
            table.get(name, _plain(name)).format(**colours)
            for table, name in (
                (HEAD, attributes.get("headVariant", "")),
                (FACIAL_HAIR, beard),
                (ACCESSORIES, accessory),
                (MASK, mask),
            )
        ),
    ]
    parts = [_joined([trait for trait in traits if trait]), eyes, mouth]
    parts[0] = f"a person with {parts[0]}" if parts[0] else "a person"
    if "clothingName" in attributes:
        parts.append(f"in a {colours['cloth']} shirt")
    text = ", ".join(part for part in parts if part)
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _colour(names: Mapping[str, str], colour: str) -> str:
    """The name of a hex colour, or of the nearest in RGB."""
    if colour.lower() in names:
        return names[colour.lower()]
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", colour):
        return _plain(colour)

    def distance(other: str) -> int:
        return sum((int(colour[at : at + 2], 16) - int(other[at : at + 2], 16)) ** 2 for at in (1, 3, 5))

    return names[min(names, key=distance)]


def _plain(name: str) -> str:
    """ "longBangs2" -> "long bangs"."""
    return " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)).lower()


def _joined(words: list[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
