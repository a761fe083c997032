"""A discrete-event simulation of how a batch of informative groups is filled."""
