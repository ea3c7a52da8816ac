"""The CI matrix, the durations of its shards, the gathered verdict, annotations. Standard library only."""
