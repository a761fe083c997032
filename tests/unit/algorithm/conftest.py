"""Hypothesis may be slow here: a loaded machine is no failure of the code."""

from hypothesis import settings

settings.register_profile("any_speed", deadline=None)
settings.load_profile("any_speed")
