import math

import pytest

from paucity.report import units


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (units.ms(0.04123), "0.0412 ms"),
        (units.ms(9.996), "10.0 ms"),
        (units.ms(81.25), "81.2 ms"),
        (units.ms(999.6), "1,000 ms"),
        (units.ms(12345.6), "12,346 ms"),
        (units.ms(0), "0.00 ms"),
        (units.megabytes(812.2), "812 MB"),
        (units.megabytes(9999.4), "9,999 MB"),
        (units.megabytes(12345), "12.3 GB"),
        (units.flop(1.234e9), "1.23 GFLOP"),
        (units.flop(999.7e9), "1.00 TFLOP"),
        (units.flop(12), "12.0 FLOP"),
        (units.scaled(5_512_448, ""), "5.51 M"),
        (units.percent(0.512), "51.2 %"),
        (units.percent(1.0), "100 %"),
        (units.percent(-0.0), "0 %"),
        (units.percent(0.9996), "100 %"),
        (units.change(0.0213), "+2.1 %"),
        (units.change(-0.298), "−29.8 %"),
        (units.change(-0.0004), "0.0 %"),
        (units.change(-0.07, "points"), "−7.0 points"),
        (units.change(123.4), "+12,340.0 %"),
        (units.fixed(1.2345), "1.234"),
        (units.significant(-1234.6), "−1,235"),
        (units.significant(11.2345, 4), "11.23"),
        (units.count(65536), "65,536"),
        (units.duration(0.41), "0.4 s"),
        (units.duration(59.7), "1 min 0 s"),
        (units.duration(123), "2 min 3 s"),
        (units.duration(3725), "1 h 2 min"),
        (units.listed(["a", "b", "c"]), "a, b and c"),
        (units.listed(["a"]), "a"),
        (units.listed([]), ""),
    ],
)
def test_text(text, wanted):
    assert text == wanted


@pytest.mark.parametrize(
    "show",
    [
        units.ms,
        units.megabytes,
        units.flop,
        units.percent,
        units.change,
        units.fixed,
        units.significant,
        units.duration,
    ],
)
def test_what_is_no_number_says_so(show):
    assert show(None) == "–"
    assert show(math.nan) == "not a number"
    assert show(math.inf) == "∞"
    assert show(-math.inf) == "−∞"
