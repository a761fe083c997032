"""The Megatron-Core learner: from groups to updated weights."""
