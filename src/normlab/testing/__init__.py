"""The contract that every layer and every method of normlab passes, shipped for anybody's own.

    import pytest
    from normlab.testing import LAYER_CHECKS, LayerCase

    CASE = LayerCase(make=lambda: MyNorm(4), shapes=[(6, 4, 5, 5)], oracle=my_norm_in_float64)

    @pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
    def test_contract(check):
        check(CASE)

A check returns nothing and raises AssertionError with what was expected and what was seen.
"""

from normlab.testing.layers import LAYER_CHECKS as LAYER_CHECKS
from normlab.testing.layers import LayerCase as LayerCase
from normlab.testing.layers import check_layer as check_layer
from normlab.testing.methods import METHOD_CHECKS as METHOD_CHECKS
from normlab.testing.methods import MethodCase as MethodCase
from normlab.testing.methods import check_method as check_method
