"""What a response, or a dataset, gives as the answer: text only, no mathematics.

Datasets give an answer bare, as a choice (``B``), as money (``\\$18.90``), or at the end of a
solution (GSM8K's ``#### 72``, MATH's ``\\boxed{}``). Responses give it in a box, in ``<answer>``
tags, or after "Answer:" and its likes; what stands last counts, and what is thought does not.
"""

import re
from collections.abc import Iterator
from decimal import Decimal

_THINKING = re.compile(r"<(/?)(?:think|thinking|thought)>", re.IGNORECASE)
_MARK = re.compile(
    r"""(?P<box>\\(?:boxed|fbox)\s*\{)
    | (?P<tag><answer>)
    | (?P<hashes>^\#{4}[ \t]*(?=[-+$\\]*[\d.][^a-z\n]*$))
    | (?P<heading>^[ \t#*_>]*(?:the\s)?(?:final\s|correct\s)?answer[ \t#*_]*\n)
    | (?P<line>(?:\b(?:answer|ans)\b|\u7b54\u6848)[*_`"'\s)\]}]*+
        (?:(?:to|of|for)\s[^\n.:]{1,80}?\s)?(?:(?:option|choice)\s)?
        (?:(?:is|are|was|be|equals|would\sbe|should\sbe|must\sbe)\b|[:=\uff1a\u662f\u4e3a])
        (?:\s(?:then|therefore|thus|just|simply)\b)?[*_`"'\s]*+[:\uff1a]?+(?!\s*not\b))""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|;|and|or|,\s*and|,\s*or|\\text\{\s*(?:and|or)\s*\})[\s$]*")
_CLAUSE = re.compile(r"[.;!?](?=\s|$)|,?\s(?:because|since|as|which|so|where|for)\s")
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?:\(([A-J])\)|([A-J])(?:[.):]|$))"
    r"(?!\s*(?:[-=+*/^<>,;&]|and\b|or\b))\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
_LAST_CHOICE = re.compile(r"(?<![a-zA-Z])\(?([A-J])\)?[\s.*_`$]*$")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|bf|rm|mbox|boxed|fbox)\s*\{([^{}]*)\}"
)
_INVISIBLE = re.compile(
    r"\\[ ,!;:]|\\(?:left|right|displaystyle|quad)(?![a-zA-Z])|[~$]|(?<!\d)\s|\s(?!\d)"
)
_NO_ANSWER = ("proof", "prove", "notfound", "null", "nan", "none", "n/a", "na", "unknown")
"""What datasets write where a problem has no answer, without spaces."""
LONGEST, MOST_WORDS = 500, 12
"""An answer of more characters, or more words of prose, is a text and no value."""


Found = tuple[str, bool]
"""An answer that a text gives, and whether it is final: before a box or a tag nothing counts."""


def given_answer(answer: str) -> str:
    """What a dataset's answer comes down to: the end of a solution, money without its sign, 1e-05
    in full. Empty where it is cut off."""
    found, _ = next(candidates(answer), (answer, False))
    return number_in_full(bare(found))


def unverifiable(answer: str) -> str:
    """Why no response can be compared with this answer; empty where one can."""
    given = given_answer(answer)
    unescaped = re.sub(r"\\[\\{}]", "", given)
    if unescaped.count("{") != unescaped.count("}") or ("boxed{" in answer and not given):
        return "cut off"
    visible = squeezed(given)
    if not re.search(r"[^\W_]|\\[a-zA-Z]", visible):
        return "empty"
    if (word := visible.strip(".()[]-").casefold()) in _NO_ANSWER:
        return f"no answer ({word})"
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", given)
    if len(given) > LONGEST or len(words) > MOST_WORDS:
        return "a text, not a value"
    return ""


def candidates(response: str) -> Iterator[Found]:
    """The answers that a text gives outside its thought, the last first, up to one that is final.

    That of a box or a tag which is cut off is empty.
    """
    said = outside_thinking(response)
    for mark in reversed(list(_MARK.finditer(said))):
        rest = said[mark.end() :]
        if not (mark["box"] or mark["tag"]):
            yield _line(rest), False
            continue
        content, closed, _ = rest.partition("</answer>")
        yield (_boxes(said, mark) if mark["box"] else content.strip() if closed else ""), True
        return


def outside_thinking(response: str) -> str:
    """A response without its thought; nothing of one that never stops to think."""
    tags = list(_THINKING.finditer(response))
    if not tags:
        return response
    return response[tags[-1].end() :] if tags[-1][1] else ""


def choice(text: str) -> tuple[str, str]:
    """The letter of a multiple-choice answer and what stands behind it: of ``(B)``, ``B. Paris``,
    ``option B``. Both are empty where there is none."""
    found = _CHOICE.fullmatch(_unwrapped(text).strip(" \t\n*_`$\\"))
    letter = (found[1] or found[2]) if found else ""
    if found is None or (letter.islower() and found[3]):
        return "", ""
    return letter.upper(), found[3].strip(" \\$*")


def last_choice(text: str) -> str:
    """The letter that the last line of a text is, or ends with; empty where it does neither."""
    line = text.rstrip().rpartition("\n")[2]
    found = _LAST_CHOICE.search(line)
    return choice(line)[0] or (found[1] if found else "")


def squeezed(text: str) -> str:
    """A text without what cannot be seen in it: dollars, spaces, commands of fonts."""
    text = re.sub(r"\\[dt]frac", r"\\frac", _unwrapped(text))
    return _INVISIBLE.sub("", text).rstrip(".")


def says_something(text: str) -> bool:
    """Whether a text holds a number, a formula or a single letter, and not words alone."""
    letter = r"(?<![a-zA-Z])(?!(?:a|I)\s+[a-z])[a-zA-Z](?![a-zA-Z])"
    return re.search(rf"\d|[\\$=]|{letter}", text) is not None


def _boxes(said: str, last: re.Match[str]) -> str:
    """What the last box holds, with those that it is listed with; empty where it is cut off."""
    content = _balanced(said, last.end())
    if content is None:
        return ""
    begin, listed = last.start(), [content]
    for earlier in reversed(list(_MARK.finditer(said, 0, begin))):
        content = _balanced(said, earlier.end()) if earlier["box"] else None
        if content is None:
            break
        between = said[earlier.end() + len(content) + 1 : begin]
        if not _BETWEEN_BOXES.fullmatch(between):
            break
        begin, listed = earlier.start(), [content, *listed]
    return ", ".join(dict.fromkeys(listed))


def _balanced(text: str, start: int) -> str | None:
    """What stands from ``start`` to the brace that closes; None where none does."""
    depth = 1
    for found in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth:
            return text[start : start + found.start()]
    return None


def _line(rest: str) -> str:
    """What follows "Answer:", as far as it is the answer: a formula, or a line up to its clause."""
    rest = rest.lstrip(" \t\n*_`#:\u3000")
    for opening, closing in (("$$", "$$"), (r"\[", r"\]")):
        if rest.startswith(opening):
            return rest[len(opening) :].partition(closing)[0].strip()
    line = rest.partition("\n")[0]
    if line.startswith("$") and "$" in line[1:]:
        return line[: line.index("$", 1) + 1]
    return _CLAUSE.split(line, maxsplit=1)[0].strip(" \t*_`\"'")


def bare(text: str) -> str:
    """Without signs of money, with which LaTeX begins a formula, and with one kind of minus."""
    text = text.replace(r"\$", "").replace("\u2212", "-").strip()
    return re.sub(r"\$(?=[\d.])", "", text) if text.count("$") % 2 else text


def number_in_full(text: str) -> str:
    """``1e-05`` as 0.00001: mathematics takes the e for Euler's number."""
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d{1,3}", text):
        return f"{Decimal(text):f}"
    return text


def _unwrapped(text: str) -> str:
    for _ in range(3):  # how deep fonts are nested in practice
        text = _WRAPPED.sub(r"\1", text)
    return text
