"""Units of measurement behind a value: which there are, and where in a text they begin."""

import re
from dataclasses import dataclass

Unit = tuple[tuple[str, int], ...]
"""Symbols in alphabetical order, each with its power: metres per second are (("m", 1), ("s", -1))."""

MAX_CHARS = 80
"""A unit is looked for in so many characters at the end of a text."""

_SI = {
    "m": "meter metre", "g": "gram", "s": "second sec", "L": "liter litre", "N": "newton", "J": "joule",
    "W": "watt", "V": "volt", "A": "ampere amp", "C": "coulomb", "F": "farad", "H": "henry henrie",
    "T": "tesla", "Pa": "pascal", "Hz": "hertz", "Wb": "weber", "Ω": "ohm", "mol": "mole",
    "eV": "electronvolt", "Wh": "watthour", "cal": "calorie", "bit": "bit", "byte": "byte",
}  # fmt: skip
_PREFIXES = {"k": "kilo", "M": "mega", "G": "giga", "T": "tera", "m": "milli", "µ": "micro", "n": "nano",
             "p": "pico", "c": "centi", "d": "deci"}  # fmt: skip
_OTHERS = {
    "°": "° degree deg", "°C": "°C celsius", "°F": "°F fahrenheit", "K": "K kelvin", "rad": "radian rad",
    "inch": "inch inche in", "foot": "foot feet ft", "yard": "yard yd", "mile": "mile mi",
    "pound": "pound lb", "ounce": "ounce oz", "ton": "ton tonne", "gallon": "gallon gal", "quart": "quart qt",
    "pint": "pint pt", "cup": "cup", "acre": "acre", "hectare": "hectare ha", "min": "minute min",
    "hour": "hour hr h", "day": "day", "week": "week", "month": "month", "year": "year yr",
    "dollar": "dollar USD", "cent": "cent", "euro": "euro EUR", "unit": "unit", "rpm": "rpm",
    "atm": "atmosphere atm", "bar": "bar", "dB": "decibel dB", "cd": "candela cd", "lm": "lumen lm",
    "lx": "lux lx", "sr": "steradian sr", "light year": "lightyear ly", "rev": "revolution rev",
}  # fmt: skip
_COMPOUND: dict[str, Unit] = {"mph": (("hour", -1), ("mile", 1)), "kph": (("hour", -1), ("km", 1))}


def _table() -> dict[str, str]:
    table = {}
    for symbol, names in _SI.items():
        table[symbol] = symbol
        table |= {form: symbol for name in names.split() for form in (name, name + "s")}
        for short, long in _PREFIXES.items():
            if short in "cd" and symbol not in ("m", "L", "g"):
                continue
            table[short + symbol] = short + symbol
            table |= {long + form: short + symbol for name in names.split() for form in (name, name + "s")}
    for symbol, names in _OTHERS.items():
        table |= {form: symbol for name in names.split() for form in (name, name + "s" * (len(name) > 1))}
    # The same by other characters, and what a prefix makes of a unit that has its own name.
    table |= {"l": "L", "ml": "mL", "dl": "dL", "cl": "cL", "lbs": "pound", "celsius": "°C", "hertz": "Hz"}
    table |= {p + short: p + long for p in "kMGT" for short, long in (("b", "bit"), ("B", "byte"))}
    table |= {name.replace("µ", mu): symbol for name, symbol in table.items() for mu in ("μ", "u")}
    table |= {name.replace("Ω", ohm): symbol for name, symbol in table.items() for ohm in (r"\Omega", "Ω")}
    return {name: symbol for name, symbol in table.items() if name not in ("as", "is", "us")}


_NAMES = _table()
_WRITTEN_CLOSE = frozenset({"cm", "mm", "km", "kg", "ft", "yd", "lb", "oz", "mL", "kW", "Hz", "kHz", "MHz"})
"""Short names that are units right behind a number too: 15cm. Others there are letters: 2mg."""
_ITEM = re.compile(
    r"(?:(?P<before>square|sq\.?|cubic|cu\.?) )?"
    r"(?P<name>°(?: ?[CF](?![A-Za-z]))?|(?:[kM] ?)?\\Omega(?![A-Za-z])|[A-Za-zµμΩ]+)\.?"
    r"(?: (?P<after>squared|cubed)(?![A-Za-z])| ?\^ ?(?:\{ ?(?P<braced>-?[0-9]) ?\}|(?P<bare>-?[0-9])))?"
)
_WORDED = re.compile(r"(?<=[a-z]) per (?=[a-z])")
_TIMES = re.compile(r" ?(?:\\cdot(?![A-Za-z])|[·⋅*]) ?")
_BEGIN = re.compile(r"°|(?<![A-Za-z\\µμΩ])(?:[A-Za-zµμΩ]|\\Omega)")


_VALUE_END = re.compile(
    r"(?:[0-9})\]°!]|(?<![A-Za-z\\])[A-Za-z]{1,2}|\\(?!cdot|times|div|pm|mp|frac|sqrt|cup|cap|in|le|ge|ne)[A-Za-z]+)$"
)

_WORD_BEFORE = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3}")
"""5 days a week are no weeks."""


def is_unit(name: str) -> bool:
    """Whether a name is that of a unit."""
    return _symbol(name) is not None


def is_written_close(name: str) -> bool:
    """Whether a name right behind a number is a unit, and no product of letters."""
    return is_unit(name) and (name in _WRITTEN_CLOSE or len(name) > 2 or name.startswith("°"))


def _symbol(name: str) -> str | None:
    return _NAMES.get(name) or _NAMES.get(name.lower() if len(name) > 3 else name)


def read_unit(text: str) -> Unit | None:
    """The unit that a text states, or None if it states anything else: `m/s^2`, `kg\\cdot m`, `J/(kg K)`,
    `miles per hour`, `square feet`."""
    text = _TIMES.sub(" ", _WORDED.sub("/", text[: MAX_CHARS + 1].strip()))
    if len(text) > MAX_CHARS:
        return None
    text = re.sub(r"(?i)\bdegrees? (?=celsius|fahrenheit|[CF]\b)|\b(?<=light)[ -](?=years?\b)", "", text)
    powers: dict[str, int] = {}
    at, below, in_brackets = 0, False, False
    while at < len(text):
        match = _ITEM.match(text, at)
        if match is None:
            return None
        name = match["name"].replace(" ", "")
        if name not in _COMPOUND and _symbol(name) is None:
            return None
        power = int(match["braced"] or match["bare"] or 1)
        power = {"s": 2, "c": 3}.get((match["before"] or match["after"] or " ")[0], power)
        for symbol, own in _COMPOUND.get(name) or ((_symbol(name) or "", 1),):
            powers[symbol] = powers.get(symbol, 0) + (-own if below else own) * power
        at = match.end()
        if in_brackets and text[at : at + 1] == ")":
            in_brackets, at = False, at + 1
        below = in_brackets
        between = re.compile(r" ?/ ?(\(? ?)| ").match(text, at)
        if between is not None and between.end() < len(text):
            if "/" in between[0]:
                below, in_brackets = True, "(" in between[0]
            at = between.end()
        elif at < len(text):
            return None
    return tuple(sorted(item for item in powers.items() if item[1])) if powers and not in_brackets else None


@dataclass(frozen=True)
class Measured:
    """A value with a unit."""

    value: str
    unit: Unit
    is_short: bool
    """Whether its names are of one or two letters, so that behind others they may be letters too: of x m."""
    may_be_letters: bool
    """Whether what is taken for the unit is short and right behind the value: 5m, 2mg, but not 5 m."""


def split_unit(text: str) -> Measured | None:
    """A value and the unit at its end, or None where there is no known one, or nothing before it."""
    text = re.sub(r"(?<=[A-Za-z]) of [A-Za-z ]*$", "", text)
    for begin in _BEGIN.finditer(text, max(0, len(text) - MAX_CHARS)):
        at = begin.start()
        value = text[:at].rstrip()
        if not _VALUE_END.search(value) or _WORD_BEFORE.search(value):
            continue
        unit = read_unit(text[at:])
        if unit is not None:
            is_short = not any(is_written_close(name) for name in re.findall("°|[A-Za-zµμΩ]+", text[at:]))
            return Measured(value, unit, is_short, is_short and at == len(value))
    return None
