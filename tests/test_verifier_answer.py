import time

import pytest

from megatron_oreal.verifier.answer import conclusion, extract_answer

FINISH = ["<conclude>", "**Final Answer**", "</think>"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so \\boxed{5}.", "5"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}} is it", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\left\\{1, 2\\right\\}}", "\\left\\{1, 2\\right\\}"),
        ("\\boxed{ \\{ }", "\\{"),
        ("\\boxed 7", "7"),
        ("\\fbox{A}", "A"),
        ("\\boxed{5} and the broken \\boxed{6", "5"),
        ("\\boxed{} The answer is 4.", "4"),
        ("The answer is $\\frac{1}{2}$ because 3 is odd.", "\\frac{1}{2}"),
        ("the final answer is: 3.5. Done", "3.5"),
        ("**Answer:** 12", "12"),
        ("Answer: \\(x=3\\)", "x=3"),
        ("answer is 1\nno, the answer is 2", "2"),
        ("The answer is 5 but \\boxed{6}", "6"),
        ("we get 3, then 1,250.", "1,250"),
        ("hence x = \\frac{3}{4}.", "\\frac{3}{4}"),
        ("that leaves -7", "-7"),
        ("that is 5-3", "3"),
        ("a ratio of 3/4", "3/4"),
        ("\\boxed{2} and \\boxed{-3}", "2, -3"),
        ("$\\boxed{2}$, $\\boxed{3}$ or \\(\\boxed{4}\\)", "2, 3, 4"),
        ("\\boxed{5}, \\boxed{5}", "5"),
        ("\\boxed{4}. So \\boxed{5}", "5"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("2 + 3 gives \\boxed{5", "3"),
        ("\\boxed{5", None),
        ("the answer is therefore **99**.", "99"),
        ("the answer to the question must be 7 because 3 is odd", "7"),
        ("The correct option is (C).", "(C)"),
        ("The answers are 2 and 3.", "2 and 3"),
        ("Answer: $\\$1,250$ in all", "\\$1,250"),
        ("Could it be 12?", None),
        ("There are 5 of them and their product is what was asked for", None),
        ("nothing here", None),
        ("", None),
    ],
)
def test_final_answer_is_read_in_order_box_statement_number(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\\boxed{1}</think> \\boxed{2}", "2"),
        ("<think>maybe \\boxed{1}</think> I cannot tell", None),
        ("\\boxed{1} <conclude> \\boxed{2} </think> \\boxed{3}", "3"),
        ("x </think> 4 **Final Answer** 5", "5"),
        ("no finish word, \\boxed{9}", "9"),
        ("\\boxed{9}</think>", None),
    ],
)
def test_only_what_follows_the_last_finish_word_counts(text, expected):
    assert extract_answer(text, FINISH) == expected


@pytest.mark.parametrize("stop", ["<|im_end|>", "</s>", "<|endoftext|><|im_end|>", "<eos>\n"])
def test_stop_tokens_are_no_part_of_the_answer(stop):
    assert extract_answer("The answer is 5" + stop) == "5"


def test_a_stop_word_of_another_form_is_given_by_name():
    assert conclusion("The answer is 5 STOP", [], ["STOP"]) == "The answer is 5"


def test_much_white_space_between_two_boxes_is_read_in_linear_time():
    start = time.perf_counter()
    assert extract_answer("\\boxed{1}\\text{" + " " * 45_000 + "\\boxed{6}") == "6"
    assert time.perf_counter() - start < 2


def test_white_space_after_the_answer_does_not_hide_it():
    assert extract_answer("\\boxed{5}" + " " * 200_000) == "5"


@pytest.mark.parametrize(
    "unit", ["\\boxed{", "\\boxed{}", "\\boxed{1},", "{", "answer is ", "9", "\\", "1,", "\\frac{1}", "<|", "$"]
)
def test_a_megabyte_of_hostile_text_is_read_in_linear_time(unit, request):
    start = time.perf_counter()
    extract_answer(unit * (10**6 // len(unit)), FINISH)
    assert time.perf_counter() - start < 5
