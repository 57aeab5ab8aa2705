"""Every check accepts what it should and its message has the one form."""

import re

import pytest
import torch

from paucity import checks
from paucity.checks import InputError, InputTypeError

FORM = re.compile(r"^f: \w+ must .+, got .+\.$")

GOOD = [
    (checks.check_ndim, (torch.ones(2, 3), 2)),
    (checks.check_ndim, (torch.ones(2), 1, 2)),
    (checks.check_shape, (torch.ones(2, 3), None, 3)),
    (checks.check_floating, (torch.ones(2, dtype=torch.bfloat16),)),
    (checks.check_bool, (torch.ones(2, dtype=torch.bool),)),
    (checks.check_range, (0.0, 0.0, 1.0)),
    (checks.check_range, (1e9,)),
    (checks.check_int, (3, 1, 3)),
    (checks.check_divides, (2, 4, "the row")),
    (checks.check_choice, ("a", ("a", "b"))),
]
BAD = [
    (checks.check_tensor, ([1.0],), InputTypeError),
    (checks.check_ndim, (torch.ones(2), 2), InputError),
    (checks.check_shape, (torch.ones(2, 3), 3, 3), InputError),
    (checks.check_shape, (torch.ones(2, 3), 2), InputError),
    (checks.check_floating, (torch.ones(2, dtype=torch.int64),), InputTypeError),
    (checks.check_bool, (torch.ones(2),), InputTypeError),
    (checks.check_range, (0.0, 0.0, 1.0), InputError, {"open_low": True}),
    (checks.check_range, (1.0, 0.0, 1.0), InputError, {"open_high": True}),
    (checks.check_range, (float("nan"),), InputError),
    (checks.check_range, (True, 0, 1), InputTypeError),
    (checks.check_int, (True,), InputTypeError),
    (checks.check_int, (1.0,), InputTypeError),
    (checks.check_int, (0,), InputError),
    (checks.check_int, (4, 1, 3), InputError),
    (checks.check_divides, (3, 4, "the row"), InputError),
    (checks.check_choice, ("c", ("a", "b")), InputError),
]


@pytest.mark.parametrize(("check", "arguments"), GOOD)
def test_good_input_passes(check, arguments):
    assert check("f", "x", *arguments) is None


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_the_one_form(case):
    check, arguments, error, *options = case
    with pytest.raises(error, match=FORM):
        check("f", "x", *arguments, **(options[0] if options else {}))


def test_an_input_error_is_a_value_error_and_a_type_error_is_both():
    assert issubclass(InputError, ValueError)
    assert issubclass(InputTypeError, TypeError)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), "half", True])
def test_sparsity_is_in_the_half_open_unit_interval(value):
    with pytest.raises(InputError, match="f: sparsity must"):
        checks.check_sparsity("f", value)


def test_n_of_m():
    checks.check_nm("f", 2, 4)
    with pytest.raises(InputError, match=r"f: n must be at most m \(4\), got 5\."):
        checks.check_nm("f", 5, 4)


def test_the_nearest_choice_is_named():
    with pytest.raises(InputError, match=r"got wand \(did you mean 'wanda'\?\)"):
        checks.check_choice("f", "method", "wand", ["wanda", "teal"])
