"""Is HEAD slower than BASE? Paired measurements, their statistics, their table."""
