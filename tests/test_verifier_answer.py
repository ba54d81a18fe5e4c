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
        ("hence x = \\frac{3}{4}.", "x = \\frac{3}{4}"),
        ("that leaves -7", "-7"),
        ("that is 5-3", "5-3"),
        ("a ratio of 3/4", "3/4"),
        ("\\boxed{2} and \\boxed{-3}", "2, -3"),
        ("$\\boxed{2}$, $\\boxed{3}$ or \\(\\boxed{4}\\)", "2, 3, 4"),
        ("\\boxed{5}, \\boxed{5}", "5"),
        ("\\boxed{4}. So \\boxed{5}", "5"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("2 + 3 gives \\boxed{5", None),
        ("\\boxed{5", None),
        ("the answer is therefore **99**.", "99"),
        ("the answer to the question must be 7 because 3 is odd", "7"),
        ("The correct option is (C).", "(C)"),
        ("The answers are 2 and 3.", "2 and 3"),
        ("The answers are $2$ and $3$.", "$2$ and $3$"),
        ("The answer is \\(2\\), \\(3\\) or \\(5\\), since 7 fails.", "\\(2\\), \\(3\\) or \\(5\\)"),
        ("The answers are $$2$$ and $$3$$.", "$$2$$ and $$3$$"),
        ("The answer is $7$ (or $8$).", "$7$ (or $8$)"),
        ("The answer is $7$ apples and 8 pears.", "$7$ apples and 8 pears"),
        ("The answer is $7$ million.", "$7$ million"),
        ("The answer is $7$ and this is unique.", "7"),
        ("The answer is $2n$ for all $n \\ge 1$.", "2n"),
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
        ("So we get $\\sqrt{3}$.", "$\\sqrt{3}$"),
        ("That makes 2^10.", "2^10"),
        ("So we get 3 × 10^8.", "3 × 10^8"),
        ("Hence x = 5 + 3", "x = 5 + 3"),
        ("So y = 4x", "y = 4x"),
        ("so 4 million", "4 million"),
        ("Thus 12 + x.", "12 + x"),
        ("So (3, 5)", "(3, 5)"),
        ("the roots are 3 and 5", "3 and 5"),
        ("So 4!", "4!"),
        ("So x > 7.", "x > 7"),
        ("So after the exchange she has 17 apples left.", "17 apples"),
        ("The total is 7 · 9 = 63. $\\blacksquare$", "7 · 9 = 63"),
        ("\\[ x = 12 \\]", "x = 12"),
        ("Since n is not even, we get 5.", "5"),
        ("It is not 7.", None),
        ("I can't decide between 6 and 7", None),
        ("Thus x is at least 7.", None),
        ("it is negative 5", None),
        ("by Theorem 3.", None),
        ("see equation (3)", None),
        ("Is the answer 7? No.", None),
        ("The remainder when divided by 7 is 12.", "12"),
        ("ln 12", "ln 12"),
        ("it is divisible by 12.", None),
        ("a factor of 12", None),
        ("x must exceed 12.", None),
        ("12 choose 5", None),
    ],
)
def test_a_value_that_a_response_ends_on_is_taken_whole_or_not_at_all(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{7} is incorrect; the answer is 9", "9"),
        ("\\boxed{7} is wrong.", None),
        ("Not \\boxed{7}", None),
        ("I don't think it is \\boxed{7}", None),
        ("It cannot be $\\boxed{7}$.", None),
        ("The wrong answer is 7", None),
        ("The answer is 7. Actually no: it is 8.", "8"),
        ("The answer is 7.\nThat is wrong.", None),
        ("Answer: 8, not 7", "8"),
        ("\\boxed{7} is the answer. It is not 8.", "7"),
        ("The answer is 7. This is correct.", "7"),
        ("\\boxed{7}\n\nWait, that is wrong. The answer is 8.", "8"),
        ("$\\boxed{7}$. Actually, no. It should be 8.", None),
        ("\\[\\boxed{7}\\]\n\nHmm, I made an error: it is 8.", None),
        ("\\boxed{7}\n\nCorrection: \\boxed{8}", "8"),
        ("\\boxed{7}. Many get 8, but that is wrong.", "7"),
        ("\\boxed{7}.\n\nIt is wrong to assume that order matters.", "7"),
        ("\\boxed{7}. Wait, let me check: 3 + 4 = 7. Actually, the formula gives it at once.", "7"),
    ],
)
def test_an_answer_that_is_denied_or_taken_back_is_none(text, expected):
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
    start = time.thread_time()
    assert extract_answer("\\boxed{1}\\text{" + " " * 45_000 + "\\boxed{6}") == "6"
    assert time.thread_time() - start < 5


def test_white_space_after_the_answer_does_not_hide_it():
    assert extract_answer("\\boxed{5}" + " " * 200_000) == "5"


@pytest.mark.parametrize(
    "unit",
    [
        "\\boxed{", "\\boxed{}", "\\boxed{1},", "{", "answer is ", "9", "\\", "1,", "\\frac{1}", "<|", "$", "(", "a ",
        "not ", "1 and ", "\\boxed{1}wait, ", "\n", "\\boxed{1}\n", "7 is ", "\\(", "x_",
    ],
)  # fmt: skip
def test_a_megabyte_of_hostile_text_is_read_in_linear_time(unit, request):
    start = time.thread_time()
    extract_answer(unit * (10**6 // len(unit)), FINISH)
    assert time.thread_time() - start < 5
