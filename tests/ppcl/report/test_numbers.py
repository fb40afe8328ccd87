"""Numbers of the report, as people read them."""

import pytest

from ppcl.report import numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (numbers.count(20_430_000_000), "20.4 B"),
        (numbers.count(999), "999"),
        (numbers.count(None), "–"),
        (numbers.significant(0.12), "0.120"),
        (numbers.significant(1234.5), "1234"),
        (numbers.significant(0), "0"),
        (numbers.significant(123.4), "123"),
        (numbers.significant(0.00001234), "1.23e-05"),
        (numbers.percent(-0.031), "\u22123.1\u202f%"),
        (numbers.percent(-0.0001), "0.0\u202f%"),
        (numbers.percent(6.1, scale=1), "6.1\u202f%"),
        (numbers.correlation(-0.1786), "\u22120.18"),
        (numbers.correlation(None), "–"),
        (numbers.between(0.7, 0.78), "70.0 to 78.0"),
        (numbers.between(None, 1), ""),
        (numbers.seconds(0.0382), "38.2 ms"),
        (numbers.seconds(250), "4 min 10 s"),
        (numbers.seconds(11100), "3 h 05 min"),
    ],
)
def test_how_numbers_are_written(text, expected):
    assert text == expected
