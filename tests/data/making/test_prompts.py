"""The part of a reply that is taken: the question or the answer, without what models like to write around it."""

import pytest

from solar_jax.data.making.prompts import MANNERS, answer_messages, rephrase_messages, said_answer, said_question


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("How many?", "How many?"),
        (' "How many?"\n', "How many?"),
        ("“How many?”", "How many?"),
        ("Rephrased question: How many?", "How many?"),
        ("**Rephrased Question:** How many?", "How many?"),
        ("Here is the rephrased question:\n\nHow many?", "How many?"),
        ("<think>\nThree, so\n</think>\n\nHow many?", "How many?"),
        ('"Two," said Ada, "or three?"', '"Two," said Ada, "or three?"'),  # these quotes are not around all of it
        ("Here is a riddle: how many?", "Here is a riddle: how many?"),
        ("What is the question: 3 or 4?", "What is the question: 3 or 4?"),
        ("<think>it never ends", ""),
        ("", ""),
        ('"', '"'),
    ],
)
def test_a_question_is_taken_out_of_a_reply(reply, expected):
    assert said_question(reply) == expected


def test_an_answer_is_all_of_a_reply_but_its_thoughts():
    assert said_answer("<think>3</think>Question: 4\n") == "Question: 4"


def test_braces_in_a_question_stay_as_they_are():
    assert answer_messages(r"What is \frac{3}{x}?")[1]["content"] == r"What is \frac{3}{x}?"


def test_several_rephrasings_ask_in_several_manners():
    asked = {rephrase_messages("q", k)[0]["content"] for k in range(len(MANNERS))}
    assert len(asked) == len(MANNERS)
