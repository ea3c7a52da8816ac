"""The outcome: Verdict, the results file, the floor, known failures, the table of a run. Standard library only."""
