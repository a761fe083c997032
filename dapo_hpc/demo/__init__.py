"""The demo task: sums of digits modulo 10."""
