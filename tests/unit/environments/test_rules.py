# SPDX-License-Identifier: Apache-2.0
"""Results in responses: what is right and what is not, and data whose own solutions are right."""

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from nemo_aligner.environments.mathematics import right
from nemo_aligner.environments.rules import gsm8k, matches
from nemo_aligner.environments.workers import WorkerPool

DATA = os.environ.get("NEMO_ALIGNER_TEST_DATA")


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("72", r"So she sold \boxed{72}.", 1.0),
        ("72", r"Either \boxed{72} or rather \boxed{73}", 0.0),
        (r"\frac{1}{2}", r"Half of it: $0.5$", 1.0),
        ("$x+1$", "$1 + x$", 1.0),
        ("x+1", "$x-1$", 0.0),
        (r"\{1,2\}", r"$\{2, 1\}$", 1.0),
        (r"2\sqrt{3}", r"$\sqrt{12}$", 1.0),
        ("5", "", 0.0),
        (7, "It is 7", 1.0),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", 1.0),
        (r"\text{Evelyn}", r"\boxed{\text{Debra}}", 0.0),
    ],
)
def test_mathematics(answer: object, response: str, reward: float):
    assert right(response=response, row={"answer": answer}) == reward


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("5 + 3 = <<5+3=8>>8\n#### 8", "The sum is 8.", 1.0),
        ("8", "8.0", 1.0),
        ("#### 1,080", "$1080", 1.0),
        ("-3", "minus: -3", 1.0),
        ("3", "-3", 0.0),
        (".5", "0.50", 1.0),
        ("8", "8 and not 9", 0.0),
        ("8", "#### 8 and not 9", 1.0),
        ("8", "eight", 0.0),
        ("8", "#### eight", 0.0),
        ("8", "", 0.0),
    ],
)
def test_numbers(answer: str, response: str, reward: float):
    assert gsm8k(response=response, row={"expected": answer}, ground_truth="expected") == reward


ODD = [
    # Math-Verify's issues 65, 63 and 59.
    r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}",
    r"\boxed{10^{(5^{5^{5^{5^{5}}} \cdot \log_{10}(5)} - 4)}}",
    r"{@Neillier 1276915 4951077 ник增高人权 国 {1,1-3-10鼓励不停);5个_GENERAL2全校。 _HEADERS1 Orchestra}",
    r"\boxed{\log_{2^5}(\log_{2^4}(\log_{2^3}(\log_{2^2}(\log_{2^1}2^{2^{2^{2^{4^{16}}}}}))))}",
    r"$9^{9^{9^9}}$",
    r"\boxed{2^{2^{2^{2^{2^2}}}}}",
    r"$100000000!$",
    r"\boxed{\sum_{i=1}^{10^{12}} i^i}",
    r"\boxed{\int_0^{10^9} e^{x^{x^x}} dx}",
    r"\boxed{\prod_{n=1}^{\infty} n}",
    *(r"\boxed{" + "{" * n for n in (1, 50, 5000)),
    *("(" * n + "1" + ")" * n for n in (10, 1000)),
    *(r"\boxed{" + r"\frac{1}{" * n + "2" + "}" * (n + 1) for n in (5, 60)),
    *("9" * n for n in (100, 5000, 100_000)),
    *(f"$1e{n}$" for n in (10, 400, 10**9)),
    *(r"\boxed{" + text + "}" for text in ("", " ", "\\", "}", "$", "\x00", "\N{CAT FACE}", "\u202e5")),
    *(
        rf"\boxed{{{a} {op} {b}}}"
        for a in ("0", "-0", "x", r"\infty")
        for op in ("/", "^", r"\div", "=", "<", "!")
        for b in ("0", "y", r"\infty")
    ),
    *(f"${word}$" for word in ("nan", "inf", "None", "True", "i", "e", r"\pi", "lambda: 1", "exec('1')")),
    *(rf"\boxed{{{'1,' * n}1}}" for n in (3, 300)),
    *("the answer is " * n for n in (1, 3000)),
    *(rf"\begin{{pmatrix}}{' & '.join('1' * n)}\end{{pmatrix}}" for n in (2, 40)),
    *(rf"\sqrt[{n}]{{-{n}}}" for n in range(12)),
    *(rf"\log_{{{n}}}(\log_{{{n}}}({n}))" for n in range(12)),
    *(rf"\boxed{{\sin({n}x)^{{{n}}} + \cos({n}x)^{{{n}}}}}" for n in range(1, 5)),
    *(rf"$x_{{{n}}} = {n}$ \text{{ or }} $\frac{{{n}}}{{7}} \pm {n}$" for n in range(60)),
    *(rf"{n}^{{\circ}} \text{{ units}} \% {n}" for n in range(12)),
]


def test_odd_answers_get_a_reward_in_time():
    assert len(ODD) >= 200
    calls = [{"response": response, "row": {"answer": "5"}} for response in ODD]
    began = time.monotonic()
    with WorkerPool(
        "reward", "nemo_aligner.environments.mathematics.right", workers=2, seconds=1, memory=1 << 30
    ) as pool:
        replies = pool.call_all(calls)
    assert time.monotonic() - began < 120
    told = [(response[:60], reply) for response, reply in zip(ODD, replies, strict=True)]
    assert not [one for one in told if one[1].error]
    assert {reply.value for reply in replies if not reply.lost} <= {0.0, 1.0}
    assert 0 < sum(bool(reply.lost) for reply in replies) < 20, [one for one in told if one[1].lost]


def test_rows_without_an_answer_are_told():
    with pytest.raises(KeyError, match=r"no 'answer', but text, solution: set arguments\.ground_truth"):
        right(response="1", row={"text": "", "solution": "1"})
    with pytest.raises(ValueError, match="'answer' has no number"):
        gsm8k(response="1", row={"answer": "one"})


def test_a_format_is_a_pattern_of_the_whole_text():
    pattern = r"\A<think>.+?</think>\s*<answer>[^<]+</answer>\s*\Z"
    assert matches(response="<think>a\nb</think>\n<answer>1</answer>", pattern=pattern) == 1
    assert matches(response="x<think>a\nb</think>\n<answer>1</answer>", pattern=pattern) == 0


@pytest.mark.skipif(DATA is None, reason="NEMO_ALIGNER_TEST_DATA names the folder of real data")
def test_every_solution_of_the_data_is_right():
    """MATH-500's by mathematics, GSM8K's by numbers; and one of another problem is wrong."""
    assert DATA is not None
    rows = [json.loads(line) for line in (Path(DATA) / "math500.jsonl").read_text().splitlines()]
    with WorkerPool("reward", "nemo_aligner.environments.mathematics.right", workers=2, seconds=20) as pool:
        found = pool.call_all([{"response": row["solution"], "row": row} for row in rows])
    wrong = [(row["answer"], reply) for row, reply in zip(rows, found, strict=True) if reply.value != 1.0]
    assert len(wrong) <= 5, wrong
    with gzip.open(Path(DATA) / "gsm8k_test.jsonl.gz", "rt") as file:
        sums = [json.loads(line) for line in file]
    assert all(gsm8k(response=row["answer"], row=row) == 1.0 for row in sums)
