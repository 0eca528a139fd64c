# SPDX-License-Identifier: Apache-2.0
"""Fixtures and settings of the whole suite. Every test takes `device` (or `arrays`) and runs on each device that is
present."""

from __future__ import annotations

import os

import pytest
from arrays import Arrays, devices, on, torch


def pytest_addoption(parser):
    parser.addoption(
        "--full-cases",
        type=int,
        default=500,
        help="how many cases each test marked `full` takes, evenly, from its share of the whole product (0: all)",
    )


def pytest_configure(config):
    if torch is not None:
        # The reference is many small operations, and torch's waiting threads would take the cores from FlashCore's own.
        torch.set_num_threads(1)


@pytest.fixture(params=devices())
def device(request) -> str:
    """ "cpu", and "cuda" where there is one."""
    return request.param


@pytest.fixture
def arrays(device) -> Arrays:
    """What makes arrays on the device."""
    return on(device)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    """FLASHCORE_CHECK in the environment would hide what happens without it."""
    if "FLASHCORE_CHECK" in os.environ:
        monkeypatch.delenv("FLASHCORE_CHECK")
