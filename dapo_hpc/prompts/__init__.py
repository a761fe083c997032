"""Data sets, chat template and the deterministic order of prompts."""
