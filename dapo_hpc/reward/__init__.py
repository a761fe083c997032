"""Scorers, overlong punishment, and the worker processes they run in."""
