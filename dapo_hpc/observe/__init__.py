"""What a run shows: metrics, live lines, the report."""
