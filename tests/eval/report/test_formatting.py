"""Numbers as people read them."""

from __future__ import annotations

import pytest

from pl_attnedit.eval.report import formatting as f


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f.significant(0.0941), "0.0941"),
        (f.significant(1.3), "1.30"),
        (f.significant(123.4), "123"),
        (f.significant(18432), "18,432"),
        (f.significant(-0.5), "−0.500"),
        (f.significant(None), "–"),
        (f.kl(0.0941), "0.094"),
        (f.kl(0.00123), "0.00123"),
        (f.percent(0.2741), "27.4%"),
        (f.count(1_433_600), "1.43M"),
        (f.count(48), "48"),
        (f.whole(46080.4), "46,080"),
        (f.context_length(32768), "32k"),
        (f.context_length(1000), "1,000"),
        (f.duration(742), "12 min"),
        (f.duration(30), "30 s"),
        (f.duration(9000), "2.5 h"),
        (f.seconds(0.042), "42.0 ms"),
        (f.with_error(0.05484, 0.00132), "0.0548 ± 0.0013"),
        (f.with_error(0.2309, 0.01875), "0.231 ± 0.019"),
        (f.with_error(1234.5, 12.3), "1,234 ± 12"),
        (f.with_error(0.05484, None), "0.0548"),
        (f.with_error(0.0, 0.0), "0.00 ± 0.00"),
        (f.with_error(float("nan"), float("nan")), "nan ± nan"),
        (f.seconds(1.5), "1.50 s"),
        (f.byte_size(3.1e9), "3.1 GB"),
        (f.byte_size(500), "500 B"),
        (f.ratio(0.3581), "0.36×"),
        (f.ratio(12.34), "12.3×"),
        (f.p_value(0.00001), "<0.001"),
        (f.p_value(0.0078), "0.0078"),
        (f.p_value(1.0), "1"),
        (f.value_of("acc_norm", 0.7292), "72.9%"),
        (f.value_of("word_perplexity", 41.26), "41.3"),
        (f.value_of("bits_per_byte", 0.91), "0.9100"),
        (f.points_or_value("acc", -0.021), "−2.1"),
        (f.points_or_value("word_perplexity", 4.07), "+4.07"),
        (f.points_or_value("acc", 0.0), "0"),
    ],
)
def test_text(text: str, expected: str) -> None:
    assert text == expected


def test_breakable_escapes() -> None:
    assert f.breakable("a_<b>") == "a_<wbr>&lt;b&gt;"


def test_a_number_that_rounds_up_to_the_next_unit_has_that_unit() -> None:
    assert (f.count(999_600), f.count(999_400)) == ("1M", "999k")
    assert (f.byte_size(999.6e6), f.byte_size(1.2345e12)) == ("1 GB", "1,234 GB")
    assert (f.significant(999.7), f.significant(999.4)) == ("1,000", "999")
    assert (f.seconds(0.9997), f.seconds(0.9)) == ("1.00 s", "900 ms")
    assert f.points_or_value("word_perplexity", 1234.5) == "+1,234"
