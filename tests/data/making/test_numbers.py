"""Final numbers of answers and numbers of questions, against values worked out by hand."""

from fractions import Fraction

import pytest

from solar_jax.data.making.numbers import final_number, lost_and_added


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("She has <<48/2=24>>24.\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("#### $1,234.50", "2469/2"),
        ("#### -7", "-7"),
        ("#### .5", "1/2"),
        ("5\n#### 42\nThanks", "42"),
        ("#### 12 cm²", "12"),
        ("#### 5 km/h", "5"),
        (r"so \boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{\dfrac34}", "3/4"),
        (r"\boxed{1\frac{1}{2}}", "3/2"),
        (r"\boxed{-\frac{1}{2}}", "-1/2"),
        (r"\boxed{42\text{ cm}}", "42"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{\$12{,}000}", "12000"),
        (r"\boxed{1\,234}", "1234"),
        (r"\boxed{x=5}", "5"),
        (r"$$\boxed{7}$$ as said: \boxed{8}", "8"),
        ("The answer is: 42", "42"),
        ("The answer is 42.", "42"),
        ("The answer is 42! Well done.", "42"),
        ("The answer is:\n42", "42"),
        ("The answer is $18.", "18"),
        ("The answer is: -$5", "-5"),
        ("The answer is: $\\boxed{42}$.", "42"),
        ("The answer is \\(12\\).", "12"),
        ("the final answer is **12**", "12"),
        ("**Answer:** 3.5 hours", "7/2"),
        ("The answer is 1 1/2 cups", "3/2"),
        ("The answer is 1½ cups", "3/2"),
        ("The answer is 20 percent", "20"),
        ("The answer is 42, since 40+2=42.", "42"),
        ("The answer is 42. This answer is reasonable.", "42"),
        ("So she sold 48+24 = 72 clips altogether.", "72"),
        ("She has 5 apples left.", "5"),
        ("-3", "-3"),
        ("The answer is 10000000000000000000001", "10000000000000000000001"),
    ],
)
def test_the_final_number_is_found_however_it_is_written(answer, expected):
    assert final_number(answer) == Fraction(expected)


@pytest.mark.parametrize(
    "answer",
    [
        "", "no idea", r"\boxed{x^2+1}", r"\boxed{(1,2)}", r"\boxed{3,4}", r"\boxed{2x}", r"\boxed{3\sqrt{2}}",
        r"\boxed{2\pi}", r"\boxed{10^5}", r"\boxed{5!}", "The answer is 5 apples and 3 pears.", "The answer is 3, 4",
        "The answer is 1/0", "#### 1,23", "The answer is 7:30.", "The answer is 3x10", "The answer is 5-7",
        "A) 3\nB) 4\nThe answer is B.", "first 3, then 4", "9" * 5000, f"#### {'9' * 5000}",
        r"an early \boxed{4}, but then \boxed{x}", r"\boxed{" * 20000,  # a model that repeats itself
    ],
)  # fmt: skip
def test_what_is_not_one_number_is_none(answer):
    assert final_number(answer) is None


@pytest.mark.parametrize(
    ("original", "rephrased", "lost", "added"),
    [
        ("3 apples and 4 pears", "4 pears and 3 apples", [], []),
        ("3 apples and 4 pears", "some apples and 4 pears", [3], []),
        ("3 apples", "3 apples and 7 pears", [], [7]),
        ("3 apples and 3 pears", "3 apples and as many pears", [3], []),  # each as often as it occurs
        ("1,000 and $5.50", "1000 and 5.5 dollars", [], []),
        ("10-20", "10 to 20", [], []),
        (r"$\frac{3}{4}$ of it", "3/4 of it", [], []),
        ("two boxes of 1/2 a kilo", "2 boxes, half a kilo each", [], []),
        ("twenty-five", "25", [], []),
        ("2 boxes", "two boxes", [], []),
        ("one of them has 2", "2 are what somebody has", [], []),  # a word alone says little
        ("two boxes", "3 boxes", [], [3]),
    ],
)
def test_numbers_that_a_rephrasing_loses_or_adds_are_named(original, rephrased, lost, added):
    assert lost_and_added(original, rephrased) == (lost, added)
