"""Since which commit? The search, what it measures, its log and its report."""
