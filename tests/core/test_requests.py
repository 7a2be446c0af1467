"""Requests of the core engine come and go, fail, and are answered."""

import pytest
from helpers.engine_cases import RequestCases
from helpers.engines import build

pytestmark = pytest.mark.usefixtures("one_thread")


class TestCore(RequestCases):
    build = staticmethod(build)
