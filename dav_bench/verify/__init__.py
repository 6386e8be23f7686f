"""The conformance suite: does a method reach what it should, in worlds where the answer is known?

    from dav_bench.verify import Expectation, verify

    (result,) = verify([Expectation("mine", "toy-tokens", "target", {"rounds": 20, "alpha": 1.0})])
    assert result.passed, result

is a test that a plugin can have of its own method; the laws it may reach are `LAWS`.  `dav-bench verify` runs the rows
of the methods that come with dav-bench.
"""

from __future__ import annotations

from dav_bench.verify.expectations import LAWS, Allowance, Expectation, expectations
from dav_bench.verify.suite import Result, check, verify

__all__ = ["LAWS", "Allowance", "Expectation", "Result", "check", "expectations", "verify"]
