"""Incremental text equals whole text, and stop strings never leak in part."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import planetserve
from planetserve.gateway.detokenize import StopStrings, TokenDecoder
from planetserve.gateway.sampling import Sampled, SamplingParams
from planetserve.gateway.text import Row, TextRequest

TOKENIZER = Tokenizer.from_file(f"{planetserve.__path__[0]}/demo_model/tokenizer.json")
PROMPT = TOKENIZER.encode("A list is").ids


@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text(text: str) -> None:
    decoder = TokenDecoder(TOKENIZER, PROMPT, skip_special_tokens=True)
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert "".join(map(decoder.add, ids)) == TOKENIZER.decode(ids)


def test_a_character_of_several_tokens_comes_whole() -> None:
    decoder = TokenDecoder(TOKENIZER, PROMPT, skip_special_tokens=True)
    ids = TOKENIZER.encode("🪐", add_special_tokens=False).ids
    assert len(ids) > 1
    assert [decoder.add(token) for token in ids] == [""] * (len(ids) - 1) + ["🪐"]


PIECES = st.lists(st.text("ab", max_size=3), max_size=12)
STRINGS = st.lists(st.text("ab", min_size=1), min_size=1, max_size=3)


@given(PIECES, STRINGS)
def test_text_ends_before_the_first_stop_string(pieces: list[str], strings: list[str]) -> None:
    stop, passed, found = StopStrings(strings), "", None
    seen = ""
    for piece in pieces:
        seen += piece
        text, found = stop.add(piece)
        passed += text
        if found is not None:
            break
    else:
        passed += stop.flush()
    ends = [seen.find(string) for string in strings if string in seen]
    assert (found is not None) == bool(ends)
    if found is None:
        assert passed == seen
    else:
        assert seen.startswith(passed + found)
        assert not any(string in passed for string in strings)


def test_what_may_be_the_beginning_of_a_stop_string_waits() -> None:
    stop = StopStrings(["\nUser:"])
    assert stop.add("yes\nUs") == ("yes", None)
    assert stop.add("ual") == ("\nUsual", None)
    assert stop.add("\nUser: no") == ("", "\nUser:")


def row(**settings: object) -> Row:
    settings = {"sampling": SamplingParams(), "max_tokens": 9, **settings}
    request = TextRequest(prompt_ids=PROMPT, **settings)  # type: ignore[arg-type]
    return Row(0, 0, request, TOKENIZER)


def feed(answer: Row, *tokens: int) -> list[tuple[str, str | None, object]]:
    deltas = []
    for token in tokens:
        answer.sampling.take(token)
        delta = answer.add(Sampled(token))
        deltas.append((delta.text, delta.finish_reason, delta.stop_reason))
    return deltas


def test_how_an_answer_ends() -> None:
    (the, dog) = TOKENIZER.encode(" the", add_special_tokens=False).ids[:1] * 2
    assert feed(row(eos_ids=frozenset({2})), the, 2) == [(" the", None, None), ("", "stop", None)]
    assert feed(row(stop_ids=frozenset({dog})), dog) == [("", "stop", dog)]
    included = row(stop_ids=frozenset({dog}), include_stop=True)
    assert feed(included, dog) == [(" the", "stop", dog)]
    assert feed(row(max_tokens=2), the, the)[1] == (" the", "length", None)
    assert feed(row(stop=("he",)), the) == [(" t", "stop", "he")]
    # What was held back for a stop string that does not come is shown at the end.
    assert feed(row(stop=("the!",), max_tokens=1), the) == [(" the", "length", None)]
