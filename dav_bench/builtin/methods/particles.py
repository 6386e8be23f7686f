"""Searches by particles on the pretrained model, and guidance; their settings are in `builtin.particles`."""

from __future__ import annotations

from dav_bench.builtin import particles
from dav_bench.builtin.particles import DAS, FK, SMC, TDS, Guidance
from dav_bench.core.method import Method


def smc(c: SMC) -> Method:
    return Method(particles.smc(c))


def tds(c: TDS) -> Method:
    return Method(particles.tds(c))


def das(c: DAS) -> Method:
    return Method(particles.das(c))


def fk(c: FK) -> Method:
    return Method(particles.fk(c))


def guidance(c: Guidance) -> Method:
    return Method(particles.guidance(c))
