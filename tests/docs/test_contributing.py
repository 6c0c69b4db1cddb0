"""The example method in CONTRIBUTING.md works."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import jax
import numpy as np

from prefix_jax.methods.base import normal_like
from prefix_jax.prefix import Geometry, Prefix, SiteShape

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
# The imports of a file of methods.
IMPORTS = """
import dataclasses
import jax
import jax.numpy as jnp
from prefix_jax.methods.base import Params, normal
from prefix_jax.methods.sites import SiteMethod
from prefix_jax.prefix import SITES, Geometry, KVPrefix, Prefix, Site, SiteName
"""


def test_example_method_shares_one_pair_and_drops_out() -> None:
    (code,) = re.findall(r"```python\n( +@dataclasses.*?)```", PAGE, re.DOTALL)
    namespace: dict = {}
    exec(IMPORTS + textwrap.dedent(code), namespace)
    geometry = Geometry(d_model=32, vocab=50, decoder=SiteShape(3, 4, 2, 8))
    method = namespace["SharedPrefixTuning"](length=8, dropout=0.5, layers=(0, 2))
    start = normal_like(method.blank(geometry), jax.random.key(1), 1.0)
    for begin in (None, start):
        params = method.init(jax.random.key(0), geometry, begin)
        prefix = method(params)
        assert isinstance(prefix, Prefix)
        k_LPKH = prefix.decoder.inside.k_LPKH
        assert k_LPKH.shape == (2, 8, 2, 8)
        np.testing.assert_array_equal(k_LPKH[0], k_LPKH[1])
    assert (method(params, jax.random.key(2)).decoder.inside.k_LPKH == 0).any()
