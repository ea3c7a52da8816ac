"""Other commits: their worktrees, and the process that answers for each."""
